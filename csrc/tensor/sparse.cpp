#include "sparse.h"

#include <ATen/SparseTensorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>

namespace gradfuse {

at::Tensor coalesced_values(const at::Tensor& t) {
  const at::AutoDispatchBelowAutograd guard;
  if (!t.is_coalesced()) {
    const at::Tensor sum = t.coalesce();
    auto* const impl = static_cast<at::SparseTensorImpl*>(t.unsafeGetTensorImpl());
    impl->set_indices_and_values_unsafe(sum._indices(), sum._values());
    impl->set_coalesced(true);
  }
  return t._values();
}

}  // namespace gradfuse
