// A Stepper's walk through the parameters, which checks them and their state.
//
// Thousands of small tensors lie in memory as they were made, so that their fields cost more than
// their elements: the walk asks for them ahead, and goes once.
#include "stepper.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/impl/COWDeleter.h>

#include "checks.h"
#include "dispatch.h"

namespace gradfuse {
namespace {

// Whether a tensor is one run of memory of its own, in the order of its indices, and so are its
// values. What nearly all are, and so told from the fewest fields.
inline bool is_plain_run(const at::Tensor& t) {
  using K = c10::DispatchKey;
  constexpr c10::DispatchKeySet others = kWrappers |
                                         c10::DispatchKeySet({K::Negative, K::Conjugate}) |
                                         c10::sparse_ks | c10::sparse_csr_ks | c10::mkldnn_ks;
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  const at::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (!storage || impl->key_set().has_any(others) || !impl->is_contiguous()) return false;
  const uint64_t end = static_cast<uint64_t>(impl->storage_offset() + impl->numel());
  const at::DataPtr& data = storage->data_ptr();
  return end * impl->dtype().itemsize() <= storage->nbytes() && (data || impl->numel() == 0) &&
         data.get_deleter() != c10::impl::cow::cow_deleter;
}

inline bool same_sizes(const at::Tensor& a, const at::Tensor& b) {
  const at::IntArrayRef x = a.sizes(), y = b.sizes();
  if (x.size() != y.size()) return false;
  for (size_t d = 0; d < x.size(); ++d)
    if (x[d] != y[d]) return false;
  return true;
}

// Whether moments of one type go with parameters of another.
bool type_fits(at::ScalarType moment, at::ScalarType param) {
  const bool short_param = param == at::kHalf || param == at::kBFloat16;
  return moment == param || (short_param && moment == at::kFloat);
}

}  // namespace

void Stepper::prefetch(size_t i) const {
  constexpr size_t kFar = 16, kMiddle = 10, kNear = 5;  // each needs what the one before brought
  if (i + kFar < held_.size()) {
    const Held& h = held_[i + kFar];
    prefetch_fields(h.param);
    __builtin_prefetch(h.autograd);
    __builtin_prefetch(static_cast<const char*>(h.autograd) + 64);
    for (const at::Tensor& t : h.tensors)
      if (t.defined()) prefetch_fields(t);
  }
  if (i + kMiddle < held_.size()) {
    const Held& h = held_[i + kMiddle];
    prefetch_storage(h.param);
    for (const at::Tensor& t : h.tensors)
      if (t.defined()) prefetch_storage(t);
    const at::Tensor& grad = h.param.unsafeGetTensorImpl()->grad();
    if (grad.defined()) prefetch_fields(grad);
  }
  if (i + kNear < held_.size()) {
    const at::Tensor& grad = held_[i + kNear].param.unsafeGetTensorImpl()->grad();
    if (grad.defined()) prefetch_storage(grad);
  }
}

Stepper::Walk Stepper::walk() const {
  Walk found;
  found.grads.tensors.resize(held_.size());
  for (size_t i = 0; i < held_.size(); ++i) {
    prefetch(i);
    const Held& h = held_[i];
    if (h.repeated) continue;
    const at::Tensor& grad = h.param.unsafeGetTensorImpl()->grad();
    if (!grad.defined()) continue;
    found.grads.tensors[i] = grad;
    const bool plain = is_plain(h, grad);
    const size_t list =
        plain ? add_plain_gradient(found.grads, i) : add_gradient(op(), found.grads, i);
    if (list == found.params.size()) {
      found.params.emplace_back();
      found.params.back().reserve(held_.size());
    }
    ParamRef ref = {};
    if (plain) {
      ref = ref_of(h, h.param, grad, i, false);
    } else {
      check_param(h, grad, i);
      ref.row = static_cast<int32_t>(i);
      found.odd.emplace_back(list, found.params[list].size());
    }
    found.params[list].push_back(ref);
  }
  return found;
}

const at::Tensor& Stepper::layout_of(const Held& h) const {
  for (int slot = 0; slot < kStep; ++slot)
    if (h.tensors[slot].defined()) return h.tensors[slot];
  return h.param;
}

bool Stepper::is_plain(const Held& h, const at::Tensor& grad) const {
  const at::Tensor& p = h.param;
  const at::Device device = p.device();
  if (!h.complete || !is_plain_run(p) || !device_is_supported(device.type()) ||
      !dtype_of(p.scalar_type()))
    return false;
  const auto goes_with = [&](const at::Tensor& t, caffe2::TypeMeta type) {
    return t.dtype() == type && is_plain_run(t) && t.device() == device && same_sizes(t, p);
  };
  if (!goes_with(grad, p.dtype())) return false;
  const caffe2::TypeMeta single = caffe2::TypeMeta::Make<float>();
  const at::Tensor &first = h.tensors[kFirst], &step = h.tensors[kStep];
  if (first.defined() && !type_fits(first.scalar_type(), p.scalar_type())) return false;
  for (Slot slot : {kFirst, kSecond, kLargest, kMaster}) {
    const at::Tensor& t = h.tensors[slot];
    if (t.defined() && !goes_with(t, slot == kMaster ? single : first.dtype())) return false;
  }
  return !step.defined() || (step.dtype() == single && is_plain_run(step) &&
                             step.device() == device && step.dim() == 0);
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
  if (!h.complete)
    fail<std::invalid_argument>(op(), ": expected a state, got none for parameter ", index,
                                "; did its gradient come after the step began?");
  const at::Tensor& first = h.tensors[kFirst];
  for (int slot = 0; slot < kSlots; ++slot) {
    const at::Tensor& t = h.tensors[slot];
    if (!t.defined()) continue;
    const bool is_step = slot == kStep;
    const at::ScalarType type = t.scalar_type();
    const bool type_is_right =
        slot == kStep || slot == kMaster
            ? type == at::kFloat
            : type == first.scalar_type() && type_fits(type, p.scalar_type());
    const bool fits = type_is_right && t.layout() == at::kStrided && !is_wrapper(t) &&
                      !missing_storage(t) && t.device() == p.device() &&
                      (is_step ? t.dim() == 0
                               : same_strides(t, layout_of(h)) && t.sizes().equals(p.sizes()) &&
                                     t.is_non_overlapping_and_dense());
    if (!fits)
      fail<std::invalid_argument>(op(), ": expected state ", name_of(rule_, slot), " of ",
                                  is_step ? at::IntArrayRef{} : p.sizes(), " on ", p.device(),
                                  " in the type of its parameter or float32, got ", t.sizes(),
                                  " of ", type, " on ", t.device(), " for parameter ", index);
  }
}

ParamRef Stepper::ref_of(const Held& h, const at::Tensor& param, const at::Tensor& grad,
                         size_t index, bool writes) const {
  const auto memory = [&](const at::Tensor& t) {
    if (!writes) return const_cast<void*>(t.const_data_ptr());
    return t.numel() ? t.mutable_data_ptr() : nullptr;
  };
  ParamRef r = {};
  const auto of_slot = [&](Slot slot) {
    return h.tensors[slot].defined() ? memory(h.tensors[slot]) : nullptr;
  };
  r.param = memory(param);
  r.grad = grad.const_data_ptr();
  r.first = of_slot(kFirst);
  r.second = of_slot(kSecond);
  r.largest = of_slot(kLargest);
  r.master = static_cast<float*>(of_slot(kMaster));
  r.step = static_cast<float*>(of_slot(kStep));
  r.numel = param.numel() * (param.is_complex() ? 2 : 1);
  r.dtype = *dtype_of(param.scalar_type());
  r.state_dtype =
      h.tensors[kFirst].defined() ? *dtype_of(h.tensors[kFirst].scalar_type()) : r.dtype;
  r.group = h.group;
  r.row = static_cast<int32_t>(index);
  return r;
}

}  // namespace gradfuse
