// Batch normalisation: checks, brings every tensor into one layout, allocates the results, picks
// the device, binds.
#include "batch_norm.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../tensor/dispatch.h"
#include "../tensor/dtype.h"
#include "../tensor/event.h"
#include "../tensor/operands.h"
#include "../tensor/python_args.h"
#include "batch_norm_call.h"
#include "batch_norm_ghosts.h"

namespace gradfuse {
namespace {

// Results of a forward call. The output has the input's strides or, if those have gaps, the strides
// of the memory format nearest to them.
struct ForwardResult {
  at::Tensor output;
  at::Tensor mask;   // uint8 [rows, bytes], as BatchNormShape says; [0] where none was asked for
  at::Tensor stats;  // [ghost batches * 3, channels] of the compute type: mean, its rest,
                     // deviation; 5 rows each with renormalisation, whose correction follows
};

// A backward call: what the forward saved, and its options.
struct BackwardCall {
  at::Tensor grad_output;  // [N, C, ...], any strides
  MaybeTensor input, residual, output, mask, weight, bias;
  at::Tensor stats;  // [ghost batches * (3 or 5), C]
  MaybeTensor sample_scale;  // [N]
  bool channels_last;  // the forward's layout
  bool training;
  double eps;
  Activation activation;
  double negative_slope;
  int64_t ghost_size;  // the forward's
  MaybeTensor means;  // float64 [2, C], GradientMeans over all ranks
};

// A value for each gradient: whether it is wanted, or the tensor, undefined if not wanted.
template <class T>
struct OfEach {
  T input, residual, weight, bias;
};

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

// Whether the kernels take a tensor as channels-last, else as contiguous. If it is neither, a copy.
bool is_channels_last(const at::Tensor& t) {
  if (t.is_contiguous()) return false;
  if (has_strides(t, dense_strides(t.sizes(), true))) return true;
  const at::MemoryFormat format = t.suggest_memory_format();
  return format == at::MemoryFormat::ChannelsLast || format == at::MemoryFormat::ChannelsLast3d;
}

at::Tensor dense(const at::Tensor& t, at::IntArrayRef strides) {
  return has_strides(t, strides) ? t : dense_copy(t, strides);
}

int64_t statistics_rows(bool renormalises) {
  return renormalises ? kStatisticsAndCorrection : kStatistics;
}

// `by_sample`: samples are told apart, also those of a single channel.
BatchNormShape shape_of(const at::Tensor& t, bool channels_last, bool by_sample) {
  const int64_t n = t.size(0), c = t.size(1);
  int64_t s = 1;
  for (int64_t d = 2; d < t.dim(); ++d) s *= t.size(d);
  const DType dtype = *dtype_of(t.scalar_type());
  if (c == 1 && !by_sample) return {1, 1, n * s, dtype};
  if ((channels_last && c > 1) || s == 1) return {n * s, c, 1, dtype};
  return {n, c, s, dtype};
}

// Throws unless t, [N, C, ...], has the input's shape, dtype and device.
void check_twin(const char* name, const at::Tensor& t, const at::Tensor& like) {
  check_memory(kOp, name, t);
  check_device(kOp, name, t, like);
  if (t.sizes() != like.sizes() || t.scalar_type() != like.scalar_type())
    fail<std::invalid_argument>(kOp, ": ", name, " must have input's shape and dtype, ",
                                like.sizes(), " of ", like.scalar_type(), ", got ", t.sizes(),
                                " of ", t.scalar_type());
}

void check_vector(const char* name, const MaybeTensor& t, const at::Tensor& like) {
  if (!t) return;
  check_memory(kOp, name, *t);
  check_device(kOp, name, *t, like);
  if (t->dim() != 1 || t->size(0) != like.size(1))
    fail<std::invalid_argument>(kOp, ": ", name, " must have one element per channel, [",
                                like.size(1), "], got ", t->sizes());
}

void check_sample_scale_of_norm(const MaybeTensor& scale, const at::Tensor& like) {
  if (!scale) return;
  check_memory(kOp, "sample_scale", *scale);
  check_device(kOp, "sample_scale", *scale, like);
  if (scale->dim() != 1 || scale->size(0) != like.size(0))
    fail<std::invalid_argument>(kOp, ": sample_scale must have one element per sample, [",
                                like.size(0), "], got ", scale->sizes());
}

void check_input(const at::Tensor& input) {
  check_memory(kOp, "input", input);
  if (input.dim() < 2)
    fail<std::invalid_argument>(kOp, ": input must be [N, C, ...], got ", input.sizes());
}

void check_options(Activation activation, double eps, bool training) {
  const int code = static_cast<int>(activation);
  if (code < 0 || code >= kActivations)
    fail<std::invalid_argument>(kOp, ": activation must be 0 to ", kActivations - 1, ", got ",
                                code);
  if (!(eps >= 0.0)) fail<std::invalid_argument>(kOp, ": eps must be >= 0, got ", eps);
  if (training && eps == 0.0)
    fail<std::invalid_argument>(kOp, ": eps must be > 0 when training, got 0");
}

void check_ghost_size(int64_t size) {
  if (size < 0) fail<std::invalid_argument>(kOp, ": ghost_size must be >= 0, got ", size);
}

void check_modes(const BatchNormForwardCall& call) {
  check_ghost_size(call.ghost_size);
  if ((call.renorm || call.drift) && !(call.training && call.running_mean))
    fail<std::invalid_argument>(kOp, ": ", call.renorm ? "renorm" : "drift",
                                " must come with running statistics and training, got none");
  if (call.renorm && !(call.renorm->r_limit >= 1.0 && call.renorm->d_limit >= 0.0))
    fail<std::invalid_argument>(kOp, ": renorm must have r_max >= 1 and d_max >= 0, got ",
                                call.renorm->r_limit, " and ", call.renorm->d_limit);
  if (call.step) {
    check_layout_and_storage(kOp, "step", *call.step);
    check_device(kOp, "step", *call.step, call.input);
    if (call.step->scalar_type() != at::kLong || call.step->numel() != 1)
      fail<std::invalid_argument>(kOp, ": step must be one int64, got ", call.step->sizes(), " of ",
                                  call.step->scalar_type());
  }
  if (!call.drift) return;
  check_memory(kOp, "drift", *call.drift);
  check_device(kOp, "drift", *call.drift, call.input);
  if (call.drift->sizes() != at::IntArrayRef({kDriftRows, call.input.size(1)}))
    fail<std::invalid_argument>(kOp, ": drift must be [", kDriftRows, ", ", call.input.size(1),
                                "], got ", call.drift->sizes());
  if (at::has_internal_overlap(*call.drift) == at::MemOverlap::Yes)
    fail<std::runtime_error>(kOp,
                             ": drift must have an element per memory location, got an expanded "
                             "tensor; .clone() it first");
}

void check_running(const MaybeTensor& mean, const MaybeTensor& var, bool training) {
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
}

int64_t values_per_channel(const at::Tensor& input) {
  return input.numel() / std::max<int64_t>(input.size(1), 1);
}

// Throws if the batch's statistics are those of one value.
void check_count(const at::Tensor& input, const GhostBatches& batches) {
  const int64_t count = values_per_channel(input);
  if (count == 1)
    fail<std::invalid_argument>("Expected more than 1 value per channel when training, got ",
                                "input size ", input.sizes());
  if (count && count / input.size(0) * batches.smallest() == 1)
    fail<std::invalid_argument>(
        kOp, ": ghost_size must leave more than 1 value per channel in each ghost batch, got ",
        batches.count(), " ghost batches of input size ", input.sizes());
}

// The same over ranks. Throws on all ranks alike: where it has to wait for a device, it looks only
// if the ranks may have one value together, and each of them finds that.
void check_gathered(const BatchNormForwardCall& call) {
  const at::Tensor &gathered = *call.gathered, &input = call.input;
  check_memory(kOp, "gathered", gathered);
  check_device(kOp, "gathered", gathered, input);
  const int64_t row = Tallies::row(input.size(1));
  if (gathered.scalar_type() != at::kDouble || !gathered.is_contiguous() || gathered.dim() != 2 ||
      !gathered.size(0) || gathered.size(1) != row || !call.training || call.ghost_size)
    fail<std::invalid_argument>(kOp, ": gathered must be [ranks, ", row,
                                "] of Double, when training without ghost batches, got ",
                                gathered.sizes(), " of ", gathered.scalar_type());
  if (!input.is_cpu() && values_per_channel(input) > 1) return;
  const at::Tensor counts = on_host(gathered.select(1, 0).contiguous());
  const double* count = counts.const_data_ptr<double>();
  double all = 0.0;
  for (int64_t r = 0; r < counts.numel(); ++r) {
    if (!(count[r] >= 0.0))
      fail<std::runtime_error>(kOp, ": expected an input that every rank takes, got one that rank ",
                               r, " of ", counts.numel(),
                               " refused; nothing was written, and its own error says why");
    all += count[r];
  }
  if (all == 1.0)
    fail<std::invalid_argument>("Expected more than 1 value per channel when training, got ",
                                "input size ", input.sizes(), " and one value in all ",
                                counts.numel(), " ranks");
}

// Vectors of channels as the kernels take them. Keeps its copies alive.
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

// A scale of each sample as the kernels take it: one of each of the shape's outer rows.
at::Tensor scale_of_rows(const MaybeTensor& scale, const BatchNormShape& shape,
                         at::ScalarType type) {
  if (!scale) return {};
  const int64_t n = scale->size(0);
  return converted(scale->unsqueeze(1).expand({n, shape.outer / n}), type);
}
BranchScale branch_scale(const at::Tensor& scale) {
  return {scale.defined() ? scale.const_data_ptr() : nullptr};
}

const void* data_of(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// Finishes the update of the running statistics, which the kernels wrote to `written`.
void finish_update(const at::Tensor& running, const at::Tensor& written) {
  if (!written.is_same(running))
    running.copy_(written);
  else if (!running.is_inference())
    running.unsafeGetTensorImpl()->bump_version();
}

GhostBatches ghost_batches(const BatchNormForwardCall& call) {
  return GhostBatches(call.input.size(0), call.training ? call.ghost_size : 0);
}

void check_arguments(const BatchNormForwardCall& call) {
  check_input(call.input);
  check_options(call.activation, call.eps, call.training);
  if (call.residual) check_twin("residual", *call.residual, call.input);
  check_vector("weight", call.weight, call.input);
  check_vector("bias", call.bias, call.input);
  check_vector("running_mean", call.running_mean, call.input);
  check_vector("running_var", call.running_var, call.input);
  check_sample_scale_of_norm(call.sample_scale, call.input);
  check_modes(call);
  check_running(call.running_mean, call.running_var, call.training);
  if (!call.momentum_value) return;
  check_memory(kOp, "momentum", *call.momentum_value);
  check_device(kOp, "momentum", *call.momentum_value, call.input);
  const int64_t numbers = call.momentum_value->numel();
  if (numbers != 1 && numbers != ghost_batches(call).count())
    fail<std::invalid_argument>(kOp, ": momentum must be one number",
                                call.ghost_size ? " or one for each ghost batch" : "", ", got ",
                                call.momentum_value->sizes());
}

}  // namespace

void check_forward(const BatchNormForwardCall& call) {
  check_arguments(call);
  if (call.gathered)
    check_gathered(call);
  else if (call.training)
    check_count(call.input, ghost_batches(call));
}

c10::SmallVector<int64_t, 6> output_strides(const at::Tensor& input) {
  const Dims dense = dense_strides(input.sizes(), is_channels_last(input));
  // A dense input's own strides are kept: those of dimensions of size 1 are arbitrary.
  if (!has_strides(input, dense)) return dense;
  return {input.strides().begin(), input.strides().end()};
}

namespace {

at::ScalarType computed_in(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

ForwardResult allocate(const BatchNormForwardCall& call, const at::Tensor& x, const Dims& strides,
                       const BatchNormShape& shape, int64_t stats_rows) {
  const at::TensorOptions like_input = call.input.options();
  ForwardResult result;
  result.output = empty_strided_on_device(
      call.input.sizes(), x.is_same(call.input) ? call.input.strides() : at::IntArrayRef(strides),
      like_input);
  const Dims mask = {shape.mask_rows(), shape.mask_bytes_per_row()};
  result.mask = empty_on_device(call.wants_mask ? mask : Dims{0}, like_input.dtype(at::kByte));
  result.stats =
      empty_on_device({stats_rows, call.input.size(1)}, like_input.dtype(computed_in(call.input)));
  return result;
}

ForwardResult forward(const BatchNormForwardCall& given);

// Updates the running statistics of a rank without values by those of the others.
void update_without_values(const BatchNormForwardCall& given) {
  if (!given.input.size(1) || !given.running_mean) return;
  if (*on_host(given.gathered->select(1, 0).sum()).const_data_ptr<double>() == 0.0)
    return;  // as of an empty batch
  BatchNormForwardCall call = {};
  call.input = at::zeros({1, given.input.size(1)}, given.input.options());
  call.running_mean = given.running_mean;
  call.running_var = given.running_var;
  call.training = true;
  call.momentum = given.momentum;
  call.momentum_value = given.momentum_value;
  call.eps = given.eps;
  call.renorm = given.renorm;
  call.step = given.step;
  call.drift = given.drift;
  call.gathered = given.gathered;
  forward(call);
}

// act(batch_norm(input) + residual). Updates the running statistics if training and they are given.
// Throws TypeError or std::invalid_argument, nothing written, on what the kernels cannot take.
ForwardResult forward(const BatchNormForwardCall& given) {
  check_forward(given);
  const at::Tensor& input = given.input;
  const bool channels_last = is_channels_last(input);
  const Dims strides = dense_strides(input.sizes(), channels_last);
  const GhostBatches batches = ghost_batches(given);
  const int64_t rows = statistics_rows(given.renorm.has_value());
  if (input.numel() == 0 && given.gathered) update_without_values(given);
  if (input.numel() == 0)
    return {at::empty_strided(input.sizes(), strides, input.options()),
            at::empty({0}, input.options().dtype(at::kByte)),
            at::ones({batches.count() * rows, input.size(1)},
                     input.options().dtype(computed_in(input)))};
  const at::Tensor x = dense(input, strides);
  const BatchNormShape shape =
      shape_of(x, channels_last, given.sample_scale.has_value() || given.ghost_size);
  ForwardResult result = allocate(given, x, strides, shape, batches.count() * rows);

  MaybeTensor residual, momentum;
  if (given.residual)
    residual = given.residual->is_same(input) ? x : dense(*given.residual, strides);
  if (given.momentum_value) momentum = converted(*given.momentum_value, at::kDouble);
  Channels channels;
  BatchNormForward call;
  call.shape = shape;
  call.input = x.const_data_ptr();
  call.residual = data_of(residual);
  const at::Tensor scale = scale_of_rows(given.sample_scale, shape, computed_in(input));
  call.scale = branch_scale(scale);
  call.output = result.output.mutable_data_ptr();
  call.mask = given.wants_mask ? result.mask.mutable_data_ptr<uint8_t>() : nullptr;
  call.weight = channels(given.weight);
  call.bias = channels(given.bias);
  call.running_mean = channels(given.running_mean);
  const at::Tensor mean_written = given.running_mean ? channels.last() : at::Tensor();
  call.running_var = channels(given.running_var);
  const at::Tensor var_written = given.running_var ? channels.last() : at::Tensor();
  call.training = given.training;
  call.momentum = given.momentum;
  call.momentum_value = static_cast<const double*>(data_of(momentum));
  call.drift = channels(given.drift);
  const at::Tensor drift_written = given.drift ? channels.last() : at::Tensor();
  call.renormalises = given.renorm.has_value();
  call.renorm = given.renorm.value_or(Renorm{});
  call.step = static_cast<const int64_t*>(data_of(given.step));
  call.eps = given.eps;
  call.activation = given.activation;
  call.negative_slope = given.negative_slope;
  call.stats = result.stats.mutable_data_ptr();
  call.over_ranks = {};
  if (given.gathered)
    call.over_ranks = {given.gathered->const_data_ptr<double>(), given.gathered->size(0)};
  call.tally = nullptr;
  const bool momentum_of_each = momentum && momentum->numel() > 1;
  const auto of_ghost_batch = [&](int64_t k) {
    const ToGhostBatch move(shape, batches, k);
    BatchNormForward part = call;
    part.shape = batches.shape(shape, k);
    move.elements(part.input);
    move.elements(part.residual);
    move.elements(part.output);
    move.mask(part.mask);
    move.scale(part.scale);
    move.stats(part.stats, rows);
    if (momentum_of_each) part.momentum_value += k;
    return part;
  };
  run_on(
      input.device(),
      [&] {
        const auto parts = batches.each(of_ghost_batch);
        cpu::batch_norm_forward(parts.data(), batches.count());
      },
      [&](Stream stream) {
        const at::Tensor scratch = scratch_on(input.device(), batches.scratch_bytes(shape));
        for (int64_t k = 0; k < batches.count(); ++k)
          cuda::batch_norm_forward(of_ghost_batch(k), scratch.mutable_data_ptr(), stream);
      });
  if (given.training && given.running_mean) {
    finish_update(*given.running_mean, mean_written);
    finish_update(*given.running_var, var_written);
  }
  if (given.drift) finish_update(*given.drift, drift_written);
  return result;
}

// This rank's row of a call's Tallies. Throws what the forward throws, but for the count.
at::Tensor statistics(const BatchNormForwardCall& given) {
  check_arguments(given);
  const at::Tensor& input = given.input;
  const Dims sizes = {Tallies::row(input.size(1))};
  if (input.numel() == 0) return at::zeros(sizes, input.options().dtype(at::kDouble));
  const bool channels_last = is_channels_last(input);
  const at::Tensor x = dense(input, dense_strides(input.sizes(), channels_last));
  const at::Tensor result = empty_on_device(sizes, input.options().dtype(at::kDouble));
  BatchNormForward call = {};
  call.shape = shape_of(x, channels_last, false);
  call.input = x.const_data_ptr();
  call.training = true;
  call.tally = result.mutable_data_ptr<double>();
  run_on(
      input.device(), [&] { cpu::batch_norm_forward(&call, 1); },
      [&](Stream stream) {
        const at::Tensor scratch =
            scratch_on(input.device(), cuda::batch_norm_scratch_bytes(call.shape));
        cuda::batch_norm_forward(call, scratch.mutable_data_ptr(), stream);
      });
  return result;
}

void check_backward(const BackwardCall& call, const OfEach<bool>& wanted) {
  check_ghost_size(call.ghost_size);
  const at::Tensor& g = call.grad_output;
  check_memory(kOp, "grad_output", g);
  if (g.dim() < 2)
    fail<std::invalid_argument>(kOp, ": grad_output must be [N, C, ...], got ", g.sizes());
  check_options(call.activation, call.eps, call.training);
  if (call.input) check_twin("input", *call.input, g);
  if (call.residual) check_twin("residual", *call.residual, g);
  if (call.output) check_twin("output", *call.output, g);
  check_vector("weight", call.weight, g);
  check_vector("bias", call.bias, g);
  check_sample_scale_of_norm(call.sample_scale, g);
  check_memory(kOp, "stats", call.stats);
  check_device(kOp, "stats", call.stats, g);
  const int64_t batches = GhostBatches(g.size(0), call.ghost_size).count();
  if (call.stats.scalar_type() != computed_in(g) || !call.stats.is_contiguous() ||
      call.stats.dim() != 2 ||
      (call.stats.size(0) != kStatistics * batches &&
       call.stats.size(0) != kStatisticsAndCorrection * batches) ||
      call.stats.size(1) != g.size(1))
    fail<std::invalid_argument>(kOp, ": stats must be [", kStatistics * batches, " or ",
                                kStatisticsAndCorrection * batches, ", channels] of ",
                                computed_in(g), ", got ", call.stats.sizes(), " of ",
                                call.stats.scalar_type());
  if (call.means) {
    check_memory(kOp, "means", *call.means);
    check_device(kOp, "means", *call.means, g);
    if (call.means->scalar_type() != at::kDouble || !call.means->is_contiguous() ||
        call.means->sizes() != at::IntArrayRef({2, g.size(1)}) || batches > 1)
      fail<std::invalid_argument>(kOp, ": means must be [2, ", g.size(1),
                                  "] of Double, without ghost batches, got ", call.means->sizes(),
                                  " of ", call.means->scalar_type());
  }
  const Activation act = call.activation;
  if ((!call.input && (call.training || wanted.weight || needs_input(act))) ||
      (!call.output && needs_output(act)) || (!call.output && !call.mask && has_mask(act)))
    fail<std::invalid_argument>(kOp, ": expected what the backward of activation ",
                                static_cast<int>(act),
                                " reads, got None for input, output or mask");
}

void check_mask(const at::Tensor& mask, const BatchNormShape& shape, at::Device device) {
  if (mask.scalar_type() != at::kByte || !mask.is_contiguous() || mask.device() != device ||
      mask.numel() != shape.mask_rows() * shape.mask_bytes_per_row())
    fail<std::invalid_argument>(kOp, ": mask must be [", shape.mask_rows(), ", ",
                                shape.mask_bytes_per_row(), "] of uint8, got ", mask.sizes(),
                                " of ", mask.scalar_type());
}

// Allocates the wanted gradients with `empty_like_input` and `empty_vector`.
template <class LikeInput, class Vector>
OfEach<at::Tensor> allocate(const BackwardCall& call, const OfEach<bool>& wanted,
                            LikeInput empty_like_input, Vector empty_vector) {
  const at::TensorOptions plain = call.grad_output.options();
  OfEach<at::Tensor> grads;
  if (wanted.input) grads.input = empty_like_input(plain);
  if (wanted.residual) grads.residual = empty_like_input(plain);
  if (wanted.weight) grads.weight = empty_vector(call.weight ? call.weight->options() : plain);
  if (wanted.bias) grads.bias = empty_vector(call.bias ? call.bias->options() : plain);
  return grads;
}

// Writes this batch's sums to `sums`, float64 [2, C], if it is defined; then none must be wanted.
OfEach<at::Tensor> backward(const BackwardCall& given, OfEach<bool> wanted,
                            const at::Tensor& sums = {}) {
  check_backward(given, wanted);
  const at::Tensor& grad_output = given.grad_output;
  const at::IntArrayRef sizes = grad_output.sizes();
  const Dims strides = dense_strides(sizes, given.channels_last);
  if (grad_output.numel() == 0)
    return allocate(
        given, wanted, [&](auto options) { return at::empty_strided(sizes, strides, options); },
        [&](auto options) { return at::zeros({sizes[1]}, options); });
  const BatchNormShape shape = shape_of(grad_output, given.channels_last,
                                        given.sample_scale.has_value() || given.ghost_size);
  const GhostBatches batches(sizes[0], given.ghost_size);
  const int64_t rows = given.stats.size(0) / batches.count();
  if (given.mask) check_mask(*given.mask, shape, grad_output.device());

  const Activation act = given.activation;
  const bool passes_residual = wanted.residual && act == Activation::None;  // grad_output itself
  if (passes_residual) wanted.residual = false;
  OfEach<at::Tensor> grads = allocate(
      given, wanted, [&](auto options) { return empty_strided_on_device(sizes, strides, options); },
      [&](auto options) { return empty_on_device({sizes[1]}, options); });
  at::Tensor ghost_sums;
  if (batches.count() > 1)
    ghost_sums = empty_on_device({2, sizes[1]}, grad_output.options().dtype(at::kDouble));

  const at::Tensor g = dense(grad_output, strides);
  const auto in_layout = [&](const MaybeTensor& t) {
    return t ? MaybeTensor(dense(*t, strides)) : MaybeTensor();
  };
  const MaybeTensor x = in_layout(given.input), y = in_layout(given.output);
  const MaybeTensor r = needs_input(act) ? in_layout(given.residual) : MaybeTensor();
  const auto data = [](const at::Tensor& t) {
    return t.defined() ? t.mutable_data_ptr() : nullptr;
  };
  const auto channel_ref = [&](const at::Tensor& t) {
    return t.defined() ? ChannelRef{data(t), *dtype_of(t.scalar_type())}
                       : ChannelRef{nullptr, DType::Float};
  };
  Channels channels;
  BatchNormBackward call;
  call.shape = shape;
  call.grad_output = g.const_data_ptr();
  call.input = data_of(x);
  call.residual = data_of(r);
  const bool by_mask = given.mask && has_mask(act);
  call.output = by_mask ? nullptr : data_of(y);
  call.mask = by_mask ? given.mask->const_data_ptr<uint8_t>() : nullptr;
  call.weight = channels(given.weight);
  call.bias = channels(given.bias);
  call.stats = given.stats.const_data_ptr();
  call.renormalises = rows == kStatisticsAndCorrection;
  const at::Tensor scale = scale_of_rows(given.sample_scale, shape, computed_in(grad_output));
  call.scale = branch_scale(scale);
  call.training = given.training;
  call.activation = act;
  call.negative_slope = given.negative_slope;
  call.grad_input = data(grads.input);
  call.grad_residual = data(grads.residual);
  call.grad_weight = channel_ref(grads.weight);
  call.grad_bias = channel_ref(grads.bias);
  if (passes_residual) grads.residual = grad_output;
  call.means = static_cast<const double*>(data_of(given.means));
  call.sums = static_cast<double*>(data(sums));
  if (!wanted.input && !wanted.residual && !wanted.weight && !wanted.bias && !call.sums)
    return grads;
  const auto of_ghost_batch = [&](int64_t k) {
    const ToGhostBatch move(shape, batches, k);
    BatchNormBackward part = call;
    part.shape = batches.shape(shape, k);
    move.elements(part.grad_output);
    move.elements(part.input);
    move.elements(part.residual);
    move.elements(part.output);
    move.mask(part.mask);
    move.scale(part.scale);
    move.stats(part.stats, rows);
    move.elements(part.grad_input);
    move.elements(part.grad_residual);
    part.ghosts = {static_cast<double*>(data(ghost_sums)), k == 0, k == batches.count() - 1};
    return part;
  };
  run_on(
      grad_output.device(),
      [&] {
        const auto parts = batches.each(of_ghost_batch);
        cpu::batch_norm_backward(parts.data(), batches.count());
      },
      [&](Stream stream) {
        const at::Tensor scratch = scratch_on(grad_output.device(), batches.scratch_bytes(shape));
        for (int64_t k = 0; k < batches.count(); ++k)
          cuda::batch_norm_backward(of_ghost_batch(k), scratch.mutable_data_ptr(), stream);
      });
  return grads;
}

// Sums over this batch of what GradientMeans are of.
at::Tensor gradient_sums(const BackwardCall& call) {
  if (call.ghost_size)
    fail<std::invalid_argument>(kOp, ": sums of gradients must come without ghost batches, got ",
                                "ghost_size ", call.ghost_size);
  const at::Tensor& g = call.grad_output;
  const Dims sizes = {2, g.dim() < 2 ? 0 : g.size(1)};
  const at::TensorOptions options = g.options().dtype(at::kDouble);
  const at::Tensor sums = g.numel() ? empty_on_device(sizes, options) : at::zeros(sizes, options);
  backward(call, {}, sums);
  return sums;
}

}  // namespace

BatchNormForwardCall read_forward(py::handle given) {
  Fields fields("BatchNormCall", given, 19);
  BatchNormForwardCall call = {};
  call.input = tensor_of(kOp, "input", fields.next());
  call.residual = maybe_tensor(kOp, "residual", fields.next());
  call.weight = maybe_tensor(kOp, "weight", fields.next());
  call.bias = maybe_tensor(kOp, "bias", fields.next());
  call.running_mean = maybe_tensor(kOp, "running_mean", fields.next());
  call.running_var = maybe_tensor(kOp, "running_var", fields.next());
  call.training = fields.next_as<bool>();
  const py::handle momentum = fields.next();
  if (is_tensor(momentum))
    call.momentum_value = tensor_of(kOp, "momentum", momentum);
  else
    call.momentum = momentum.cast<double>();
  call.eps = fields.next_as<double>();
  call.activation = static_cast<Activation>(fields.next_as<int>());
  call.negative_slope = fields.next_as<double>();
  call.wants_mask = fields.next_as<bool>();
  call.sample_scale = maybe_tensor(kOp, "sample_scale", fields.next());
  call.ghost_size = fields.next_as<int64_t>();
  const py::handle renorm = fields.next();
  if (!renorm.is_none()) {
    const auto limits = renorm.cast<std::array<double, 5>>();
    call.renorm = Renorm{limits[0], limits[1], limits[2], limits[3], limits[4]};
  }
  call.step = maybe_tensor(kOp, "step", fields.next());
  call.drift = maybe_tensor(kOp, "drift", fields.next());
  call.gathered = maybe_tensor(kOp, "gathered", fields.next());
  return call;  // the last field, the group's name, is for Python's backward
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_forward_(BatchNormCallArg given) {
  GRADFUSE_EVENT("gradfuse::batch_norm_act");
  const BatchNormForwardCall call = read_forward(given.object);
  const py::gil_scoped_release release;
  ForwardResult result = forward(call);
  return {std::move(result.output), std::move(result.mask), std::move(result.stats)};
}

at::Tensor batch_norm_statistics_(BatchNormCallArg given) {
  GRADFUSE_EVENT("gradfuse::batch_norm_statistics");
  const BatchNormForwardCall call = read_forward(given.object);
  const py::gil_scoped_release release;
  return statistics(call);
}

BackwardCall read_backward(TensorArg grad_output, BatchNormSavedArg saved,
                           BatchNormOptionsArg options) {
  Fields tensors("BatchNormSaved", saved.object, 9);
  BackwardCall call = {};
  call.grad_output = tensor_of(kOp, "grad_output", grad_output.object);
  call.input = maybe_tensor(kOp, "input", tensors.next());
  call.residual = maybe_tensor(kOp, "residual", tensors.next());
  call.output = maybe_tensor(kOp, "output", tensors.next());
  call.mask = maybe_tensor(kOp, "mask", tensors.next());
  call.weight = maybe_tensor(kOp, "weight", tensors.next());
  call.bias = maybe_tensor(kOp, "bias", tensors.next());
  call.stats = tensor_of(kOp, "stats", tensors.next());
  call.sample_scale = maybe_tensor(kOp, "sample_scale", tensors.next());
  call.means = maybe_tensor(kOp, "means", tensors.next());
  Fields fields("BatchNormOptions", options.object, 6);
  call.channels_last = fields.next_as<bool>();
  call.training = fields.next_as<bool>();
  call.eps = fields.next_as<double>();
  call.activation = static_cast<Activation>(fields.next_as<int>());
  call.negative_slope = fields.next_as<double>();
  call.ghost_size = fields.next_as<int64_t>();
  return call;
}

// grad_input, grad_residual, grad_weight, grad_bias; None where not wanted.
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor> batch_norm_backward_(
    TensorArg grad_output, BatchNormSavedArg saved, BatchNormOptionsArg options, WantedArg wants) {
  GRADFUSE_EVENT("gradfuse::batch_norm_act_backward");
  const BackwardCall call = read_backward(grad_output, saved, options);
  const auto wanted = wants.object.cast<std::array<bool, 4>>();
  const py::gil_scoped_release release;
  const OfEach<at::Tensor> grads = backward(call, {wanted[0], wanted[1], wanted[2], wanted[3]});
  const auto maybe = [](const at::Tensor& t) {
    return t.defined() ? MaybeTensor(t) : std::nullopt;
  };
  return {maybe(grads.input), maybe(grads.residual), maybe(grads.weight), maybe(grads.bias)};
}

at::Tensor batch_norm_gradient_sums_(TensorArg grad_output, BatchNormSavedArg saved,
                                     BatchNormOptionsArg options) {
  GRADFUSE_EVENT("gradfuse::batch_norm_gradient_sums");
  const BackwardCall call = read_backward(grad_output, saved, options);
  const py::gil_scoped_release release;
  return gradient_sums(call);
}

}  // namespace

void bind_batch_norm(py::module_& m) {
  add_codes(m, "Activation",
            {{"NONE", static_cast<int>(Activation::None)},
             {"RELU", static_cast<int>(Activation::Relu)},
             {"RELU6", static_cast<int>(Activation::Relu6)},
             {"LEAKY_RELU", static_cast<int>(Activation::LeakyRelu)},
             {"SILU", static_cast<int>(Activation::Silu)},
             {"GELU", static_cast<int>(Activation::Gelu)},
             {"GELU_TANH", static_cast<int>(Activation::GeluTanh)},
             {"HARDSWISH", static_cast<int>(Activation::Hardswish)},
             {"SIGMOID", static_cast<int>(Activation::Sigmoid)},
             {"TANH", static_cast<int>(Activation::Tanh)}});
  m.def("batch_norm_forward", &batch_norm_forward_, py::arg("call"));
  m.def("batch_norm_backward", &batch_norm_backward_, py::arg("grad_output"), py::arg("saved"),
        py::arg("options"), py::arg("wanted"));
  m.def("batch_norm_statistics", &batch_norm_statistics_, py::arg("call"));
  m.def("batch_norm_gradient_sums", &batch_norm_gradient_sums_, py::arg("grad_output"),
        py::arg("saved"), py::arg("options"));
}

}  // namespace gradfuse
