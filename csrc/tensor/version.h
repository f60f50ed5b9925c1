// Autograd's versions of tensors, which a write bumps.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>

#include "../cpu/parallel.h"
#include "../math/prefetch.h"

namespace gradfuse {

inline void bump_version(const at::Tensor& t) {
  if (t.defined() && !t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// Prefetch what bump_version reads and, once it has arrived, the counter that it changes.
inline void prefetch_version_field(const at::Tensor& t) {
  if (!t.defined()) return;
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  prefetch_line(&impl->version_counter());
  prefetch_line(impl + 1);  // the keys, which are the last of its fields
}
inline void prefetch_version(const at::Tensor& t) {
  if (!t.defined()) return;
  // A VariableVersion is a private pointer to the counter.
  const c10::VariableVersion& version = t.unsafeGetTensorImpl()->version_counter();
  static_assert(sizeof(version) == sizeof(void*));
  const void* counter;
  std::memcpy(&counter, &version, sizeof(counter));
  prefetch_line<true>(counter);
}

// Bumps the versions of n groups of tensors: for_each_tensor(i, f) calls f with each of group i.
template <class F>
void bump_versions(size_t n, F for_each_tensor) {
  const auto all = [&](auto f) {
    return [&for_each_tensor, f](size_t i) { for_each_tensor(i, f); };
  };
  cpu::for_each_run(static_cast<int64_t>(n), [&](size_t begin, size_t end) {
    prefetched(begin, end, all(bump_version), ahead(12, all(prefetch_version_field)),
               ahead(6, all(prefetch_version)));
  });
}

}  // namespace gradfuse
