// Whether a tensor has the memory that its shape and strides need.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/COWDeleter.h>

#include <optional>

namespace gradfuse {

using MaybeTensor = std::optional<at::Tensor>;

// A tensor of a subclass or a transform: another tensor holds its values.
constexpr c10::DispatchKeySet kWrappers({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::FuncTorchBatched,
                                         c10::DispatchKey::FuncTorchGradWrapper,
                                         c10::DispatchKey::NestedTensor,
                                         c10::DispatchKey::ZeroTensor});
inline bool is_wrapper(const at::Tensor& t) {
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  return impl->key_set().has_any(kWrappers) || !impl->has_storage();
}

struct StorageBytes {
  uint64_t needed;
  uint64_t found;
};

// Set if the storage of a strided tensor is too small or was freed.
inline std::optional<StorageBytes> missing_storage(const at::Tensor& t) {
  if (t.numel() == 0) return std::nullopt;
  int64_t elements = t.storage_offset() + t.numel();
  if (!t.is_contiguous()) {
    elements = t.storage_offset() + 1;
    for (int64_t d = 0; d < t.dim(); ++d) elements += (t.size(d) - 1) * t.stride(d);
  }
  const at::StorageImpl* storage = t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  const uint64_t needed = static_cast<uint64_t>(elements) * t.element_size();
  if (storage->nbytes() >= needed && storage->data()) return std::nullopt;
  return StorageBytes{needed, storage->nbytes()};
}

// Whether both have the same sizes, and the same strides but for dimensions of size 1.
inline bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  if (!a.sizes().equals(b.sizes())) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Whether a tensor is contiguous, holds its values itself and shares no copy-on-write memory.
// Nearly all do, so this reads as few fields as possible, and is part of the loop over them.
[[gnu::always_inline]] inline bool is_dense_run(const at::Tensor& t) {
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

}  // namespace gradfuse
