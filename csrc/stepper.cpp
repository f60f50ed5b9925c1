#include "stepper.h"

#include <Python.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/MemoryOverlap.h>

#include <unordered_set>

#include "checks.h"
#include "device.h"
#include "dispatch.h"

namespace gradfuse {
namespace {

// dict[name] without a new reference, or null.
PyObject* item(PyObject* dict, const char* name) {
  // Interned: the dict then compares pointers.
  THPObjectPtr key(PyUnicode_InternFromString(name));
  return key ? PyDict_GetItemWithError(dict, key.get()) : nullptr;
}

// A held object, for Python's functions, which take no const.
PyObject* raw(const THPObjectPtr& p) { return const_cast<PyObject*>(p.get()); }

bool is_dict(PyObject* object) { return object && PyDict_Check(object); }

// Calls f(group number, parameter) for every parameter of the param_groups until it returns false.
// Returns whether it never did.
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

bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  if (!a.sizes().equals(b.sizes())) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// The totals of gradients that were multiplied already.
at::Tensor without_factor(const at::Tensor& totals) {
  const at::Tensor out = dense_copy(totals, totals.strides());
  out.select(0, 6).fill_(1.0);
  out.select(0, 7).zero_();
  return out;
}

// Announces a write to a tensor and returns its memory.
void* written(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  return t.numel() ? t.mutable_data_ptr() : nullptr;
}

}  // namespace

const char* Stepper::name_of(Rule rule, int slot) {
  static constexpr const char* kNames[2][kSlots] = {
      {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param", "step"},
      {"momentum_buffer", nullptr, nullptr, "master_param", "step"}};
  return kNames[static_cast<int>(rule)][slot];
}

bool Stepper::holds(PyObject* groups, PyObject* state, const std::vector<int>& needs) const {
  if (needs != needs_ || !PyDict_Check(state) ||
      PyDict_GET_SIZE(state) != static_cast<Py_ssize_t>(entries_.size()))
    return false;
  Py_ssize_t at = 0;
  PyObject *key, *value;
  for (const auto& [held_key, held_value] : entries_)
    if (!PyDict_Next(state, &at, &key, &value) || key != held_key || value != held_value)
      return false;
  std::array<THPObjectPtr, kSlots> names;
  for (int slot = 0; slot < kSlots; ++slot)
    if (name_of(rule_, slot)) names[slot] = PyUnicode_InternFromString(name_of(rule_, slot));
  size_t next = 0;
  const bool same = for_each_parameter(groups, [&](int group, PyObject* param) {
    if (next == held_.size()) return false;
    const Held& h = held_[next++];
    if (raw(h.object) != param || h.group != group) return false;
    if (raw(h.state)) {
      for (int slot = 0; slot < kSlots; ++slot) {
        if (!names[slot]) continue;
        if (PyDict_GetItemWithError(raw(h.state), names[slot].get()) != h.in_state[slot])
          return false;
      }
    }
    if (h.repeated || !h.param.unsafeGetTensorImpl()->grad().defined()) return true;
    for (int slot = 0; slot < kSlots; ++slot)
      if (slot != kMaster && needs[group] >> slot & 1 && !h.tensors[slot].defined()) return false;
    return true;
  });
  return same && next == held_.size();
}

void Stepper::hold(PyObject* groups, PyObject* state, const std::vector<int>& needs) {
  std::vector<Held> held;
  std::unordered_set<PyObject*> seen;
  std::vector<std::pair<PyObject*, PyObject*>> entries;
  if (!PyDict_Check(state)) fail<TypeError>(op(), ": expected a dict as state");
  Py_ssize_t at = 0;
  PyObject *key, *value;
  while (PyDict_Next(state, &at, &key, &value)) entries.emplace_back(key, value);
  const bool valid = for_each_parameter(groups, [&](int group, PyObject* param) {
    if (!is_tensor(param))
      fail<TypeError>(op(), ": expected tensors as parameters, got ", Py_TYPE(param)->tp_name,
                      " for parameter ", held.size());
    Held h = {};
    Py_INCREF(param);
    h.object = param;
    h.param = THPVariable_Unpack(param);
    h.group = group;
    h.repeated = !seen.insert(param).second;
    PyObject* dict = PyDict_GetItemWithError(state, param);
    if (!dict && PyErr_Occurred()) throw python_error();
    if (is_dict(dict)) {
      Py_INCREF(dict);
      h.state = dict;
      for (int slot = 0; slot < kSlots; ++slot) {
        if (!name_of(rule_, slot)) continue;
        PyObject* tensor = item(dict, name_of(rule_, slot));
        h.in_state[slot] = tensor;
        if (tensor && is_tensor(tensor) && needs[group] >> slot & 1)
          h.tensors[slot] = THPVariable_Unpack(tensor);
      }
    }
    held.push_back(std::move(h));
    return true;
  });
  if (!valid) fail<TypeError>(op(), ": expected param_groups as a list of dicts with lists");
  needs_ = needs;
  held_ = std::move(held);
  entries_ = std::move(entries);
}

std::vector<at::Tensor> Stepper::parameters() const {
  std::vector<at::Tensor> out;
  out.reserve(held_.size());
  for (const Held& h : held_) out.push_back(h.param);
  return out;
}

std::vector<at::Tensor> Stepper::gradients() const {
  std::vector<at::Tensor> out;
  out.reserve(held_.size());
  for (const Held& h : held_)
    out.push_back(h.repeated ? at::Tensor() : h.param.unsafeGetTensorImpl()->grad());
  return out;
}

ClipResult Stepper::measure(double max_norm, NonFinite policy,
                            const LossScaleTensors& scale) const {
  return plan_step(op(), check_gradients(op(), gradients(), false), max_norm, norm_spec(2.0),
                   policy, scale);
}

const at::Tensor& Stepper::layout_of(const Held& h) const {
  for (int slot = 0; slot < kStep; ++slot)
    if (h.tensors[slot].defined()) return h.tensors[slot];
  return h.param;
}

void Stepper::check_param(const Held& h, const at::Tensor& grad, size_t index) const {
  const at::Tensor& p = h.param;
  if (!grad.sizes().equals(p.sizes()) || grad.scalar_type() != p.scalar_type() ||
      grad.device() != p.device())
    fail<std::invalid_argument>(op(),
                                ": expected a gradient of the parameter's shape, dtype and "
                                "device, ",
                                p.sizes(), " of ", p.scalar_type(), " on ", p.device(), ", got ",
                                grad.sizes(), " of ", grad.scalar_type(), " on ", grad.device(),
                                " for parameter ", index);
  if (p.layout() != at::kStrided || is_wrapper(p) || missing_storage(p) || p.is_neg() ||
      p.is_conj() || (p.numel() && at::has_internal_overlap(p) == at::MemOverlap::Yes))
    fail<TypeError>(op(),
                    ": expected plain dense parameters with an element per memory location, "
                    "got another kind for parameter ",
                    index);
  for (int slot = 0; slot < kSlots; ++slot) {
    const at::Tensor& t = h.tensors[slot];
    if (!t.defined()) continue;
    const bool is_step = slot == kStep;
    const bool fits = t.layout() == at::kStrided && !is_wrapper(t) && !missing_storage(t) &&
                      t.device() == p.device() &&
                      (is_step ? t.dim() == 0 && t.scalar_type() == at::kFloat
                               : same_strides(t, layout_of(h)) && t.sizes().equals(p.sizes()) &&
                                     t.is_non_overlapping_and_dense());
    if (!fits)
      fail<std::invalid_argument>(op(), ": expected state ", name_of(rule_, slot), " of ",
                                  is_step ? at::IntArrayRef{} : p.sizes(), " on ", p.device(),
                                  ", got ", t.sizes(), " on ", t.device(), " for parameter ",
                                  index);
  }
}

ParamRef Stepper::ref_of(const Held& h, const at::Tensor& param, const at::Tensor& grad,
                         size_t index) const {
  ParamRef r = {};
  r.param = written(param);
  r.grad = grad.numel() ? grad.const_data_ptr() : nullptr;
  const auto memory = [&](Slot slot) {
    return h.tensors[slot].defined() ? written(h.tensors[slot]) : nullptr;
  };
  r.first = memory(kFirst);
  r.second = memory(kSecond);
  r.largest = memory(kLargest);
  r.master = static_cast<float*>(memory(kMaster));
  r.step = static_cast<float*>(memory(kStep));
  r.numel = param.numel() * (param.is_complex() ? 2 : 1);
  r.dtype = *dtype_of(param.scalar_type());
  r.state_dtype =
      h.tensors[kFirst].defined() ? *dtype_of(h.tensors[kFirst].scalar_type()) : r.dtype;
  r.group = h.group;
  r.row = static_cast<int32_t>(index);
  return r;
}

void Stepper::update(const std::vector<GroupOptions>& groups,
                     const std::vector<MaybeTensor>& lr_values, const MaybeTensor& totals,
                     const MaybeTensor& coefficients, const StepOptions& options) {
  // What is updated: the parameter, or a dense copy of one with gaps in memory.
  struct Updated {
    size_t index;
    at::Tensor param, grad;
  };
  std::vector<std::pair<at::Device, std::vector<Updated>>> devices;
  GradList grads = check_gradients(op(), gradients(), options.materialize);
  const std::vector<at::Tensor> listed = gradients();
  for (size_t i = 0; i < held_.size(); ++i) {
    if (!listed[i].defined()) continue;
    check_param(held_[i], listed[i], i);
    const at::Device device = held_[i].param.device();
    auto found = std::find_if(devices.begin(), devices.end(),
                              [&](const auto& d) { return d.first == device; });
    if (found == devices.end()) found = devices.insert(found, {device, {}});
    found->second.push_back({i, held_[i].param, listed[i]});
  }
  MaybeTensor plan = totals, each = coefficients;
  if (options.materialize && totals) {
    apply_totals(grads, *totals, coefficients);
    plan = without_factor(*totals);
    each = std::nullopt;
  }
  for (auto& [device, list] : devices) {
    OptimStep step = {rule_,
                      {},
                      groups,
                      {nullptr, nullptr, options.bound},
                      options.update_clip,
                      options.stochastic_rounding};
    const bool host = is_host(device);
    const auto here = [&, device = device](const MaybeTensor& t) {
      if (!t) return MaybeTensor();
      return MaybeTensor(host ? on_host(*t) : t->to(device));
    };
    const MaybeTensor plan_here = here(plan), each_here = here(each);
    if (plan_here) step.use.totals = plan_here->const_data_ptr<double>();
    if (each_here) step.use.coefficients = each_here->const_data_ptr<double>();
    std::vector<at::Tensor> lrs;
    for (size_t g = 0; g < groups.size(); ++g) {
      if (!lr_values[g]) continue;
      lrs.push_back(converted(lr_values[g]->to(device), at::kFloat));
      if (host)
        step.groups[g].lr = *lrs.back().const_data_ptr<float>();
      else
        step.groups[g].lr_value = lrs.back().const_data_ptr<float>();
    }
    for (Updated& u : list) {
      const at::Tensor& param = held_[u.index].param;
      const at::Tensor& like = layout_of(held_[u.index]);
      at::Tensor dense = like;
      if (!like.is_non_overlapping_and_dense()) dense = at::empty(like.sizes(), like.options());
      if (!same_strides(param, dense)) u.param = dense_copy(param, dense.strides());
      if (!same_strides(u.grad, dense) || u.grad.is_neg() || u.grad.is_conj())
        u.grad = dense_copy(u.grad.resolve_conj().resolve_neg(), dense.strides());
      step.params.push_back(ref_of(held_[u.index], u.param, u.grad, u.index));
    }
    if (host) {
      cpu::optim_step(step);
    } else {
#if defined(GRADFUSE_CUDA)
      on_device(device, [&](cudaStream_t stream) {
        const at::Tensor scratch = empty_on_device(
            {cuda::optim_scratch_bytes(step)},
            at::TensorOptions().dtype(at::kByte).device(list.front().param.device()));
        cuda::optim_step(step, scratch.mutable_data_ptr(), stream);
      });
#endif
    }
    for (const Updated& u : list)
      if (!u.param.is_same(held_[u.index].param)) held_[u.index].param.copy_(u.param);
  }
}

}  // namespace gradfuse
