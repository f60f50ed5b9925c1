#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/Parallel.h>

#include "batch_norm.h"
#include "checks.h"
#include "clip.h"
#include "stepper.h"

namespace py = pybind11;

namespace gradfuse {
namespace {

using ResultTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ResultTuple as_tuple(ClipResult&& r) {
  return {std::move(r.norm), std::move(r.totals), std::move(r.table)};
}

NonFinite policy_of(int code) {
  if (code < 0 || code > 3) fail<std::invalid_argument>("nonfinite: expected 0 to 3, got ", code);
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

MaybeTensor maybe_tensor(const char* op, const char* name, py::handle object) {
  if (object.is_none()) return std::nullopt;
  return tensor_of(op, name, object);
}

void adaptive_clip_(py::handle weights, py::handle grads, double clip_factor, double eps,
                    double norm_type, py::handle scale) {
  const char* op = "adaptive_clip_grad_";
  const MaybeTensor value = maybe_tensor(op, "scale", scale);
  UnitList list = check_units(op, read_tensors(op, weights.ptr(), false),
                              grads.is_none() ? read_tensors(op, weights.ptr(), true)
                                              : read_tensors(op, grads.ptr(), false));
  const py::gil_scoped_release release;
  clip_adaptively(list, clip_factor, eps, norm_spec(norm_type), value);
}

MaybeTensor maybe_tensor(const char* name, py::handle object) {
  return maybe_tensor("batch_norm_act", name, object);
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

// Float64 and contiguous, as the kernels read them.
at::Tensor checked_vector(const char* op, const char* name, py::handle object, int64_t numel) {
  const at::Tensor t = tensor_of(op, name, object);
  if (t.scalar_type() != at::kDouble || t.numel() != numel || !t.is_contiguous())
    fail<std::invalid_argument>(op, ": ", name, " must be ", numel, " numbers of float64, got ",
                                t.sizes(), " of ", t.scalar_type());
  return t;
}
at::Tensor checked_totals(const char* op, py::handle totals) {
  return checked_vector(op, "totals", totals, kTotals);
}
MaybeTensor checked_coefficients(const char* op, py::handle object, size_t rows) {
  if (object.is_none()) return std::nullopt;
  return checked_vector(op, "coefficients", object, static_cast<int64_t>(rows));
}

// Stepper, with the checks of Python's arguments.
class PyStepper {
 public:
  explicit PyStepper(int rule) : rule_(rule), stepper_(static_cast<Rule>(rule)) {
    if (rule != 0 && rule != 1)
      fail<std::invalid_argument>("Stepper: rule must be 0 or 1, got ", rule);
  }
  bool holds(py::list groups, py::dict state, const std::vector<int>& needs) const {
    check_count(groups, needs.size());
    return stepper_.holds(groups.ptr(), state.ptr(), needs);
  }
  void hold(py::list groups, py::dict state, const std::vector<int>& needs) {
    check_count(groups, needs.size());
    stepper_.hold(groups.ptr(), state.ptr(), needs);
    groups_ = groups.size();
  }
  std::vector<at::Tensor> parameters() const { return stepper_.parameters(); }
  ResultTuple measure(double max_norm, int nonfinite, py::handle scale,
                      py::handle found_inf) const {
    const LossScaleTensors given = scale_of(scale, found_inf);
    const NonFinite policy = policy_of(nonfinite);
    const py::gil_scoped_release release;
    return as_tuple(stepper_.measure(max_norm, policy, given));
  }
  ResultTuple step(py::list groups, double max_norm, int nonfinite, py::handle scale,
                   py::handle found_inf, bool update_clip, bool stochastic_rounding,
                   bool materialize) {
    const LossScaleTensors given = scale_of(scale, found_inf);
    const NonFinite policy = policy_of(nonfinite);
    const auto [options, lrs] = options_of(groups);
    const py::gil_scoped_release release;
    return as_tuple(stepper_.step(options, lrs, max_norm, policy, given,
                                  {INFINITY, update_clip, stochastic_rounding, materialize}));
  }
  void update(py::list groups, py::handle totals, py::handle coefficients, double bound,
              bool update_clip, bool stochastic_rounding, bool materialize) {
    const auto [options, lrs] = options_of(groups);
    MaybeTensor plan;
    if (!totals.is_none()) plan = checked_totals(kOp, totals);
    const MaybeTensor each = checked_coefficients(kOp, coefficients, stepper_.size());
    const py::gil_scoped_release release;
    stepper_.update(options, lrs, plan, each,
                    {bound, update_clip, stochastic_rounding, materialize});
  }

 private:
  static constexpr const char* kOp = "step";

  static LossScaleTensors scale_of(py::handle scale, py::handle found_inf) {
    const LossScaleTensors given = {maybe_tensor(kOp, "grad_scale", scale),
                                    maybe_tensor(kOp, "found_inf", found_inf)};
    for (const MaybeTensor& t : {given.scale, given.found_inf})
      if (t && t->numel() != 1)
        fail<std::invalid_argument>("step: grad_scale and found_inf must be one number, got ",
                                    t->sizes());
    return given;
  }
  // Each group is (lr, maximize, then the numbers of its rule); lr a number or a tensor of one.
  std::pair<std::vector<GroupOptions>, std::vector<MaybeTensor>> options_of(
      const py::list& groups) const {
    check_count(groups, groups_);
    std::vector<GroupOptions> options;
    std::vector<MaybeTensor> lrs;
    for (py::handle item : groups) {
      const py::tuple g = py::reinterpret_borrow<py::tuple>(item);
      GroupOptions o = {};
      MaybeTensor lr;
      if (is_tensor(g[0].ptr()))
        lr = tensor_of(kOp, "lr", g[0]).detach();
      else
        o.lr = g[0].cast<double>();
      o.maximize = g[1].cast<bool>();
      const auto number = [&](int i) { return g[2 + i].cast<double>(); };
      if (rule_ == 0)
        o.adamw = {number(0), number(1), number(2), number(3)};
      else
        o.sgd = {number(0), number(1), number(2), number(3) != 0.0};
      options.push_back(o);
      lrs.push_back(lr);
    }
    return {std::move(options), std::move(lrs)};
  }
  static void check_count(const py::list& groups, size_t expected) {
    if (groups.size() != expected)
      fail<std::invalid_argument>("Stepper: expected ", expected, " groups, got ", groups.size());
  }

  int rule_;
  size_t groups_ = 0;
  Stepper stepper_;
};

// Parameters held between calls, so that a call walks no Python list.
class ParameterList {
 public:
  void add(py::handle parameter) {
    parameters_.push_back(tensor_of("GradClipper.add", "parameter", parameter));
  }
  ResultTuple clip_(double max_norm, double norm_type, int nonfinite) const {
    return clip_tensors(gradients(), max_norm, norm_type, nonfinite);
  }
  // The norm, the totals and the table; nothing is clipped.
  ResultTuple measure(double max_norm, double norm_type, int nonfinite) const {
    const char* op = "GradClipper";
    const GradList list = check_gradients(op, gradients(), true);
    const py::gil_scoped_release release;
    return as_tuple(plan_step(op, list, max_norm, norm_spec(norm_type), policy_of(nonfinite), {}));
  }
  // Does what the totals say, times a coefficient for each parameter if given.
  void apply_(py::handle totals, py::handle coefficients) const {
    const char* op = "GradClipper";
    const at::Tensor plan = checked_totals(op, totals);
    const MaybeTensor each = checked_coefficients(op, coefficients, parameters_.size());
    GradList list = check_gradients(op, gradients(), true);
    const py::gil_scoped_release release;
    apply_totals(list, plan, each);
  }
  void clamp_(double clip_value) const {
    GradList list = check_gradients("GradClipper", gradients(), true);
    const py::gil_scoped_release release;
    clip_by_value(list, clip_value);
  }

 private:
  std::vector<at::Tensor> gradients() const {
    std::vector<at::Tensor> grads;
    grads.reserve(parameters_.size());
    for (const at::Tensor& p : parameters_) grads.push_back(p.unsafeGetTensorImpl()->grad());
    return grads;
  }
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
        py::arg("clip_factor"), py::arg("eps"), py::arg("norm_type"),
        py::arg("scale") = py::none());
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
           py::arg("nonfinite"))
      .def("measure", &ParameterList::measure, py::arg("max_norm"), py::arg("norm_type"),
           py::arg("nonfinite"))
      .def("apply_", &ParameterList::apply_, py::arg("totals"), py::arg("coefficients"))
      .def("clamp_", &ParameterList::clamp_, py::arg("clip_value"));
  py::class_<PyStepper>(m, "Stepper")
      .def(py::init<int>(), py::arg("rule"))
      .def("holds", &PyStepper::holds, py::arg("groups"), py::arg("state"), py::arg("needs"))
      .def("hold", &PyStepper::hold, py::arg("groups"), py::arg("state"), py::arg("needs"))
      .def("parameters", &PyStepper::parameters)
      .def("measure", &PyStepper::measure, py::arg("max_norm"), py::arg("nonfinite"),
           py::arg("scale"), py::arg("found_inf"))
      .def("step", &PyStepper::step, py::arg("groups"), py::arg("max_norm"), py::arg("nonfinite"),
           py::arg("scale"), py::arg("found_inf"), py::arg("update_clip"),
           py::arg("stochastic_rounding"), py::arg("materialize"))
      .def("update", &PyStepper::update, py::arg("groups"), py::arg("totals"),
           py::arg("coefficients"), py::arg("bound"), py::arg("update_clip"),
           py::arg("stochastic_rounding"), py::arg("materialize"));
}
