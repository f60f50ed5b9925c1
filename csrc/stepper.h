// The parameters of an optimizer and their state, held between steps so that a step walks no Python
// list, and one step on them.
#pragma once

#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <string>
#include <vector>

#include "clip.h"

namespace gradfuse {

// What a step does beside the rule.
struct StepOptions {
  double bound;  // of each element of the gradients, after the factor
  bool update_clip;
  bool stochastic_rounding;
  bool materialize;  // write the factor to the gradients as well
};

class Stepper {
 public:
  explicit Stepper(Rule rule) : rule_(rule) {}

  // Whether what is held is what the param_groups (a list of dicts) and the state (a dict of dicts)
  // of an optimizer contain, and every parameter with a gradient has the tensors that its group
  // needs: bit i of its number in `needs` is that of slot i. (A master is used if it is there.)
  bool holds(PyObject* groups, PyObject* state, const std::vector<int>& needs) const;
  void hold(PyObject* groups, PyObject* state, const std::vector<int>& needs);

  // The parameters in order.
  std::vector<at::Tensor> parameters() const;

  // The norm, the table and the plan of a step. Writes nothing. Throws as plan_step.
  ClipResult measure(double max_norm, NonFinite policy, const LossScaleTensors& scale) const;

  // Updates the parameters that have a gradient as the totals say, unless they say Skip.
  // Throws std::invalid_argument or TypeError, nothing written, where a gradient or a state does
  // not fit its parameter.
  void update(const std::vector<GroupOptions>& groups,
              const std::vector<MaybeTensor>& lr_values,  // [groups], each [] on any device
              const MaybeTensor& totals, const MaybeTensor& coefficients,
              const StepOptions& options);

 private:
  enum Slot { kFirst, kSecond, kLargest, kMaster, kStep, kSlots };
  struct Held {
    THPObjectPtr object;  // the parameter
    THPObjectPtr state;  // its dict, or null
    at::Tensor param;
    std::array<PyObject*, kSlots> in_state;  // borrowed, for they are only compared
    std::array<at::Tensor, kSlots> tensors;
    int group;
    bool repeated;  // it is an earlier one
  };

  const char* op() const { return rule_ == Rule::AdamW ? "AdamW.step" : "SGD.step"; }
  static const char* name_of(Rule rule, int slot);
  std::vector<at::Tensor> gradients() const;
  // The tensor whose strides an update goes along: a state's, or the parameter.
  const at::Tensor& layout_of(const Held& held) const;
  void check_param(const Held& held, const at::Tensor& grad, size_t index) const;
  ParamRef ref_of(const Held& held, const at::Tensor& param, const at::Tensor& grad,
                  size_t index) const;

  Rule rule_;
  std::vector<int> needs_;
  std::vector<Held> held_;
  std::vector<std::pair<PyObject*, PyObject*>> entries_;  // of the state dict, in order; borrowed
};

}  // namespace gradfuse
