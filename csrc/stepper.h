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
  size_t size() const { return held_.size(); }

  // The norm, the table and the plan of a step. Writes nothing. Throws as plan_step.
  ClipResult measure(double max_norm, NonFinite policy, const LossScaleTensors& scale) const;

  // The same and the update, in one walk of the parameters. Throws as both.
  ClipResult step(const std::vector<GroupOptions>& groups,
                  const std::vector<MaybeTensor>& lr_values, double max_norm, NonFinite policy,
                  const LossScaleTensors& scale, const StepOptions& options);

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
    const void* autograd;  // where its gradient is kept; only to prefetch
    int group;
    int items;  // of its dict, in items_; -1: not there, look its keys up
    bool repeated;  // it is an earlier one
    bool complete;  // it has all tensors that its group needs
  };
  using Items = std::vector<std::pair<PyObject*, PyObject*>>;  // of a dict, in order; borrowed

  // The parameters that have a gradient, as one walk found them. They are in as many lists as the
  // gradients, and in the same order.
  struct Walk {
    GradList grads;
    std::vector<std::vector<ParamRef>> params;
    // (list, place in it) of those whose references are not those to update: their memory is shared
    // until it is written, or has gaps.
    std::vector<std::pair<size_t, size_t>> odd;
  };

  const char* op() const { return rule_ == Rule::AdamW ? "AdamW.step" : "SGD.step"; }
  static const char* name_of(Rule rule, int slot);
  std::vector<at::Tensor> gradients() const;
  bool holds_state(const Held& held, const std::array<THPObjectPtr, kSlots>& names,
                   const std::pair<PyObject*, PyObject*>* items) const;
  Walk walk() const;
  void prefetch(size_t index) const;
  // Whether parameter, gradient and state are plain, of one shape and of types that go together.
  bool is_plain(const Held& held, const at::Tensor& grad) const;
  // The tensor whose strides an update goes along: a state's, or the parameter.
  const at::Tensor& layout_of(const Held& held) const;
  // Throws unless they can be updated.
  void check_param(const Held& held, const at::Tensor& grad, size_t index) const;
  // As the kernels see it. `writes` separates memory that is shared until it is written.
  ParamRef ref_of(const Held& held, const at::Tensor& param, const at::Tensor& grad, size_t index,
                  bool writes) const;
  void apply(Walk& walk, const std::vector<GroupOptions>& groups,
             const std::vector<MaybeTensor>& lr_values, const MaybeTensor& totals,
             const MaybeTensor& coefficients, const StepOptions& options);
  void announce_writes(const std::vector<ParamRef>& params) const;

  Rule rule_;
  std::vector<int> needs_;
  std::vector<Held> held_;
  std::vector<THPObjectPtr> keys_;  // of the parameters' dicts, each once
  Items items_;  // of the parameters' dicts
  Items entries_;  // of the state dict
};

}  // namespace gradfuse
