#include "batch_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <string>
#include <vector>

#include "checks.h"
#include "device.h"
#include "dispatch.h"
#include "memory.h"
#include "ops.h"

namespace gradfuse {
namespace {

constexpr const char* kOp = "batch_norm_act";

using Dims = c10::SmallVector<int64_t, 6>;

// Strides without gaps: dimension 1 is the innermost if channels_last, else second outermost.
Dims dense_strides(at::IntArrayRef sizes, bool channels_last) {
  Dims strides(sizes.size());
  int64_t step = 1;
  if (channels_last) strides[1] = 1, step = sizes[1];
  for (size_t d = sizes.size(); d-- > 0;) {
    if (channels_last && d == 1) continue;
    strides[d] = step;
    step *= sizes[d];
  }
  return strides;
}

bool has_strides(const at::Tensor& t, at::IntArrayRef strides) {
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1 && t.stride(d) != strides[d]) return false;
  return !t.is_neg();
}

// The layout that the kernels take a tensor in. One that is neither goes through a copy.
bool is_channels_last(const at::Tensor& t) {
  if (t.is_contiguous()) return false;
  if (has_strides(t, dense_strides(t.sizes(), true))) return true;
  const at::MemoryFormat format = t.suggest_memory_format();
  return format == at::MemoryFormat::ChannelsLast || format == at::MemoryFormat::ChannelsLast3d;
}

at::Tensor dense(const at::Tensor& t, at::IntArrayRef strides) {
  return has_strides(t, strides) ? t : dense_copy(t, strides);
}

BatchNormShape shape_of(const at::Tensor& t, bool channels_last) {
  const int64_t n = t.size(0), c = t.size(1);
  int64_t s = 1;
  for (int64_t d = 2; d < t.dim(); ++d) s *= t.size(d);
  const DType dtype = *dtype_of(t.scalar_type());
  if (c == 1) return {1, 1, n * s, dtype};
  if (channels_last || s == 1) return {n * s, c, 1, dtype};
  return {n, c, s, dtype};
}

void check_memory(const char* name, const at::Tensor& t) {
  if (t.layout() != at::kStrided)
    fail<TypeError>(kOp, ": ", name, " must be dense, got layout ", t.layout());
  if (!device_is_supported(t.device().type()))
    fail<TypeError>(kOp, ": ", name, " must be on cpu or a cuda device this build supports, got ",
                    t.device());
  if (is_wrapper(t))
    fail<TypeError>(kOp, ": ", name, " must be a plain tensor, got a wrapper without memory");
  if (!dtype_of(t.scalar_type()) || t.is_complex())
    fail<TypeError>(kOp, ": ", name, " must be float16, bfloat16, float32 or float64, got ",
                    t.scalar_type());
  if (const auto lack = missing_storage(t))
    fail<std::runtime_error>(kOp, ": ", name, " must have storage of at least ", lack->needed,
                             " bytes, got ", lack->found, "; was it resized or freed?");
}

void check_device(const char* name, const at::Tensor& t, const at::Tensor& like) {
  if (t.device() != like.device())
    fail<TypeError>(kOp, ": ", name, " must be on input's device ", like.device(), ", got ",
                    t.device());
}

// [N, C, ...] of the input's shape and dtype.
void check_twin(const char* name, const at::Tensor& t, const at::Tensor& like) {
  check_memory(name, t);
  check_device(name, t, like);
  if (t.sizes() != like.sizes() || t.scalar_type() != like.scalar_type())
    fail<std::invalid_argument>(kOp, ": ", name, " must have input's shape and dtype, ",
                                like.sizes(), " of ", like.scalar_type(), ", got ", t.sizes(),
                                " of ", t.scalar_type());
}

void check_vector(const char* name, const MaybeTensor& t, const at::Tensor& like) {
  if (!t) return;
  check_memory(name, *t);
  check_device(name, *t, like);
  if (t->dim() != 1 || t->size(0) != like.size(1))
    fail<std::invalid_argument>(kOp, ": ", name, " must have one element per channel, [",
                                like.size(1), "], got ", t->sizes());
}

void check_input(const at::Tensor& input) {
  check_memory("input", input);
  if (input.dim() < 2)
    fail<std::invalid_argument>(kOp, ": input must be [N, C, ...], got ", input.sizes());
}

void check_options(const BatchNormOptions& options) {
  const int code = static_cast<int>(options.activation);
  if (code < 0 || code >= kActivations)
    fail<std::invalid_argument>(kOp, ": activation must be 0 to ", kActivations - 1, ", got ",
                                code);
  if (!(options.eps >= 0.0))
    fail<std::invalid_argument>(kOp, ": eps must be >= 0, got ", options.eps);
  if (options.training && options.eps == 0.0)
    fail<std::invalid_argument>(kOp, ": eps must be > 0 when training, got 0");
}

void check_running(const at::Tensor& input, const MaybeTensor& mean, const MaybeTensor& var,
                   bool training) {
  if (mean.has_value() != var.has_value())
    fail<std::invalid_argument>(kOp, ": running_mean and running_var must come together, got only ",
                                mean ? "running_mean" : "running_var");
  if (!mean && !training)
    fail<std::invalid_argument>(
        kOp, ": running_mean and running_var must be given when not training, got None");
  if (!training) return;
  for (const MaybeTensor& t : {mean, var})
    if (t && t->size(0) > 1 && t->stride(0) == 0)
      fail<std::runtime_error>(kOp,
                               ": running statistics must have an element per memory location, "
                               "got an expanded tensor; .clone() it first");
  const int64_t count = input.numel() / std::max<int64_t>(input.size(1), 1);
  if (count == 1)
    fail<std::invalid_argument>("Expected more than 1 value per channel when training, got ",
                                "input size ", input.sizes());
}

// Vectors of channels as the kernels take them; keeps alive what it had to copy.
class Channels {
 public:
  ChannelRef operator()(const MaybeTensor& t) {
    if (!t) return {nullptr, DType::Float};
    held_.push_back(t->is_contiguous() && !t->is_neg() ? *t : converted(*t, t->scalar_type()));
    const at::Tensor& c = held_.back();
    return {const_cast<void*>(c.const_data_ptr()), *dtype_of(c.scalar_type())};
  }
  const at::Tensor& last() const { return held_.back(); }

 private:
  std::vector<at::Tensor> held_;
};

// Runs a call's kernels where the tensor is.
template <class Call>
void launch(const at::Tensor& t, const Call& call) {
  constexpr bool kForward = std::is_same_v<Call, BatchNormForward>;
  if (is_host(t.device())) {
    if constexpr (kForward)
      cpu::batch_norm_forward(call);
    else
      cpu::batch_norm_backward(call);
    return;
  }
#if defined(GRADFUSE_CUDA)
  on_device(t.device(), [&](cudaStream_t stream) {
    const at::Tensor scratch =
        empty_on_device({cuda::batch_norm_scratch_bytes(call.shape)}, t.options().dtype(at::kByte));
    if constexpr (kForward)
      cuda::batch_norm_forward(call, scratch.mutable_data_ptr(), stream);
    else
      cuda::batch_norm_backward(call, scratch.mutable_data_ptr(), stream);
  });
#endif
}

const void* data_of(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// The running statistics as they were given, after the kernels wrote to `written`.
void finish_update(const at::Tensor& running, const at::Tensor& written) {
  if (!written.is_same(running))
    running.copy_(written);
  else if (!running.is_inference())
    running.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

BatchNormResult batch_norm_forward(const at::Tensor& input, const MaybeTensor& residual,
                                   const MaybeTensor& weight, const MaybeTensor& bias,
                                   const MaybeTensor& running_mean, const MaybeTensor& running_var,
                                   double momentum, const MaybeTensor& momentum_value,
                                   const BatchNormOptions& options, bool wants_mask) {
  check_input(input);
  check_options(options);
  if (residual) check_twin("residual", *residual, input);
  check_vector("weight", weight, input);
  check_vector("bias", bias, input);
  check_vector("running_mean", running_mean, input);
  check_vector("running_var", running_var, input);
  check_running(input, running_mean, running_var, options.training);
  if (momentum_value) {
    check_memory("momentum", *momentum_value);
    check_device("momentum", *momentum_value, input);
    if (momentum_value->numel() != 1)
      fail<std::invalid_argument>(kOp, ": momentum must be one number, got ",
                                  momentum_value->sizes());
  }

  const bool channels_last = is_channels_last(input);
  const Dims strides = dense_strides(input.sizes(), channels_last);
  const at::TensorOptions options_of_stats = input.options().dtype(at::kDouble);
  BatchNormResult result;
  if (input.numel() == 0) {
    result.output = at::empty_strided(input.sizes(), strides, input.options());
    result.mask = at::empty({0}, input.options().dtype(at::kByte));
    result.stats = at::zeros({3, input.size(1)}, options_of_stats);
    return result;
  }
  const at::Tensor x = dense(input, strides);
  const BatchNormShape shape = shape_of(x, channels_last);
  // A dense input's own strides: where a size is 1 they are a matter of taste, which is kept.
  result.output = empty_strided_on_device(
      input.sizes(), x.is_same(input) ? input.strides() : at::IntArrayRef(strides),
      input.options());
  result.mask =
      empty_on_device(wants_mask ? Dims{shape.mask_rows(), shape.mask_bytes_per_row()} : Dims{0},
                      input.options().dtype(at::kByte));
  result.stats = empty_on_device({3, input.size(1)}, options_of_stats);

  MaybeTensor r;
  if (residual) r = residual->is_same(input) ? x : dense(*residual, strides);
  MaybeTensor factor;
  if (momentum_value) factor = converted(*momentum_value, at::kDouble);
  Channels channels;
  BatchNormForward call;
  call.shape = shape;
  call.input = x.const_data_ptr();
  call.residual = data_of(r);
  call.output = result.output.mutable_data_ptr();
  call.mask = wants_mask ? result.mask.mutable_data_ptr<uint8_t>() : nullptr;
  call.weight = channels(weight);
  call.bias = channels(bias);
  call.running_mean = channels(running_mean);
  const at::Tensor mean_written = running_mean ? channels.last() : at::Tensor();
  call.running_var = channels(running_var);
  const at::Tensor var_written = running_var ? channels.last() : at::Tensor();
  call.training = options.training;
  call.momentum = momentum;
  call.momentum_value = static_cast<const double*>(data_of(factor));
  call.eps = options.eps;
  call.activation = options.activation;
  call.negative_slope = options.negative_slope;
  call.stats = result.stats.mutable_data_ptr<double>();
  launch(input, call);
  if (options.training && running_mean) {
    finish_update(*running_mean, mean_written);
    finish_update(*running_var, var_written);
  }
  return result;
}

BatchNormGradients batch_norm_backward(const at::Tensor& grad_output, const MaybeTensor& input,
                                       const MaybeTensor& residual, const MaybeTensor& output,
                                       const MaybeTensor& mask, const MaybeTensor& weight,
                                       const MaybeTensor& bias, const at::Tensor& stats,
                                       bool channels_last, const BatchNormOptions& options,
                                       WantedGradients wanted) {
  check_memory("grad_output", grad_output);
  if (grad_output.dim() < 2)
    fail<std::invalid_argument>(kOp, ": grad_output must be [N, C, ...], got ",
                                grad_output.sizes());
  check_options(options);
  if (input) check_twin("input", *input, grad_output);
  if (residual) check_twin("residual", *residual, grad_output);
  if (output) check_twin("output", *output, grad_output);
  check_vector("weight", weight, grad_output);
  check_vector("bias", bias, grad_output);
  check_memory("stats", stats);
  check_device("stats", stats, grad_output);
  if (stats.scalar_type() != at::kDouble || !stats.is_contiguous() || stats.dim() != 2 ||
      stats.size(0) != 3 || stats.size(1) != grad_output.size(1))
    fail<std::invalid_argument>(kOp, ": stats must be [3, channels] of float64, got ",
                                stats.sizes(), " of ", stats.scalar_type());
  const Activation act = options.activation;
  const bool linear = act == Activation::None;
  if ((!input && (options.training || wanted.weight || needs_input(act))) ||
      (!output && needs_output(act)) || (!output && !mask && has_mask(act)))
    fail<std::invalid_argument>(kOp, ": expected what the backward of activation ",
                                static_cast<int>(act),
                                " reads, got None for input, output or mask");

  const Dims strides = dense_strides(grad_output.sizes(), channels_last);
  BatchNormGradients grads;
  const at::TensorOptions plain = grad_output.options();
  const auto like_weight = [&](const MaybeTensor& p) { return p ? p->options() : plain; };
  const int64_t channels_count = grad_output.size(1);
  if (grad_output.numel() == 0) {
    if (wanted.input) grads.input = at::empty_strided(grad_output.sizes(), strides, plain);
    if (wanted.residual) grads.residual = at::empty_strided(grad_output.sizes(), strides, plain);
    if (wanted.weight) grads.weight = at::zeros({channels_count}, like_weight(weight));
    if (wanted.bias) grads.bias = at::zeros({channels_count}, like_weight(bias));
    return grads;
  }
  const BatchNormShape shape = shape_of(grad_output, channels_last);
  if (mask && (mask->scalar_type() != at::kByte || !mask->is_contiguous() ||
               mask->device() != grad_output.device() ||
               mask->numel() != shape.mask_rows() * shape.mask_bytes_per_row()))
    fail<std::invalid_argument>(kOp, ": mask must be [", shape.mask_rows(), ", ",
                                shape.mask_bytes_per_row(), "] of uint8, got ", mask->sizes(),
                                " of ", mask->scalar_type());

  const at::Tensor g = dense(grad_output, strides);
  const auto in_layout = [&](const MaybeTensor& t) {
    return t ? MaybeTensor(dense(*t, strides)) : MaybeTensor();
  };
  const MaybeTensor x = in_layout(input), y = in_layout(output);
  const MaybeTensor r = needs_input(act) ? in_layout(residual) : MaybeTensor();
  if (wanted.input) grads.input = empty_strided_on_device(grad_output.sizes(), strides, plain);
  if (wanted.residual && linear)
    grads.residual = grad_output;
  else if (wanted.residual)
    grads.residual = empty_strided_on_device(grad_output.sizes(), strides, plain);
  if (wanted.weight) grads.weight = empty_on_device({channels_count}, like_weight(weight));
  if (wanted.bias) grads.bias = empty_on_device({channels_count}, like_weight(bias));

  Channels channels;
  BatchNormBackward call;
  call.shape = shape;
  call.grad_output = g.const_data_ptr();
  call.input = data_of(x);
  call.residual = data_of(r);
  const bool by_mask = mask && has_mask(act);
  call.output = by_mask ? nullptr : data_of(y);
  call.mask = by_mask ? mask->const_data_ptr<uint8_t>() : nullptr;
  call.weight = channels(weight);
  call.bias = channels(bias);
  call.stats = stats.const_data_ptr<double>();
  call.training = options.training;
  call.activation = act;
  call.negative_slope = options.negative_slope;
  call.grad_input = wanted.input ? grads.input.mutable_data_ptr() : nullptr;
  call.grad_residual = wanted.residual && !linear ? grads.residual.mutable_data_ptr() : nullptr;
  const auto channel_ref = [](const at::Tensor& t) {
    if (!t.defined()) return ChannelRef{nullptr, DType::Float};
    return ChannelRef{t.mutable_data_ptr(), *dtype_of(t.scalar_type())};
  };
  call.grad_weight = channel_ref(grads.weight);
  call.grad_bias = channel_ref(grads.bias);
  if (!call.grad_input && !call.grad_residual && !wanted.weight && !wanted.bias) return grads;
  launch(grad_output, call);
  return grads;
}

}  // namespace gradfuse
