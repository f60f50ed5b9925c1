// Layer norm and RMS norm: checks, allocates the results, picks the device, binds.
#include "row_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../math/row_norm.h"
#include "../tensor/dispatch.h"
#include "../tensor/event.h"
#include "../tensor/operands.h"
#include "../tensor/python_args.h"

namespace gradfuse {
namespace {

// Which function is meant. gradfuse/_codes.py has the same numbers.
enum class RowNorm : int { LayerNorm, AddLayerNorm, RmsNorm, AddRmsNorm, DropoutAdd };
constexpr const char* kRowNormNames[] = {"layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm",
                                         "dropout_add"};
constexpr int kRowNorms = 5;

using Sizes = c10::SmallVector<int64_t, 6>;

// A forward call as Python makes it. gradfuse/_records.py has the same fields.
struct RowNormForwardCall {
  at::Tensor input;  // [..., *normalized]
  MaybeTensor residual;  // of input's shape
  MaybeTensor weight, bias;  // [*normalized]
  MaybeTensor sample_scale;  // [input.size(0)]
  MaybeTensor seed;  // int64 [2], of a dropout
  const char* op;
  bool normalises, centred;
  Sizes normalized;
  double p;
  double eps;
  double weight_offset;
  at::ScalarType sum_type;
  bool keeps_sum;
};

// A backward call: what the forward saved, and its options.
struct RowNormBackwardCall {
  MaybeTensor grad_output, grad_sum;  // at least one of them
  MaybeTensor sum;  // none if it is computed again from input and residual
  MaybeTensor input, residual, weight, bias, sample_scale, seed;
  MaybeTensor stats;  // [rows, kKeptOfRow]; none without a norm
  const char* op;
  bool centred;
  double p;
  double weight_offset;
  int64_t dims;         // normalized dimensions
  at::ScalarType type;  // of the input
  at::ScalarType residual_type;
  bool has_residual;
  at::ScalarType sum_type;
};

struct RowNormResult {
  MaybeTensor output;
  MaybeTensor sum;  // none if it is not kept, or is the input itself
  MaybeTensor stats;
};

struct RowNormGradients {
  MaybeTensor input, residual, weight, bias;
};

DType row_type(at::ScalarType type) { return *dtype_of(type); }

at::ScalarType row_compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

bool has_16_bits(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

void check_like(const char* op, const char* name, const MaybeTensor& t, const at::Tensor& like,
                at::IntArrayRef sizes) {
  if (!t) return;
  check_memory(op, name, *t);
  check_device(op, name, *t, like);
  if (t->sizes() != sizes)
    fail<std::invalid_argument>(op, ": ", name, " must have shape ", sizes, ", got ", t->sizes());
}

void check_seed(const char* op, const MaybeTensor& seed, const at::Tensor& like, double p) {
  if (!seed) return;
  if (seed->scalar_type() != at::kLong || seed->numel() != 2 || !seed->is_contiguous() ||
      seed->device() != like.device() || is_wrapper(*seed) || missing_storage(*seed))
    fail<std::invalid_argument>(op, ": seed must be two numbers of int64 on input's device, got ",
                                seed->sizes(), " of ", seed->scalar_type(), " on ", seed->device());
  if (!(p > 0.0 && p <= 1.0))
    fail<std::invalid_argument>(op, ": p must be above 0 and at most 1 with a seed, got ", p);
}

void check_sum_type(const char* op, at::ScalarType input, at::ScalarType sum) {
  if (sum != input && !(has_16_bits(input) && sum == at::kFloat))
    fail<TypeError>(op, ": residual_dtype must be input's dtype ", input,
                    has_16_bits(input) ? " or Float" : "", ", got ", sum);
}

void check_sample_scale(const char* op, const MaybeTensor& scale, const at::Tensor& like,
                        int64_t batch_dims) {
  if (!scale) return;
  if (batch_dims < 1)
    fail<std::invalid_argument>(op, ": sample_scale needs an input of samples, got ", like.sizes());
  check_like(op, "sample_scale", scale, like, {like.size(0)});
}

void check_row_norm(const RowNormForwardCall& call) {
  const char* const op = call.op;
  const at::Tensor& x = call.input;
  check_memory(op, "input", x);
  const int64_t dims = static_cast<int64_t>(call.normalized.size());
  if (dims == 0)
    fail<std::invalid_argument>(op, ": normalized_shape must have one dimension or more, got []");
  if (x.dim() < dims || x.sizes().slice(x.dim() - dims) != at::IntArrayRef(call.normalized))
    fail<std::invalid_argument>(op, ": input must end in normalized_shape ",
                                at::IntArrayRef(call.normalized), ", got ", x.sizes());
  check_like(op, "residual", call.residual, x, x.sizes());
  check_like(op, "weight", call.weight, x, call.normalized);
  check_like(op, "bias", call.bias, x, call.normalized);
  check_sample_scale(op, call.sample_scale, x, x.dim() - dims);
  check_seed(op, call.seed, x, call.p);
  check_sum_type(op, x.scalar_type(), call.sum_type);
  if (!(call.eps >= 0.0)) fail<std::invalid_argument>(op, ": eps must be >= 0, got ", call.eps);
}

// The addends as kernels read them. Keeps its copies alive.
struct RowAddends {
  at::Tensor input, residual, sample_scale;
  RowSum sum = {};
  DType residual_dtype;

  RowAddends(at::ScalarType type, const MaybeTensor& given_input, const MaybeTensor& given,
             const MaybeTensor& scale, const MaybeTensor& seed, double p, int64_t rows,
             at::ScalarType sum_type) {
    if (given_input) {
      input = contiguous(*given_input);
      sum.input = input.const_data_ptr();
    }
    residual_dtype = row_type(sum_type);
    if (given) {
      const bool taken =
          given->scalar_type() == type || (has_16_bits(type) && given->scalar_type() == at::kFloat);
      residual = taken ? contiguous(*given) : converted(*given, sum_type);
      residual_dtype = row_type(residual.scalar_type());
      sum.residual = residual.const_data_ptr();
    }
    if (scale) {
      sample_scale = converted(*scale, at::kDouble);
      sum.sample_scale = sample_scale.const_data_ptr<double>();
      sum.rows_per_sample = rows / scale->numel();
    }
    sum.dropout = seed ? dropout_of(seed->const_data_ptr<int64_t>(), p) : Dropout{nullptr, 0, 1.0};
  }
};

// Weight or bias as kernels read it. Keeps its copy alive.
struct HeldVector {
  at::Tensor tensor;
  RowVector get(const MaybeTensor& t) {
    if (!t) return {nullptr, DType::Float};
    tensor = contiguous(*t);
    return {const_cast<void*>(tensor.const_data_ptr()), row_type(tensor.scalar_type())};
  }
};

void* data_or_null(const MaybeTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }

RowNormResult row_norm_forward(const RowNormForwardCall& given) {
  check_row_norm(given);
  const at::Tensor& x = given.input;
  const at::TensorOptions options = x.options();
  int64_t width = 1;
  for (int64_t size : given.normalized) width *= size;
  const int64_t rows = width ? x.numel() / width : 0;
  const Sizes stats = {rows, kKeptOfRow};
  const at::TensorOptions stats_options = options.dtype(row_compute_type(x.scalar_type()));
  const bool is_input =
      !given.residual && !given.sample_scale && !given.seed && given.sum_type == x.scalar_type();
  RowNormResult result;
  if (x.numel() == 0) {
    if (given.normalises) {
      result.output = at::empty(x.sizes(), options);
      result.stats = at::empty(stats, stats_options);
    }
    if (given.keeps_sum && !is_input)
      result.sum = at::empty(x.sizes(), options.dtype(given.sum_type));
    return result;
  }
  const at::Tensor like = contiguous(x);
  if (given.normalises) {
    result.output = empty_strided_on_device(like.sizes(), like.strides(), options);
    result.stats = empty_on_device(stats, stats_options);
  }
  if (given.keeps_sum && !is_input)
    result.sum =
        empty_strided_on_device(like.sizes(), like.strides(), options.dtype(given.sum_type));

  const RowAddends addends(x.scalar_type(), like, given.residual, given.sample_scale, given.seed,
                           given.p, rows, given.sum_type);
  HeldVector weight, bias;
  RowNormForward call;
  call.shape = {rows, width, row_type(x.scalar_type()), addends.residual_dtype,
                row_type(given.sum_type)};
  call.addends = addends.sum;
  call.centred = given.centred;
  call.eps = given.eps;
  call.weight = weight.get(given.weight);
  call.weight_offset = given.weight_offset;
  call.bias = bias.get(given.bias);
  call.sum = data_or_null(result.sum);
  call.output = data_or_null(result.output);
  call.stats = data_or_null(result.stats);
  run_on(
      x.device(), [&] { cpu::row_norm_forward(call); },
      [&](Stream stream) { cuda::row_norm_forward(call, stream); });
  return result;
}

// The tensor that has the shape of all gradients but those of weight and bias.
const at::Tensor& given_gradient(const RowNormBackwardCall& call) {
  return call.grad_output ? *call.grad_output : *call.grad_sum;
}

int64_t row_width(const RowNormBackwardCall& call) {
  const at::IntArrayRef sizes = given_gradient(call).sizes();
  int64_t width = 1;
  for (int64_t size : sizes.slice(sizes.size() - static_cast<size_t>(call.dims))) width *= size;
  return width;
}

void check_row_stats(const RowNormBackwardCall& call, int64_t rows) {
  const char* const op = call.op;
  if (!call.stats)
    fail<std::invalid_argument>(op, ": stats must be kept for grad_output, got None");
  const at::Tensor& stats = *call.stats;
  check_memory(op, "stats", stats);
  check_device(op, "stats", stats, *call.grad_output);
  if (stats.dim() != 2 || stats.size(0) != rows || stats.size(1) != kKeptOfRow ||
      !stats.is_contiguous() || stats.scalar_type() != row_compute_type(call.type))
    fail<std::invalid_argument>(op, ": stats must be [", rows, ", ", static_cast<int>(kKeptOfRow),
                                "] of the forward, got ", stats.sizes(), " of ",
                                stats.scalar_type());
}

void check_row_norm_backward(const RowNormBackwardCall& call) {
  const char* const op = call.op;
  if (!call.grad_output && !call.grad_sum)
    fail<std::invalid_argument>(op, ": grad_output or grad_sum must be given, got None");
  const at::Tensor& g = given_gradient(call);
  check_like(op, "grad_output", call.grad_output, g, g.sizes());
  check_like(op, "grad_sum", call.grad_sum, g, g.sizes());
  if (call.dims < 1 || call.dims > g.dim())
    fail<std::invalid_argument>(op, ": dims must lie between 1 and ", g.dim(), ", got ", call.dims);
  const int64_t width = row_width(call), rows = width ? g.numel() / width : 0;
  check_like(op, "sum", call.sum, g, g.sizes());
  check_like(op, "input", call.input, g, g.sizes());
  check_like(op, "residual", call.residual, g, g.sizes());
  if (call.grad_output) {
    if (call.grad_output->scalar_type() != call.type)
      fail<TypeError>(op, ": grad_output must be of input's dtype ", call.type, ", got ",
                      call.grad_output->scalar_type());
    if (!call.sum && !call.input)
      fail<std::invalid_argument>(op, ": input must be kept where the sum is not, got None");
    check_row_stats(call, rows);
  }
  const at::IntArrayRef normalized = g.sizes().slice(g.sizes().size() - call.dims);
  check_like(op, "weight", call.weight, g, normalized);
  check_like(op, "bias", call.bias, g, normalized);
  check_sample_scale(op, call.sample_scale, g, g.dim() - call.dims);
  check_seed(op, call.seed, g, call.p);
  check_sum_type(op, call.type, call.sum_type);
  for (const MaybeTensor& t : {call.sum, call.grad_sum})
    if (t && t->scalar_type() != call.sum_type)
      fail<TypeError>(op, ": sum and its gradient must be of ", call.sum_type, ", got ",
                      t->scalar_type());
}

// The gradients that are wanted.
RowNormGradients row_norm_backward(const RowNormBackwardCall& given, std::array<bool, 4> wanted) {
  check_row_norm_backward(given);
  const at::Tensor& g = given_gradient(given);
  const at::TensorOptions options = g.options().dtype(given.type);
  if (!given.grad_output) wanted[2] = wanted[3] = false;
  RowNormGradients grads;
  if (g.numel() == 0) {
    if (wanted[0]) grads.input = at::empty(g.sizes(), options);
    if (wanted[1] && given.has_residual)
      grads.residual = at::empty(g.sizes(), options.dtype(given.residual_type));
    if (wanted[2] && given.weight)
      grads.weight = at::zeros(given.weight->sizes(), given.weight->options());
    if (wanted[3] && given.bias) grads.bias = at::zeros(given.bias->sizes(), given.bias->options());
    return grads;
  }
  const int64_t width = row_width(given), rows = g.numel() / width;
  at::Tensor grad_output, grad_sum, sum;
  if (given.grad_output) grad_output = contiguous(*given.grad_output);
  if (given.grad_sum) grad_sum = contiguous(*given.grad_sum);
  if (given.sum && given.grad_output) sum = contiguous(*given.sum);
  const RowAddends addends(given.type, given.input, given.residual, given.sample_scale, given.seed,
                           given.p, rows, given.sum_type);
  HeldVector weight;
  RowNormBackward call;
  const bool taken = given.residual_type == given.type ||
                     (has_16_bits(given.type) && given.residual_type == at::kFloat);
  const at::ScalarType residual_type = taken ? given.residual_type : given.sum_type;
  call.shape = {rows, width, row_type(given.type), row_type(residual_type),
                row_type(given.sum_type)};
  call.addends = addends.sum;
  call.centred = given.centred;
  call.weight = weight.get(given.weight);
  call.weight_offset = given.weight_offset;
  call.sum = sum.defined() ? sum.const_data_ptr() : nullptr;
  call.stats = given.stats ? given.stats->const_data_ptr() : nullptr;
  call.grad_output = grad_output.defined() ? grad_output.const_data_ptr() : nullptr;
  call.grad_sum = grad_sum.defined() ? grad_sum.const_data_ptr() : nullptr;

  const bool passes =
      !given.sample_scale && !given.seed && (!given.has_residual || residual_type == given.type);
  const auto empty = [&](at::ScalarType type) {
    const at::Tensor& like = grad_output.defined() ? grad_output : grad_sum;
    return empty_strided_on_device(like.sizes(), like.strides(), options.dtype(type));
  };
  if (wanted[0]) grads.input = empty(given.type);
  if (wanted[1] && given.has_residual) {
    if (passes && grads.input)
      grads.residual = grads.input;
    else
      grads.residual = empty(residual_type);
  }
  call.grad_input = data_or_null(grads.input);
  call.grad_residual = passes && grads.input ? nullptr : data_or_null(grads.residual);
  const auto vector = [&](bool is_wanted, const MaybeTensor& t, MaybeTensor& grad) {
    if (!is_wanted || !t) return RowVector{nullptr, DType::Float};
    grad = empty_on_device(t->sizes(), t->options());
    return RowVector{grad->mutable_data_ptr(), row_type(t->scalar_type())};
  };
  call.grad_weight = vector(wanted[2], given.weight, grads.weight);
  call.grad_bias = vector(wanted[3], given.bias, grads.bias);
  if (!grads.input && !grads.residual && !grads.weight && !grads.bias) return grads;
  run_on(
      g.device(), [&] { cpu::row_norm_backward(call); },
      [&](Stream stream) {
        const at::Tensor scratch = scratch_on(g.device(), cuda::row_norm_scratch_bytes(call.shape));
        cuda::row_norm_backward(call, scratch.mutable_data_ptr(), stream);
      });
  if (grads.residual && residual_type != given.residual_type)
    grads.residual = converted(*grads.residual, given.residual_type);
  return grads;
}

// Reads the number of a RowNorm into name and kind.
template <class Call>
void read_op(Call& call, int code) {
  if (code < 0 || code >= kRowNorms)
    fail<std::invalid_argument>("row_norm: op must be 0 to ", kRowNorms - 1, ", got ", code);
  call.op = kRowNormNames[code];
  call.centred = code <= static_cast<int>(RowNorm::AddLayerNorm);
}

// (output, sum, stats); None for a sum that is not kept or is the input, and without a norm.
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> row_norm_forward_(RowNormCallArg given) {
  GRADFUSE_EVENT("gradfuse::row_norm");
  Fields fields("RowNormCall", given.object, 13);
  RowNormForwardCall call = {};
  const int code = fields.next_as<int>();
  read_op(call, code);
  call.normalises = code != static_cast<int>(RowNorm::DropoutAdd);
  const char* const op = call.op;
  call.input = tensor_of(op, "input", fields.next());
  call.residual = maybe_tensor(op, "residual", fields.next());
  call.weight = maybe_tensor(op, "weight", fields.next());
  call.bias = maybe_tensor(op, "bias", fields.next());
  call.sample_scale = maybe_tensor(op, "sample_scale", fields.next());
  call.seed = maybe_tensor(op, "seed", fields.next());
  for (py::handle size : sequence_of(op, "normalized_shape", fields.next()))
    call.normalized.push_back(size.cast<int64_t>());
  call.p = fields.next_as<double>();
  call.eps = fields.next_as<double>();
  call.weight_offset = fields.next_as<double>();
  call.sum_type = fields.next_as<at::ScalarType>();
  call.keeps_sum = fields.next_as<bool>();
  const py::gil_scoped_release release;
  RowNormResult result = row_norm_forward(call);
  return {std::move(result.output), std::move(result.sum), std::move(result.stats)};
}

// grad_input, grad_residual, grad_weight, grad_bias; None where not wanted. The first two may be
// one tensor.
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor> row_norm_backward_(
    OptionalTensorArg grad_output, OptionalTensorArg grad_sum, RowNormSavedArg saved,
    RowNormOptionsArg options, WantedArg wants) {
  GRADFUSE_EVENT("gradfuse::row_norm_backward");
  RowNormBackwardCall call = {};
  Fields fields("RowNormOptions", options.object, 8);
  read_op(call, fields.next_as<int>());
  call.p = fields.next_as<double>();
  fields.next();  // eps, which the statistics hold
  call.weight_offset = fields.next_as<double>();
  call.dims = fields.next_as<int64_t>();
  call.type = fields.next_as<at::ScalarType>();
  const py::handle residual_type = fields.next();
  call.sum_type = fields.next_as<at::ScalarType>();
  call.has_residual = !residual_type.is_none();
  call.residual_type = call.has_residual ? residual_type.cast<at::ScalarType>() : call.sum_type;
  const char* const op = call.op;
  call.grad_output = maybe_tensor(op, "grad_output", grad_output.object);
  call.grad_sum = maybe_tensor(op, "grad_sum", grad_sum.object);
  Fields tensors("RowNormSaved", saved.object, 8);
  call.sum = maybe_tensor(op, "sum", tensors.next());
  call.input = maybe_tensor(op, "input", tensors.next());
  call.residual = maybe_tensor(op, "residual", tensors.next());
  call.weight = maybe_tensor(op, "weight", tensors.next());
  call.bias = maybe_tensor(op, "bias", tensors.next());
  call.sample_scale = maybe_tensor(op, "sample_scale", tensors.next());
  call.seed = maybe_tensor(op, "seed", tensors.next());
  call.stats = maybe_tensor(op, "stats", tensors.next());
  const auto wanted = wants.object.cast<std::array<bool, 4>>();
  const py::gil_scoped_release release;
  RowNormGradients grads = row_norm_backward(call, wanted);
  return {std::move(grads.input), std::move(grads.residual), std::move(grads.weight),
          std::move(grads.bias)};
}

}  // namespace

void bind_row_norm(py::module_& m) {
  add_codes(m, "RowNorm",
            {{"LAYER_NORM", static_cast<int>(RowNorm::LayerNorm)},
             {"ADD_LAYER_NORM", static_cast<int>(RowNorm::AddLayerNorm)},
             {"RMS_NORM", static_cast<int>(RowNorm::RmsNorm)},
             {"ADD_RMS_NORM", static_cast<int>(RowNorm::AddRmsNorm)},
             {"DROPOUT_ADD", static_cast<int>(RowNorm::DropoutAdd)}});
  m.def("row_norm_forward", &row_norm_forward_, py::arg("call"));
  m.def("row_norm_backward", &row_norm_backward_, py::arg("grad_output"), py::arg("grad_sum"),
        py::arg("saved"), py::arg("options"), py::arg("wanted"));
}

}  // namespace gradfuse
