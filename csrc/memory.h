// Whether a tensor has the memory that its shape and strides speak of.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace gradfuse {

using MaybeTensor = std::optional<at::Tensor>;

// A tensor of a subclass or a transform: what holds its values is another tensor.
inline bool is_wrapper(const at::Tensor& t) {
  using K = c10::DispatchKey;
  constexpr c10::DispatchKeySet wrappers({K::Python, K::Functionalize, K::FuncTorchBatched,
                                          K::FuncTorchGradWrapper, K::NestedTensor, K::ZeroTensor});
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  return impl->key_set().has_any(wrappers) || !impl->has_storage();
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

}  // namespace gradfuse
