// The parameters of an optimizer and their state, held between steps so that a step walks no Python
// list.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <utility>
#include <vector>

#include "optim.h"

namespace gradfuse {

class HeldParams {
 public:
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

    const at::Tensor& grad() const { return param.unsafeGetTensorImpl()->grad(); }
  };

  explicit HeldParams(Rule rule) : rule_(rule) {}

  // Whether what is held is what the param_groups (a list of dicts) and the state (a dict of dicts)
  // of an optimizer contain, and every parameter with a gradient has the tensors that its group
  // needs: bit i of its number in `needs` is that of slot i. (A master is used if it is there.)
  bool is_current(PyObject* groups, PyObject* state, const std::vector<int>& needs) const;
  // Holds what they contain. Throws TypeError, what was held unchanged, if they are not of that
  // form.
  void bind(PyObject* groups, PyObject* state, const std::vector<int>& needs);

  Rule rule() const { return rule_; }
  const char* op() const { return rule_ == Rule::AdamW ? "AdamW.step" : "SGD.step"; }
  const char* slot_name(int slot) const;  // null where the rule has no such tensor
  size_t size() const { return held_.size(); }
  const Held& operator[](size_t i) const { return held_[i]; }
  std::vector<at::Tensor> parameters() const;
  std::vector<at::Tensor> gradients() const;  // undefined for repeated parameters

 private:
  using Items = std::vector<std::pair<PyObject*, PyObject*>>;  // of a dict, in order; borrowed
  using Names = std::array<THPObjectPtr, kSlots>;

  Names interned_names() const;
  bool state_is_current(const Held& held, const Names& names,
                        const std::pair<PyObject*, PyObject*>* items) const;
  void read_state(Held& held, PyObject* dict, const Names& names, int needs) const;

  Rule rule_;
  std::vector<int> needs_;
  std::vector<Held> held_;
  std::vector<THPObjectPtr> keys_;  // of the parameters' dicts, each once
  Items items_;  // of the parameters' dicts
  Items entries_;  // of the state dict
};

}  // namespace gradfuse
