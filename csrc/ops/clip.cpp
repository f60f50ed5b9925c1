// Gradient clipping by norm and by value: checks, allocates, picks the device, binds.
#include "clip.h"

#include <torch/csrc/utils/object_ptr.h>

#include <string>
#include <utility>

#include "../tensor/checks.h"
#include "../tensor/dispatch.h"
#include "../tensor/event.h"
#include "../tensor/garbage.h"
#include "../tensor/python_args.h"
#include "measure.h"

namespace gradfuse {
namespace {

// The plan for a given norm, on the norm's device.
at::Tensor plan_for(const at::Tensor& total_norm, double max_norm) {
  const at::Tensor norm = converted(total_norm, at::kDouble);
  const at::Tensor plan = empty_on_device({kPlanFields}, norm.options());
  ClipPlan* const out = mutable_plan_in(plan);
  run_on(
      norm.device(),
      [&] {
        const double value = *norm.const_data_ptr<double>();
        *out = clip_plan({value, 0}, max_norm, NonFinite::Propagate);
        out->sum = {value, 0};
      },
      [&](Stream stream) { cuda::plan(norm.const_data_ptr<double>(), max_norm, out, stream); });
  return plan;
}

// Scales by min(1, max_norm / (total_norm + 1e-6)) unless total_norm <= max_norm.
void scale_by_norm(const char* op, GradList& grads, double max_norm, const at::Tensor& total_norm) {
  if (total_norm.numel() != 1 || !device_is_supported(total_norm.device().type()) ||
      total_norm.is_complex())
    fail<std::invalid_argument>(op, ": total_norm must be one real number, got ",
                                total_norm.sizes(), " of ", total_norm.scalar_type(), " on ",
                                total_norm.device());
  apply_plan(grads, plan_for(total_norm, max_norm), {});
}

void clamp_gradients(GradList& grads, double clip_value) {
  grads.prepare_write();
  for (const DeviceGroup& group : grads.groups)
    run_on(
        group.device, [&] { cpu::clamp(group.refs, clip_value); },
        [&](Stream stream) { cuda::clamp(group.refs, clip_value, stream); });
}

// One read; a second read and a write if the norm is above max_norm.
ClipTuple clip_tensors(std::vector<at::Tensor> tensors, const Measurement& m) {
  const char* op = "clip_grad_norm_";
  GradList list = check_gradients(op, std::move(tensors), Access::Write);
  const py::gil_scoped_release release;
  ClipResult result = measure_gradients(op, list, m);
  apply_plan(list, result.plan, {});
  return as_tuple(std::move(result));
}

ClipTuple stats(TensorsArg tensors, bool of_grad, double norm_type, int nonfinite, bool exact) {
  const char* op = "get_total_norm";
  GRADFUSE_EVENT("gradfuse::get_total_norm");
  const Measurement m = measurement_of(INFINITY, norm_type, nonfinite, exact);
  const GradList list = check_gradients(op, read_tensors(op, tensors, of_grad), Access::Read);
  const py::gil_scoped_release release;
  return as_tuple(measure_gradients(op, list, m));
}

ClipTuple clip_(TensorsArg tensors, bool of_grad, double max_norm, double norm_type, int nonfinite,
                bool exact) {
  GRADFUSE_EVENT("gradfuse::clip_grad_norm_");
  return clip_tensors(read_tensors("clip_grad_norm_", tensors, of_grad),
                      measurement_of(max_norm, norm_type, nonfinite, exact));
}

void scale_(TensorsArg tensors, bool of_grad, double max_norm, TensorArg total_norm) {
  const char* op = "clip_grads_with_norm_";
  GRADFUSE_EVENT("gradfuse::clip_grads_with_norm_");
  const at::Tensor norm = tensor_of(op, "total_norm", total_norm.object);
  GradList list = check_gradients(op, read_tensors(op, tensors, of_grad), Access::Write);
  const py::gil_scoped_release release;
  scale_by_norm(op, list, max_norm, norm);
}

void clamp_(TensorsArg tensors, bool of_grad, double clip_value) {
  const char* op = "clip_grad_value_";
  GRADFUSE_EVENT("gradfuse::clip_grad_value_");
  std::vector<at::Tensor> grads = read_tensors(op, tensors, of_grad);
  for (size_t i = 0; i < grads.size(); ++i)
    if (grads[i].defined() && grads[i].is_complex())
      fail<TypeError>(op, ": expected real gradients, which have an order, got ",
                      grads[i].scalar_type(), " for tensor ", i);
  GradList list = check_gradients(op, std::move(grads), Access::Write);
  const py::gil_scoped_release release;
  clamp_gradients(list, clip_value);
}

// The norm over several ranks, and what it says of their gradients.
std::pair<at::Tensor, at::Tensor> plan_of_ranks(const std::string& op, TensorArg sums, bool wide,
                                                double max_norm, double norm_type, int nonfinite,
                                                OptionalTensorArg scale) {
  const at::Tensor given = tensor_of(op.c_str(), "sums", sums.object);
  if (given.dim() != 2 || given.size(1) != kRankSumFields || given.scalar_type() != at::kDouble)
    fail<std::invalid_argument>(op, ": sums must be float64 [ranks, ", kRankSumFields, "], got ",
                                given.scalar_type(), " ", given.sizes());
  Measurement m = measurement_of(max_norm, norm_type, nonfinite, false);
  m.scale.scale = maybe_tensor(op.c_str(), "scale", scale.object);
  return plan_of_rank_sums(op.c_str(), given, wide, m);
}

// The exact sum of squares of one rank, and the statistics of its gradients.
std::pair<at::Tensor, at::Tensor> limbs_of_rank(const std::string& op, TensorsArg tensors,
                                                bool written) {
  const GradList list = check_gradients(op.c_str(), read_tensors(op.c_str(), tensors, false),
                                        written ? Access::Write : Access::Read);
  const py::gil_scoped_release release;
  return exact_limbs(list);
}

// The norm for the exact sums of several ranks, added up.
std::pair<at::Tensor, at::Tensor> plan_of_limbs_of_ranks(const std::string& op, TensorArg limbs,
                                                         bool wide, double max_norm, int nonfinite,
                                                         OptionalTensorArg scale,
                                                         OptionalTensorArg found_inf) {
  Measurement m = measurement_of(max_norm, 2.0, nonfinite, true);
  m.scale = {maybe_tensor(op.c_str(), "scale", scale.object),
             maybe_tensor(op.c_str(), "found_inf", found_inf.object)};
  return plan_of_exact_limbs(op.c_str(), tensor_of(op.c_str(), "limbs", limbs.object), wide, m);
}

// Does what the plan says, times a coefficient for each tensor if given.
void apply_(const std::string& op, TensorsArg tensors, TensorArg plan,
            OptionalTensorArg coefficients) {
  const at::Tensor given = checked_vector(op.c_str(), "plan", plan.object, kPlanFields);
  std::vector<at::Tensor> grads = read_tensors(op.c_str(), tensors, false);
  const MaybeTensor each = maybe_vector(op.c_str(), "coefficients", coefficients.object,
                                        static_cast<int64_t>(grads.size()));
  GradList list = check_gradients(op.c_str(), std::move(grads), Access::Write);
  const py::gil_scoped_release release;
  apply_plan(list, given, each);
}

// Parameters held between calls, so that a call walks no Python list. They are held as objects,
// as HeldParams does.
class ParameterList {
 public:
  int traverse(visitproc visit, void* arg) const {
    for (const THPObjectPtr& p : parameters_) Py_VISIT(const_cast<PyObject*>(p.get()));
    return 0;
  }
  void clear() { const auto gone = std::move(parameters_); }

  void add(TensorArg parameter) {
    tensor_of("GradClipper.add", "parameter", parameter.object);
    unpack_ = Unpacker(parameter.object);
    parameters_.emplace_back(parameter.object.inc_ref().ptr());
  }
  ClipTuple clip_(double max_norm, double norm_type, int nonfinite, bool exact) const {
    GRADFUSE_EVENT("gradfuse::GradClipper.clip_");
    return clip_tensors(gradients(), measurement_of(max_norm, norm_type, nonfinite, exact));
  }
  // Norm, plan and statistics; nothing is clipped.
  ClipTuple measure(double max_norm, double norm_type, int nonfinite, bool exact) const {
    const Measurement m = measurement_of(max_norm, norm_type, nonfinite, exact);
    const GradList list = check_gradients(kOp, gradients(), Access::ReadOnce);
    const py::gil_scoped_release release;
    return as_tuple(measure_gradients(kOp, list, m));
  }
  // Does what the plan says, times a coefficient for each parameter if given.
  void apply_(TensorArg plan, OptionalTensorArg coefficients) const {
    GRADFUSE_EVENT("gradfuse::GradClipper.clip_");
    const at::Tensor given = checked_vector(kOp, "plan", plan.object, kPlanFields);
    const MaybeTensor each = maybe_vector(kOp, "coefficients", coefficients.object,
                                          static_cast<int64_t>(parameters_.size()));
    GradList list = check_gradients(kOp, gradients(), Access::Write);
    const py::gil_scoped_release release;
    apply_plan(list, given, each);
  }
  void clamp_(double clip_value) const {
    GradList list = check_gradients(kOp, gradients(), Access::Write);
    const py::gil_scoped_release release;
    clamp_gradients(list, clip_value);
  }

 private:
  static constexpr const char* kOp = "GradClipper";

  std::vector<at::Tensor> gradients() const {
    // A THPObjectPtr is a pointer.
    static_assert(sizeof(THPObjectPtr) == sizeof(PyObject*));
    const auto* const objects = reinterpret_cast<const PyObject* const*>(parameters_.data());
    return tensors_of(objects, parameters_.size(), unpack_, true);
  }
  std::vector<THPObjectPtr> parameters_;
  Unpacker unpack_;
};

}  // namespace

void bind_clip(py::module_& m) {
  add_codes(m, "NonFinite",
            {{"PROPAGATE", static_cast<int>(NonFinite::Propagate)},
             {"ERROR", static_cast<int>(NonFinite::Error)},
             {"ZERO", static_cast<int>(NonFinite::Zero)},
             {"SKIP", static_cast<int>(NonFinite::Skip)}});
  add_codes(m, "Action",
            {{"KEEP", static_cast<int>(Action::Keep)},
             {"SCALE", static_cast<int>(Action::Scale)},
             {"ZERO", static_cast<int>(Action::Zero)},
             {"REFUSE", static_cast<int>(Action::Refuse)},
             {"SKIP", static_cast<int>(Action::Skip)}});
  m.def("stats", &stats, py::arg("tensors"), py::arg("of_grad"), py::arg("norm_type"),
        py::arg("nonfinite"), py::arg("exact") = false);
  m.def("clip_", &clip_, py::arg("tensors"), py::arg("of_grad"), py::arg("max_norm"),
        py::arg("norm_type"), py::arg("nonfinite"), py::arg("exact") = false);
  m.def("scale_", &scale_, py::arg("tensors"), py::arg("of_grad"), py::arg("max_norm"),
        py::arg("total_norm"));
  m.def("plan_of_sums", &plan_of_ranks, py::arg("op"), py::arg("sums"), py::arg("wide"),
        py::arg("max_norm"), py::arg("norm_type"), py::arg("nonfinite"), py::arg("scale"));
  m.def("exact_limbs", &limbs_of_rank, py::arg("op"), py::arg("tensors"), py::arg("written"));
  m.def("exact_plan", &plan_of_limbs_of_ranks, py::arg("op"), py::arg("limbs"), py::arg("wide"),
        py::arg("max_norm"), py::arg("nonfinite"), py::arg("scale"),
        py::arg("found_inf") = py::none());
  m.def("apply_", &apply_, py::arg("op"), py::arg("tensors"), py::arg("plan"),
        py::arg("coefficients") = py::none());
  m.def("clamp_", &clamp_, py::arg("tensors"), py::arg("of_grad"), py::arg("clip_value"));
  py::class_<ParameterList>(m, "ParameterList", collects_garbage<ParameterList>())
      .def(py::init<>())
      .def("add", &ParameterList::add, py::arg("parameter"))
      .def("clip_", &ParameterList::clip_, py::arg("max_norm"), py::arg("norm_type"),
           py::arg("nonfinite"), py::arg("exact") = false)
      .def("measure", &ParameterList::measure, py::arg("max_norm"), py::arg("norm_type"),
           py::arg("nonfinite"), py::arg("exact") = false)
      .def("apply_", &ParameterList::apply_, py::arg("plan"), py::arg("coefficients"))
      .def("clamp_", &ParameterList::clamp_, py::arg("clip_value"));
}

}  // namespace gradfuse
