// Whether a tensor has the memory that its shape and strides speak of.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace gradfuse {

using MaybeTensor = std::optional<at::Tensor>;

// A tensor of a subclass or a transform: what holds its values is another tensor.
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

// For a strided tensor whose storage is smaller than it says, or was freed.
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

// Whether elements of the same indices are as far apart in both.
inline bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  if (!a.sizes().equals(b.sizes())) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

}  // namespace gradfuse
