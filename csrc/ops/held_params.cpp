#include "held_params.h"

#include <Python.h>

#include <algorithm>
#include <unordered_set>

#include "../math/prefetch.h"
#include "../tensor/checks.h"
#include "../tensor/grad_list.h"
#include "../tensor/python_args.h"

namespace gradfuse {
namespace {

// dict[name] as a borrowed reference, or null.
PyObject* item(PyObject* dict, const char* name) {
  // Interned: the dict then compares pointers.
  THPObjectPtr key(PyUnicode_InternFromString(name));
  return key ? PyDict_GetItemWithError(dict, key.get()) : nullptr;
}

// A held object without const, for Python's functions.
PyObject* raw(const THPObjectPtr& p) { return const_cast<PyObject*>(p.get()); }

bool is_dict(PyObject* object) { return object && PyDict_Check(object); }

// Calls f(group number, parameter) for every parameter of the param_groups. Stops and returns false
// if f does or a group has another form.
template <class F>
bool for_each_parameter(PyObject* groups, F f) {
  if (!PyList_Check(groups)) return false;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* group = PyList_GET_ITEM(groups, g);
    PyObject* params = is_dict(group) ? item(group, "params") : nullptr;
    if (!params || !PyList_Check(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i)
      if (!f(static_cast<int>(g), PyList_GET_ITEM(params, i))) return false;
  }
  return true;
}

// Prefetches a dict's table, once its header has arrived. Not without the GIL, where another thread
// may be replacing it.
void prefetch_table([[maybe_unused]] PyObject* dict) {
#if !defined(Py_GIL_DISABLED)
  const char* table = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  for (size_t line = 0; line < 192; line += 64) prefetch_line(table + line);
#endif
}

// Whether a dict has exactly these items, in this order.
bool has_items(PyObject* dict, const std::pair<PyObject*, PyObject*>* items, Py_ssize_t n) {
  if (PyDict_GET_SIZE(dict) != n) return false;
  Py_ssize_t at = 0;
  PyObject *key, *value;
  for (Py_ssize_t i = 0; i < n; ++i)
    if (!PyDict_Next(dict, &at, &key, &value) || key != items[i].first || value != items[i].second)
      return false;
  return true;
}

// Appends a dict's items and returns their number. Keeps each distinct key alive; there are few, as
// they are the names of the state. If they exceed kMost, appends nothing and returns -1.
int copy_items(PyObject* dict, std::vector<THPObjectPtr>& keys,
               std::vector<std::pair<PyObject*, PyObject*>>& items) {
  constexpr size_t kMost = 32;
  const size_t before = items.size();
  Py_ssize_t at = 0;
  PyObject *key, *value;
  while (PyDict_Next(dict, &at, &key, &value)) {
    const bool known = std::any_of(keys.begin(), keys.end(),
                                   [&](const THPObjectPtr& k) { return k.get() == key; });
    if (!known && keys.size() == kMost) {
      items.resize(before);
      return -1;
    }
    if (!known) {
      Py_INCREF(key);
      keys.emplace_back(key);
    }
    items.emplace_back(key, value);
  }
  return static_cast<int>(items.size() - before);
}

}  // namespace

const char* HeldParams::slot_name(int slot) const {
  switch (rule_) {
    case Rule::Sgd:
      if (slot == kExpAvg) return "momentum_buffer";
      if (slot == kExpAvgSq || slot == kMaxExpAvgSq) return nullptr;
      break;
    case Rule::Lion:
      if (slot == kExpAvgSq || slot == kMaxExpAvgSq) return nullptr;
      break;
    case Rule::Lamb:
      if (slot == kMaxExpAvgSq) return nullptr;
      break;
    case Rule::ScheduleFree:
      if (slot == kExpAvg) return "z";
      if (slot == kMaxExpAvgSq) return nullptr;
      break;
    default: break;
  }
  if (slot > kStep && rule_ != Rule::ScheduleFree) return nullptr;
  static constexpr const char* kNames[kSlots] = {
      "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param", "step", "weight_sum", "lr_max"};
  return kNames[slot];
}

void HeldParams::Held::take(const at::Tensor& now) {
  if (now.is_same(*borrowed)) return;
  borrowed = c10::MaybeOwned<at::Tensor>::borrowed(now);
  autograd = now.unsafeGetTensorImpl()->autograd_meta();
}

HeldParams::Names HeldParams::interned_names() const {
  Names names;
  for (int slot = 0; slot < kSlots; ++slot)
    if (slot_name(slot)) names[slot] = PyUnicode_InternFromString(slot_name(slot));
  return names;
}

bool HeldParams::state_is_current(const Held& h, const Names& names,
                                  const std::pair<PyObject*, PyObject*>* items) const {
  PyObject* dict = raw(h.state);
  if (h.items >= 0 && has_items(dict, items, h.items)) return true;
  for (int slot = 0; slot < kSlots; ++slot)
    if (names[slot] && PyDict_GetItemWithError(dict, raw(names[slot])) != h.in_state[slot])
      return false;
  return true;
}

bool HeldParams::is_current(PyObject* groups, PyObject* state, const std::vector<int>& needs) {
  if (needs != needs_ || !PyDict_Check(state) ||
      !has_items(state, entries_.data(), static_cast<Py_ssize_t>(entries_.size())))
    return false;
  const Names names = interned_names();
  const auto header = ahead(12, [&](size_t i) {
    prefetch_line(raw(held_[i].state));
    prefetch_line(raw(held_[i].object));
  });
  const auto table = ahead(6, [&](size_t i) {
    if (raw(held_[i].state)) prefetch_table(raw(held_[i].state));
    prefetch_line(held_[i].param().unsafeGetTensorImpl() + 1);  // the last of its fields
  });
  size_t next = 0, items = 0;
  const bool same = for_each_parameter(groups, [&](int group, PyObject* param) {
    prefetch_for(next, held_.size(), header, table);
    if (next == held_.size()) return false;
    Held& h = held_[next++];
    if (raw(h.object) != param || h.group != group) return false;
    const at::Tensor& tensor = unpack_(param);
    if (tensor.dtype() != h.type || tensor.device() != h.device) return false;
    h.take(tensor);
    if (raw(h.state) && !state_is_current(h, names, items_.data() + items)) return false;
    items += std::max(h.items, 0);
    return h.repeated || h.complete || !tensor.unsafeGetTensorImpl()->grad().defined();
  });
  looked_up_ = same && next == held_.size();
  return looked_up_;
}

void HeldParams::read_state(Held& h, PyObject* dict, const Names& names, int needs) const {
  Py_INCREF(dict);
  h.state = dict;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (!names[slot]) continue;
    PyObject* tensor = PyDict_GetItemWithError(dict, raw(names[slot]));
    h.in_state[slot] = tensor;
    if (tensor && is_tensor(tensor) && needs >> slot & 1) h.tensors[slot] = unpacked(tensor);
  }
}

void HeldParams::bind(PyObject* groups, PyObject* state, const std::vector<int>& needs) {
  std::vector<Held> held;
  std::unordered_set<PyObject*> seen;
  std::vector<THPObjectPtr> keys;
  Items items, entries;
  if (!PyDict_Check(state)) fail<TypeError>(op(), ": expected a dict as state");
  const Names names = interned_names();
  Py_ssize_t at = 0;
  PyObject *key, *value;
  while (PyDict_Next(state, &at, &key, &value)) entries.emplace_back(key, value);
  const bool valid = for_each_parameter(groups, [&](int group, PyObject* param) {
    if (!is_tensor(param))
      fail<TypeError>(op(), ": expected tensors as parameters, got ", Py_TYPE(param)->tp_name,
                      " for parameter ", held.size());
    const at::Tensor& tensor = unpacked(param);
    Held h;
    h.type = tensor.dtype();
    h.device = tensor.device();
    h.group = group;
    Py_INCREF(param);
    h.object = param;
    h.take(tensor);
    h.repeated = !seen.insert(param).second;
    PyObject* dict = PyDict_GetItemWithError(state, param);
    if (!dict && PyErr_Occurred()) throw py::error_already_set();
    if (is_dict(dict)) {
      read_state(h, dict, names, needs[group]);
      h.items = copy_items(dict, keys, items);
    }
    for (int slot = 0; slot < kSlots; ++slot)
      if (slot != kMasterParam && needs[group] >> slot & 1) h.complete &= h.tensors[slot].defined();
    held.push_back(std::move(h));
    return true;
  });
  if (!valid) fail<TypeError>(op(), ": expected param_groups as a list of dicts with lists");
  needs_ = needs;
  if (!held.empty()) unpack_ = Unpacker(held.front().object.get());
  held_ = std::move(held);
  keys_ = std::move(keys);
  items_ = std::move(items);
  entries_ = std::move(entries);
}

void HeldParams::look_up() {
  if (!looked_up_)
    for (Held& h : held_) h.take(unpack_(h.object.get()));
  looked_up_ = false;
}

int HeldParams::traverse(visitproc visit, void* arg) const {
  for (const Held& h : held_) {
    Py_VISIT(raw(h.object));
    Py_VISIT(raw(h.state));
  }
  return 0;
}

std::vector<at::Tensor> HeldParams::parameters() const {
  std::vector<at::Tensor> out;
  out.reserve(held_.size());
  for (const Held& h : held_) out.push_back(h.param());
  return out;
}

std::vector<at::Tensor> HeldParams::gradients() const {
  std::vector<at::Tensor> out;
  out.reserve(held_.size());
  for (const Held& h : held_) out.push_back(h.repeated ? at::Tensor() : h.grad());
  return out;
}

}  // namespace gradfuse
