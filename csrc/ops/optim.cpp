// The optimizers' step: reads Python's arguments, binds.
#include "optim.h"

#include <memory>

#include "../tensor/checks.h"
#include "../tensor/event.h"
#include "../tensor/garbage.h"
#include "../tensor/python_args.h"
#include "step.h"

namespace gradfuse {
namespace {

constexpr const char* kStepOp = "step";

Measurement read_measure(double max_norm, int nonfinite, OptionalTensorArg scale,
                         OptionalTensorArg found_inf, bool exact) {
  const LossScaleTensors given = {maybe_tensor(kStepOp, "grad_scale", scale.object),
                                  maybe_tensor(kStepOp, "found_inf", found_inf.object)};
  for (const MaybeTensor& t : {given.scale, given.found_inf})
    if (t && t->numel() != 1)
      fail<std::invalid_argument>("step: grad_scale and found_inf must be one number, got ",
                                  t->sizes());
  Measurement m = measurement_of(max_norm, 2.0, nonfinite, exact);
  m.scale = given;
  return m;
}

// HeldParams and the step on them, with the checks of Python's arguments. A call keeps the
// parameters that it began with: another thread may bind others meanwhile.
class Stepper {
 public:
  explicit Stepper(int rule) : held_(std::make_shared<HeldParams>(static_cast<Rule>(rule))) {
    if (rule < 0 || rule >= kRules)
      fail<std::invalid_argument>("Stepper: rule must be between 0 and ", kRules - 1, ", got ",
                                  rule);
  }
  int traverse(visitproc visit, void* arg) const { return held_->traverse(visit, arg); }
  void clear() { held_ = std::make_shared<HeldParams>(held_->rule()); }

  bool is_current(ParamGroupsArg groups, StateArg state, SlotsArg needs) {
    const auto slots = checked_slots(groups, needs);
    return held_->is_current(groups.object.ptr(), state.object.ptr(), slots);
  }
  void bind(ParamGroupsArg groups, StateArg state, SlotsArg needs) {
    const auto slots = checked_slots(groups, needs);
    const auto held = std::make_shared<HeldParams>(held_->rule());
    held->bind(groups.object.ptr(), state.object.ptr(), slots);
    held_ = held;
    groups_ = slots.size();
  }
  std::vector<at::Tensor> parameters() const { return current()->parameters(); }
  ClipTuple measure(double max_norm, int nonfinite, OptionalTensorArg scale,
                    OptionalTensorArg found_inf, bool exact) const {
    const Measurement m = read_measure(max_norm, nonfinite, scale, found_inf, exact);
    const auto held = current();
    const py::gil_scoped_release release;
    return as_tuple(gradfuse::measure(*held, m));
  }
  ClipTuple step(StepGroupsArg groups, double max_norm, int nonfinite, OptionalTensorArg scale,
                 OptionalTensorArg found_inf, StepOptionsArg options, bool exact) {
    const Measurement m = read_measure(max_norm, nonfinite, scale, found_inf, exact);
    const StepCall call = read_step(groups, options);
    GRADFUSE_EVENT(event());
    const auto held = current();
    const py::gil_scoped_release release;
    return as_tuple(gradfuse::step(*held, m, call));
  }
  void update(StepGroupsArg groups, OptionalTensorArg plan, OptionalTensorArg coefficients,
              StepOptionsArg options, OptionalTensorArg lr_scales) {
    StepCall call = read_step(groups, options);
    const MaybeTensor given = maybe_vector(kStepOp, "plan", plan.object, kPlanFields);
    const MaybeTensor each = of_parameters("coefficients", coefficients);
    call.lr_scales = of_parameters("lr_scales", lr_scales);
    GRADFUSE_EVENT(event());
    const auto held = current();
    const py::gil_scoped_release release;
    gradfuse::update(*held, call, given, each);
  }
  void check() const {
    const auto held = current();
    const py::gil_scoped_release release;
    check_step(*held);
  }
  at::Tensor lr_sums(StepGroupsArg groups, OptionalTensorArg plan, OptionalTensorArg coefficients,
                     StepOptionsArg options) const {
    const StepCall call = read_step(groups, options);
    const MaybeTensor given = maybe_vector(kStepOp, "plan", plan.object, kPlanFields);
    const MaybeTensor each = of_parameters("coefficients", coefficients);
    const auto held = current();
    const py::gil_scoped_release release;
    return gradfuse::lr_sums(*held, call, given, each);
  }

 private:
  std::shared_ptr<HeldParams> current() const {
    held_->look_up();
    return held_;
  }
  // The name of a step in the profiler.
  const char* event() const { return names_of(held_->rule()).event; }

  // A number for each parameter.
  MaybeTensor of_parameters(const char* name, OptionalTensorArg numbers) const {
    return maybe_vector(kStepOp, name, numbers.object, static_cast<int64_t>(held_->size()));
  }

  static void read(Fields& fields, std::initializer_list<double*> numbers) {
    for (double* number : numbers) *number = fields.next_as<double>();
  }
  // The record of a group has the fields of its rule after these.
  void read_group(py::handle record, StepCall& call) const {
    static constexpr struct {
      const char* name;
      size_t fields;
    } kRecords[kRules] = {{"AdamGroup", 7}, {"SGDGroup", 6},  {"AdamGroup", 7},
                          {"LAMBGroup", 8}, {"LionGroup", 5}, {"ScheduleFreeGroup", 9}};
    const auto& expected = kRecords[static_cast<int>(held_->rule())];
    Fields fields(expected.name, record, expected.fields);
    GroupOptions o = {};
    MaybeTensor lr_value;
    const py::handle lr = fields.next();
    if (is_tensor(lr))
      lr_value = tensor_of(kStepOp, "lr", lr).detach();
    else
      o.lr = lr.cast<double>();
    o.maximize = fields.next_as<bool>();
    switch (held_->rule()) {
      case Rule::AdamW:
      case Rule::Adam:
        read(fields, {&o.adamw.beta1, &o.adamw.beta2, &o.adamw.eps, &o.adamw.weight_decay});
        o.adamw.decoupled = fields.next_as<bool>();
        break;
      case Rule::Lamb:
        read(fields, {&o.adamw.beta1, &o.adamw.beta2, &o.adamw.eps, &o.adamw.weight_decay});
        o.adamw.decoupled = true;
        o.trust = {fields.next_as<bool>(), fields.next_as<bool>()};
        break;
      case Rule::Sgd:
        read(fields, {&o.sgd.momentum, &o.sgd.dampening, &o.sgd.weight_decay});
        o.sgd.nesterov = fields.next_as<bool>();
        break;
      case Rule::Lion: read(fields, {&o.lion.beta1, &o.lion.beta2, &o.lion.weight_decay}); break;
      case Rule::ScheduleFree: {
        ScheduleFreeOptions& f = o.schedule_free;
        read(fields, {&f.beta1, &f.beta2, &f.eps, &f.weight_decay, &f.warmup_steps, &f.r,
                      &f.weight_lr_power});
        break;
      }
    }
    call.groups.push_back(o);
    call.lr_values.push_back(lr_value);
  }
  StepCall read_step(StepGroupsArg groups, StepOptionsArg options) const {
    Fields fields("StepOptions", options.object, 6);
    StepCall call = {};
    call.bound = fields.next_as<double>();
    call.lr_scale = static_cast<LrScale>(fields.next_as<int>());
    call.eps_follows_clip = fields.next_as<bool>();
    call.atan2 = fields.next_as<bool>();
    call.stochastic_rounding = fields.next_as<bool>();
    call.materialize = fields.next_as<bool>();
    for (const auto& group : checked_groups(groups.object, groups_)) read_group(group, call);
    return call;
  }
  static std::vector<int> checked_slots(ParamGroupsArg groups, SlotsArg needs) {
    std::vector<int> slots = needs.object.cast<std::vector<int>>();
    checked_groups(groups.object, slots.size());
    return slots;
  }
  static py::sequence checked_groups(py::handle groups, size_t expected) {
    py::sequence found = sequence_of("Stepper", "groups", groups);
    if (found.size() != expected)
      fail<std::invalid_argument>("Stepper: expected ", expected, " groups, got ", found.size());
    return found;
  }

  std::shared_ptr<HeldParams> held_;
  size_t groups_ = 0;
};

}  // namespace

void bind_optim(py::module_& m) {
  add_codes(m, "Rule",
            {{"ADAMW", static_cast<int>(Rule::AdamW)},
             {"SGD", static_cast<int>(Rule::Sgd)},
             {"ADAM", static_cast<int>(Rule::Adam)},
             {"LAMB", static_cast<int>(Rule::Lamb)},
             {"LION", static_cast<int>(Rule::Lion)},
             {"SCHEDULE_FREE", static_cast<int>(Rule::ScheduleFree)}});
  add_codes(m, "LrScale",
            {{"NONE", static_cast<int>(LrScale::None)},
             {"UPDATE_CLIP", static_cast<int>(LrScale::UpdateClip)},
             {"TRUST_RATIO", static_cast<int>(LrScale::TrustRatio)}});
  add_codes(m, "Slot",
            {{"EXP_AVG", 1 << kExpAvg},
             {"EXP_AVG_SQ", 1 << kExpAvgSq},
             {"MAX_EXP_AVG_SQ", 1 << kMaxExpAvgSq},
             {"MASTER_PARAM", 1 << kMasterParam},
             {"STEP", 1 << kStep},
             {"WEIGHT_SUM", 1 << kWeightSum},
             {"LR_MAX", 1 << kLrMax}});
  py::class_<Stepper>(m, "Stepper", collects_garbage<Stepper>())
      .def(py::init<int>(), py::arg("rule"))
      .def("is_current", &Stepper::is_current, py::arg("groups"), py::arg("state"),
           py::arg("needs"))
      .def("bind", &Stepper::bind, py::arg("groups"), py::arg("state"), py::arg("needs"))
      .def("parameters", &Stepper::parameters)
      .def("measure", &Stepper::measure, py::arg("max_norm"), py::arg("nonfinite"),
           py::arg("scale"), py::arg("found_inf"), py::arg("exact") = false)
      .def("step", &Stepper::step, py::arg("groups"), py::arg("max_norm"), py::arg("nonfinite"),
           py::arg("scale"), py::arg("found_inf"), py::arg("options"), py::arg("exact") = false)
      .def("update", &Stepper::update, py::arg("groups"), py::arg("plan"), py::arg("coefficients"),
           py::arg("options"), py::arg("lr_scales") = py::none())
      .def("check", &Stepper::check)
      .def("lr_sums", &Stepper::lr_sums, py::arg("groups"), py::arg("plan"),
           py::arg("coefficients"), py::arg("options"));
}

}  // namespace gradfuse
