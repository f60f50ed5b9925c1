#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/Parallel.h>

#include "batch_norm.h"
#include "checks.h"
#include "clip.h"

namespace py = pybind11;

namespace gradfuse {
namespace {

using ResultTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ResultTuple as_tuple(ClipResult&& r) {
  return {std::move(r.norm), std::move(r.totals), std::move(r.table)};
}

NonFinite policy_of(int code) {
  if (code < 0 || code > 2)
    fail<std::invalid_argument>("nonfinite: expected 0, 1 or 2, got ", code);
  return static_cast<NonFinite>(code);
}

ResultTuple stats(py::handle tensors, bool of_grad, double norm_type, int nonfinite) {
  const char* op = "get_total_norm";
  const GradList list = check_gradients(op, read_tensors(op, tensors.ptr(), of_grad), false);
  const py::gil_scoped_release release;
  return as_tuple(grad_stats(op, list, norm_spec(norm_type), policy_of(nonfinite)));
}

ResultTuple clip_tensors(std::vector<at::Tensor> tensors, double max_norm, double norm_type,
                         int nonfinite) {
  const char* op = "clip_grad_norm_";
  GradList list = check_gradients(op, std::move(tensors), true);
  const py::gil_scoped_release release;
  return as_tuple(clip_by_norm(op, list, max_norm, norm_spec(norm_type), policy_of(nonfinite)));
}

ResultTuple clip_(py::handle tensors, bool of_grad, double max_norm, double norm_type,
                  int nonfinite) {
  return clip_tensors(read_tensors("clip_grad_norm_", tensors.ptr(), of_grad), max_norm, norm_type,
                      nonfinite);
}

// The tensor that a Python argument is. Not pybind11's cast, which believes what isinstance
// believes.
at::Tensor tensor_of(const char* op, const char* name, py::handle object) {
  if (!is_tensor(object.ptr()))
    fail<TypeError>(op, ": ", name, " must be a Tensor, got ", Py_TYPE(object.ptr())->tp_name);
  return THPVariable_Unpack(object.ptr());
}

void scale_(py::handle tensors, bool of_grad, double max_norm, py::handle norm) {
  const char* op = "clip_grads_with_norm_";
  const at::Tensor total_norm = tensor_of(op, "total_norm", norm);
  GradList list = check_gradients(op, read_tensors(op, tensors.ptr(), of_grad), true);
  const py::gil_scoped_release release;
  scale_by_norm(list, max_norm, total_norm);
}

void clamp_(py::handle tensors, bool of_grad, double clip_value) {
  const char* op = "clip_grad_value_";
  std::vector<at::Tensor> grads = read_tensors(op, tensors.ptr(), of_grad);
  for (size_t i = 0; i < grads.size(); ++i)
    if (grads[i].defined() && grads[i].is_complex())
      fail<TypeError>(op, ": expected real gradients, which have an order, got ",
                      grads[i].scalar_type(), " for tensor ", i);
  GradList list = check_gradients(op, std::move(grads), true);
  const py::gil_scoped_release release;
  clip_by_value(list, clip_value);
}

void adaptive_clip_(py::handle weights, py::handle grads, double clip_factor, double eps,
                    double norm_type) {
  const char* op = "adaptive_clip_grad_";
  UnitList list = check_units(op, read_tensors(op, weights.ptr(), false),
                              grads.is_none() ? read_tensors(op, weights.ptr(), true)
                                              : read_tensors(op, grads.ptr(), false));
  const py::gil_scoped_release release;
  clip_adaptively(list, clip_factor, eps, norm_spec(norm_type));
}

MaybeTensor maybe_tensor(const char* name, py::handle object) {
  if (object.is_none()) return std::nullopt;
  return tensor_of("batch_norm_act", name, object);
}

ResultTuple batch_norm_forward_(py::handle input, py::handle residual, py::handle weight,
                                py::handle bias, py::handle running_mean, py::handle running_var,
                                bool training, py::handle momentum, double eps, int activation,
                                double negative_slope, bool wants_mask) {
  const at::Tensor x = tensor_of("batch_norm_act", "input", input);
  const MaybeTensor r = maybe_tensor("residual", residual);
  const MaybeTensor w = maybe_tensor("weight", weight), b = maybe_tensor("bias", bias);
  const MaybeTensor mean = maybe_tensor("running_mean", running_mean);
  const MaybeTensor var = maybe_tensor("running_var", running_var);
  MaybeTensor momentum_value;
  double momentum_number = 0.0;
  if (is_tensor(momentum.ptr()))
    momentum_value = THPVariable_Unpack(momentum.ptr());
  else
    momentum_number = momentum.cast<double>();
  const BatchNormOptions options = {training, eps, static_cast<Activation>(activation),
                                    negative_slope};
  const py::gil_scoped_release release;
  BatchNormResult result = batch_norm_forward(x, r, w, b, mean, var, momentum_number,
                                              momentum_value, options, wants_mask);
  return {std::move(result.output), std::move(result.mask), std::move(result.stats)};
}

// grad_input, grad_residual, grad_weight, grad_bias; None where not wanted.
py::tuple batch_norm_backward_(py::handle grad_output, py::handle input, py::handle residual,
                               py::handle output, py::handle mask, py::handle weight,
                               py::handle bias, py::handle stats, bool channels_last, bool training,
                               double eps, int activation, double negative_slope, bool wants_input,
                               bool wants_residual, bool wants_weight, bool wants_bias) {
  const at::Tensor g = tensor_of("batch_norm_act", "grad_output", grad_output);
  const MaybeTensor x = maybe_tensor("input", input), r = maybe_tensor("residual", residual);
  const MaybeTensor y = maybe_tensor("output", output), m = maybe_tensor("mask", mask);
  const MaybeTensor w = maybe_tensor("weight", weight), b = maybe_tensor("bias", bias);
  const at::Tensor s = tensor_of("batch_norm_act", "stats", stats);
  const BatchNormOptions options = {training, eps, static_cast<Activation>(activation),
                                    negative_slope};
  BatchNormGradients grads;
  {
    const py::gil_scoped_release release;
    grads = batch_norm_backward(g, x, r, y, m, w, b, s, channels_last, options,
                                {wants_input, wants_residual, wants_weight, wants_bias});
  }
  const auto or_none = [](at::Tensor& t) -> py::object {
    return t.defined() ? py::cast(std::move(t)) : py::none();
  };
  return py::make_tuple(or_none(grads.input), or_none(grads.residual), or_none(grads.weight),
                        or_none(grads.bias));
}

// Parameters held between calls, so that a call walks no Python list.
class ParameterList {
 public:
  void add(py::handle parameter) {
    parameters_.push_back(tensor_of("GradClipper.add", "parameter", parameter));
  }
  ResultTuple clip_(double max_norm, double norm_type, int nonfinite) const {
    std::vector<at::Tensor> grads;
    grads.reserve(parameters_.size());
    for (const at::Tensor& p : parameters_) grads.push_back(p.unsafeGetTensorImpl()->grad());
    return clip_tensors(std::move(grads), max_norm, norm_type, nonfinite);
  }

 private:
  std::vector<at::Tensor> parameters_;
};

}  // namespace
}  // namespace gradfuse

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace gradfuse;
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const TypeError& e) { PyErr_SetString(PyExc_TypeError, e.what()); }
  });
  m.attr("torch_version") = GRADFUSE_TORCH_VERSION;
  m.attr("cuda_version") = GRADFUSE_CUDA_VERSION;
  m.attr("cuda_archs") = GRADFUSE_CUDA_ARCHS;
  m.attr("compiler") = __VERSION__;
  m.def("isa", &cpu::isa);
  m.def("num_threads", [] { return at::get_num_threads(); });
  m.def("stats", &stats, py::arg("tensors"), py::arg("of_grad"), py::arg("norm_type"),
        py::arg("nonfinite"));
  m.def("clip_", &clip_, py::arg("tensors"), py::arg("of_grad"), py::arg("max_norm"),
        py::arg("norm_type"), py::arg("nonfinite"));
  m.def("scale_", &scale_, py::arg("tensors"), py::arg("of_grad"), py::arg("max_norm"),
        py::arg("total_norm"));
  m.def("clamp_", &clamp_, py::arg("tensors"), py::arg("of_grad"), py::arg("clip_value"));
  m.def("adaptive_clip_", &adaptive_clip_, py::arg("weights"), py::arg("grads"),
        py::arg("clip_factor"), py::arg("eps"), py::arg("norm_type"));
  m.def("batch_norm_forward", &batch_norm_forward_, py::arg("input"), py::arg("residual"),
        py::arg("weight"), py::arg("bias"), py::arg("running_mean"), py::arg("running_var"),
        py::arg("training"), py::arg("momentum"), py::arg("eps"), py::arg("activation"),
        py::arg("negative_slope"), py::arg("wants_mask"));
  m.def("batch_norm_backward", &batch_norm_backward_, py::arg("grad_output"), py::arg("input"),
        py::arg("residual"), py::arg("output"), py::arg("mask"), py::arg("weight"), py::arg("bias"),
        py::arg("stats"), py::arg("channels_last"), py::arg("training"), py::arg("eps"),
        py::arg("activation"), py::arg("negative_slope"), py::arg("wants_input"),
        py::arg("wants_residual"), py::arg("wants_weight"), py::arg("wants_bias"));
  py::class_<ParameterList>(m, "ParameterList")
      .def(py::init<>())
      .def("add", &ParameterList::add, py::arg("parameter"))
      .def("clip_", &ParameterList::clip_, py::arg("max_norm"), py::arg("norm_type"),
           py::arg("nonfinite"));
}
