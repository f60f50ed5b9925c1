// The parameters of an optimizer and their state, held between steps so that a step walks no Python
// list.
//
// Parameters are held as Python objects: another reference to their tensors would make
// torch.utils.swap_tensors fail. Python's garbage collector sees these, see traverse().
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <utility>
#include <vector>

#include "../tensor/python_args.h"
#include "optim.h"

namespace gradfuse {

class HeldParams {
 public:
  struct Held {
    THPObjectPtr object;  // the parameter
    c10::MaybeOwned<at::Tensor> borrowed;  // the object's tensor, see look_up()
    std::array<at::Tensor, kSlots> tensors;
    const void* autograd = nullptr;  // where its gradient is kept; only to prefetch
    // Where its memory was when walk() last looked for overlaps, and what came of it: parameters
    // that share memory are updated in layers one after another, in their order.
    const void* place = nullptr;
    int64_t numel = 0;
    int layer = 0;
    int group = 0;
    bool repeated = false;  // occurs earlier too
    bool complete = true;  // it has all tensors that its group needs
    caffe2::TypeMeta type;
    c10::Device device{c10::kCPU};
    int items = -1;  // of its dict, in items_; -1: not held, its keys are looked up
    THPObjectPtr state;  // its dict, or null
    std::array<PyObject*, kSlots> in_state = {};  // borrowed: they are only compared

    void take(const at::Tensor& now);
    const at::Tensor& param() const { return *borrowed; }
    const at::Tensor& grad() const { return param().unsafeGetTensorImpl()->grad(); }
  };

  explicit HeldParams(Rule rule) : rule_(rule) {}

  // Whether the held parameters and tensors are those of an optimizer's param_groups (a list of
  // dicts) and state (a dict of dicts), and every parameter with a gradient has the tensors that
  // its group needs: bit i of needs[group] stands for slot i. (A master is optional.) Also whether
  // all parameters have the type and device that they had then.
  bool is_current(PyObject* groups, PyObject* state, const std::vector<int>& needs);
  // Takes over what they contain. If they have another form, throws TypeError and changes nothing.
  void bind(PyObject* groups, PyObject* state, const std::vector<int>& needs);

  // To be called before param() and grad(), with the GIL: a parameter may have another tensor now.
  // Costs nothing right after is_current, which does the same on its way.
  void look_up();

  // Python's tp_traverse.
  int traverse(visitproc visit, void* arg) const;

  Rule rule() const { return rule_; }
  const char* op() const { return names_of(rule_).step; }
  const char* slot_name(int slot) const;  // null where the rule has no such tensor
  size_t size() const { return held_.size(); }
  const Held& operator[](size_t i) const { return held_[i]; }
  Held& operator[](size_t i) { return held_[i]; }
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
  Unpacker unpack_;
  bool looked_up_ = false;
  std::vector<THPObjectPtr> keys_;  // of the parameters' dicts, each once
  Items items_;  // of the parameters' dicts
  Items entries_;  // of the state dict
};

}  // namespace gradfuse
