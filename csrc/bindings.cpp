#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/Parallel.h>

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
  py::class_<ParameterList>(m, "ParameterList")
      .def(py::init<>())
      .def("add", &ParameterList::add, py::arg("parameter"))
      .def("clip_", &ParameterList::clip_, py::arg("max_norm"), py::arg("norm_type"),
           py::arg("nonfinite"));
}
