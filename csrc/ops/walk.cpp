#include "walk.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <optional>

#include "../cpu/parallel.h"
#include "../math/prefetch.h"
#include "../tensor/address_set.h"
#include "../tensor/checks.h"
#include "../tensor/dispatch.h"
#include "../tensor/dtype.h"
#include "../tensor/sparse.h"
#include "../tensor/storage.h"
#include "overlap.h"

namespace gradfuse {
namespace {

using Held = HeldParams::Held;

[[gnu::always_inline]] inline bool same_sizes(const at::Tensor& a, const at::Tensor& b) {
  const at::IntArrayRef x = a.sizes(), y = b.sizes();
  if (x.size() != y.size()) return false;
  for (size_t d = 0; d < x.size(); ++d)
    if (x[d] != y[d]) return false;
  return true;
}

// Whether moments or gradients of one type fit parameters of another.
bool type_fits(at::ScalarType type, at::ScalarType param) {
  const bool short_param = param == at::kHalf || param == at::kBFloat16;
  return type == param || (short_param && type == at::kFloat);
}

// Whether a tensor of the state is a number about the parameter, and not of its shape.
bool is_number(int slot) { return slot >= kStep; }
caffe2::TypeMeta type_of_number(int slot) {
  return slot == kStep ? caffe2::TypeMeta::Make<float>() : caffe2::TypeMeta::Make<double>();
}

// Whether parameter, gradient and state are dense runs of one shape and device, of matching types.
[[gnu::always_inline]] inline bool is_dense(const Held& h, const at::Tensor& grad) {
  const at::Tensor& p = h.param();
  const at::Device device = p.device();
  if (!h.complete || device != h.device || !is_dense_run(p) ||
      !device_is_supported(device.type()) || !dtype_of(p.scalar_type()))
    return false;
  const auto goes_with = [&](const at::Tensor& t,
                             caffe2::TypeMeta type) __attribute__((always_inline)) {
    return t.dtype() == type && is_dense_run(t) && t.device() == device && same_sizes(t, p);
  };
  if (!goes_with(grad, grad.dtype()) || !type_fits(grad.scalar_type(), p.scalar_type()))
    return false;
  const caffe2::TypeMeta single = caffe2::TypeMeta::Make<float>();
  const at::Tensor& moment = h.tensors[kExpAvg];
  if (moment.defined() && !type_fits(moment.scalar_type(), p.scalar_type())) return false;
  for (Slot slot : {kExpAvg, kExpAvgSq, kMaxExpAvgSq, kMasterParam}) {
    const at::Tensor& t = h.tensors[slot];
    if (t.defined() && !goes_with(t, slot == kMasterParam ? single : moment.dtype())) return false;
  }
  for (Slot slot : {kStep, kWeightSum, kLrMax}) {
    const at::Tensor& t = h.tensors[slot];
    if (t.defined() && !(t.dtype() == type_of_number(slot) && is_dense_run(t) &&
                         t.device() == device && t.dim() == 0))
      return false;
  }
  return true;
}

// Whether a tensor of the state has the type, device and layout that its parameter asks for.
bool state_fits(const Held& h, int slot) {
  const at::Tensor &p = h.param(), &t = h.tensors[slot], &moment = h.tensors[kExpAvg];
  const at::ScalarType type = t.scalar_type();
  bool type_is_right = type == moment.scalar_type() && type_fits(type, p.scalar_type());
  if (slot == kMasterParam) type_is_right = type == at::kFloat;
  if (is_number(slot)) type_is_right = t.dtype() == type_of_number(slot);
  if (!type_is_right || t.layout() != at::kStrided || is_wrapper(t) || missing_storage(t) ||
      t.device() != p.device())
    return false;
  if (is_number(slot)) return is_dense_run(t) && t.dim() == 0;
  return same_strides(t, layout_of(h)) && t.sizes().equals(p.sizes()) &&
         t.is_non_overlapping_and_dense();
}

// Throws unless the parameter can be updated.
void check_param(const HeldParams& held, size_t index) {
  const Held& h = held[index];
  const at::Tensor &p = h.param(), &grad = h.grad();
  const char* const op = held.op();
  if (!grad.sizes().equals(p.sizes()) || !type_fits(grad.scalar_type(), p.scalar_type()) ||
      grad.device() != p.device())
    fail<std::invalid_argument>(op,
                                ": expected a gradient of the parameter's shape and device, of its "
                                "dtype or float32 for a 16-bit one, ",
                                p.sizes(), " of ", p.scalar_type(), " on ", p.device(), ", got ",
                                grad.sizes(), " of ", grad.scalar_type(), " on ", grad.device(),
                                " for parameter ", index);
  if (p.layout() != at::kStrided || is_wrapper(p) || missing_storage(p) || p.is_neg() ||
      p.is_conj() || (p.numel() && at::has_internal_overlap(p) == at::MemOverlap::Yes))
    fail<TypeError>(op,
                    ": expected plain dense parameters with an element per memory location, "
                    "got another kind for parameter ",
                    index);
  if (!h.complete)
    fail<std::invalid_argument>(op, ": expected a state, got none for parameter ", index,
                                "; did its gradient come after the step began?");
  for (int slot = 0; slot < kSlots; ++slot)
    if (h.tensors[slot].defined() && !state_fits(h, slot)) {
      const at::Tensor& t = h.tensors[slot];
      fail<std::invalid_argument>(op, ": expected state ", held.slot_name(slot), " of ",
                                  is_number(slot) ? at::IntArrayRef() : p.sizes(), " on ",
                                  p.device(),
                                  is_number(slot) ? " in " : " in the type of its parameter or ",
                                  slot > kStep ? "float64" : "float32", ", got ", t.sizes(), " of ",
                                  t.scalar_type(), " on ", t.device(), " for parameter ", index);
    }
}

// Prefetch in the order in which addresses become known: the tensors of a parameter and its state,
// then their storages and the gradient, then the gradient's storage.
void prefetch_tensors(const Held& h) {
  prefetch_fields(h.param());
  prefetch_line(h.autograd);
  prefetch_line(static_cast<const char*>(h.autograd) + 64);
  for (const at::Tensor& t : h.tensors)
    if (t.defined()) prefetch_fields(t);
}
void prefetch_storages(const Held& h) {
  prefetch_storage(h.param());
  for (const at::Tensor& t : h.tensors)
    if (t.defined()) prefetch_storage(t);
  const at::Tensor& grad = h.grad();
  if (grad.defined()) prefetch_fields(grad);
}
void prefetch_grad_storage(const Held& h) {
  const at::Tensor& grad = h.grad();
  if (grad.defined()) prefetch_storage(grad);
}

// Puts the values of a sparse gradient in its place.
void read_sparse(const HeldParams& held, size_t index, GradList& grads) {
  if (held.rule() != Rule::Sgd)
    fail<std::runtime_error>(held.op(), ": ", names_of(held.rule()).name,
                             " does not support sparse gradients, got one for parameter ", index,
                             "; consider torch.optim.SparseAdam");
  at::Tensor& grad = grads.tensors[index];
  grads.sparse.push_back(grad);
  grad = coalesced_values(grad);
}

// Whether another parameter may have this gradient too: someone else refers to it or its memory.
bool may_be_shared(const at::Tensor& grad) {
  const c10::Storage& storage = grad.unsafeGetTensorImpl()->unsafe_storage();
  return grad.use_count() > 1 || storage.use_count() > 1;
}

// What the fields of a parameter, its gradient and its state say.
struct Seen {
  bool has_grad, dense, shared, moved, is_complex;
  ParamRef ref;  // if dense

  GradRef grad() const {
    return {const_cast<void*>(ref.grad), is_complex ? ref.numel / 2 : ref.numel, ref.grad_dtype,
            is_complex, nullptr};
  }
};

Seen look_at(const Held& h, size_t index) {
  Seen seen = {};
  const at::Tensor& grad = h.grad();
  seen.has_grad = !h.repeated && grad.defined();
  if (!seen.has_grad) return seen;
  seen.dense = is_dense(h, grad);
  seen.shared = seen.dense && may_be_shared(grad);
  seen.is_complex = h.param().is_complex();
  if (seen.dense) seen.ref = ref_of(h, h.param(), grad, index, false);
  const void* const place = seen.dense ? seen.ref.param : begin_of(h.param());
  seen.moved = h.place != place || h.numel != h.param().numel();
  return seen;
}

// Looks at all parameters and keeps their gradients alive. Thousands of small ones are scattered in
// memory, so that this waits for memory most of the time, and threads share it.
std::vector<Seen> look_at_all(const HeldParams& held, std::vector<at::Tensor>& grads) {
  std::vector<Seen> all(held.size());
  grads.resize(held.size());
  cpu::for_each_run(static_cast<int64_t>(held.size()), [&](size_t begin, size_t end) {
    prefetched(
        begin, end,
        [&](size_t i) {
          all[i] = look_at(held[i], i);
          if (all[i].has_grad) grads[i] = held[i].grad();
        },
        ahead(16, [&](size_t i) { prefetch_tensors(held[i]); }),
        ahead(10, [&](size_t i) { prefetch_storages(held[i]); }),
        ahead(5, [&](size_t i) { prefetch_grad_storage(held[i]); }));
  });
  return all;
}

}  // namespace

const at::Tensor& layout_of(const HeldParams::Held& h) {
  for (int slot = 0; slot < kStep; ++slot)
    if (h.tensors[slot].defined()) return h.tensors[slot];
  return h.param();
}

Walk walk(HeldParams& held) {
  Walk found;
  GradList& grads = found.grads;
  const std::vector<Seen> all = look_at_all(held, grads.tensors);
  std::optional<AddressSet> addresses;  // of shared gradients
  bool moved = false;

  // Adds a dense gradient, or notes which earlier one it is; returns the number of its list.
  const auto add_dense = [&](size_t i, const Seen& seen) {
    const GradRef ref = seen.grad();
    if (seen.shared && ref.numel) {
      if (!addresses) addresses.emplace(held.size());
      if (!addresses->insert(ref.data))
        if (const std::optional<size_t> first = find_same(grads, ref))
          return add_repeat(grads, i, *first);
    }
    return add_dense_gradient(grads, i, ref, held[i].device);
  };
  for (size_t i = 0; i < held.size(); ++i) {
    const Seen& seen = all[i];
    if (!seen.has_grad) continue;
    if (!seen.dense && grads.tensors[i].is_sparse()) read_sparse(held, i, grads);
    const size_t list = seen.dense ? add_dense(i, seen) : add_gradient(held.op(), grads, i);
    if (list == found.params.size()) {
      found.params.emplace_back();
      found.params.back().reserve(held.size());
    }
    if (!seen.dense) {
      check_param(held, i);
      found.noncontiguous.emplace_back(list, found.params[list].size());
    }
    found.params[list].push_back(seen.ref);
    found.params[list].back().row = static_cast<int32_t>(i);
    moved |= seen.moved;
    found.last_layer = std::max(found.last_layer, held[i].layer);
  }
  if (moved) found.last_layer = find_layers(held);
  return found;
}

ParamRef ref_of(const HeldParams::Held& h, const at::Tensor& param, const at::Tensor& grad,
                size_t index, bool writes) {
  const auto memory = [&](const at::Tensor& t) __attribute__((always_inline)) {
    if (!writes) return const_cast<void*>(t.const_data_ptr());
    return t.numel() ? t.mutable_data_ptr() : nullptr;
  };
  ParamRef r = {};
  const auto of_slot = [&](Slot slot) __attribute__((always_inline)) {
    return h.tensors[slot].defined() ? memory(h.tensors[slot]) : nullptr;
  };
  r.param = memory(param);
  r.grad = grad.const_data_ptr();
  r.exp_avg = of_slot(kExpAvg);
  r.exp_avg_sq = of_slot(kExpAvgSq);
  r.max_exp_avg_sq = of_slot(kMaxExpAvgSq);
  r.master = static_cast<float*>(of_slot(kMasterParam));
  r.step = static_cast<float*>(of_slot(kStep));
  r.weight_sum = static_cast<double*>(of_slot(kWeightSum));
  r.lr_max = static_cast<double*>(of_slot(kLrMax));
  r.numel = param.numel() * (param.is_complex() ? 2 : 1);
  r.dtype = *dtype_of(param.scalar_type());
  r.grad_dtype = *dtype_of(grad.scalar_type());
  const at::Tensor& moment = h.tensors[kExpAvg];
  r.state_dtype = moment.defined() ? *dtype_of(moment.scalar_type()) : r.dtype;
  r.group = h.group;
  r.row = static_cast<int32_t>(index);
  return r;
}

}  // namespace gradfuse
