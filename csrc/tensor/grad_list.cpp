#include "grad_list.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>

#include "../math/prefetch.h"
#include "checks.h"
#include "dispatch.h"
#include "dtype.h"
#include "storage.h"

namespace gradfuse {
namespace {

// A set of addresses, for finding gradients that come twice. Open addressing: a std::unordered_set
// costs more than the kernels do on thousands of small tensors.
class AddressSet {
 public:
  explicit AddressSet(size_t n) : shift_(64) {
    size_t size = 1;
    while (size < 2 * n + 1) size *= 2, --shift_;
    slots_.assign(size, nullptr);
  }
  bool insert(const void* p) {
    const size_t mask = slots_.size() - 1;
    size_t i = shift_ == 64 ? 0 : (reinterpret_cast<uint64_t>(p) * 0x9e3779b97f4a7c15u) >> shift_;
    for (; slots_[i]; i = (i + 1) & mask)
      if (slots_[i] == p) return false;
    slots_[i] = p;
    return true;
  }

 private:
  std::vector<const void*> slots_;
  int shift_;
};

// The fewest dimensions that describe the same elements, outermost first, for a cheap walk.
StridedLayout coalesced_layout(const at::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::stable_sort(dims.begin(), dims.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  StridedLayout layout;
  for (const auto& [stride, size] : dims) {
    if (!layout.sizes.empty() && layout.strides.back() == stride * size) {
      layout.sizes.back() *= size;
      layout.strides.back() = stride;
    } else {
      layout.sizes.push_back(size);
      layout.strides.push_back(stride);
    }
  }
  return layout;
}

// Refuses what has no plain memory behind it, or less than its shape says.
void check_storage(const char* op, const at::Tensor& t, size_t index) {
  if (t.layout() != at::kStrided)
    fail<TypeError>(op, ": expected dense gradients, got layout ", t.layout(), " for tensor ",
                    index, "; convert it with .to_dense() or clip it apart");
  if (!device_is_supported(t.device().type()))
    fail<TypeError>(op, ": expected gradients on cpu or a cuda device this build supports, got ",
                    t.device(), " for tensor ", index);
  if (is_wrapper(t))
    fail<TypeError>(op,
                    ": expected plain tensors, got a wrapper without memory of its own for tensor ",
                    index, "; unwrap it first");
  if (const auto lack = missing_storage(t))
    fail<std::runtime_error>(op, ": expected storage of at least ", lack->needed, " bytes, got ",
                             lack->found, " for tensor ", index, "; was it resized or freed?");
}

GradRef make_ref(const char* op, const at::Tensor& t, size_t index) {
  const std::optional<DType> dtype = dtype_of(t.scalar_type());
  if (!dtype)
    fail<TypeError>(op,
                    ": expected float16, bfloat16, float32, float64, complex64 or complex128, got ",
                    t.scalar_type(), " for tensor ", index);
  check_storage(op, t, index);
  return {t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr, t.numel(), *dtype,
          t.is_complex(), nullptr};
}

size_t group_of(std::vector<DeviceGroup>& groups, at::Device device, size_t capacity) {
  for (size_t i = 0; i < groups.size(); ++i)
    if (groups[i].device == device) return i;
  groups.push_back({device, {}, {}});
  groups.back().refs.reserve(capacity);
  groups.back().rows.reserve(capacity);
  return groups.size() - 1;
}

// A checked gradient with its layout.
GradRef ref_of(const char* op, GradList& list, size_t index) {
  const at::Tensor& t = list.tensors[index];
  GradRef ref = make_ref(op, t, index);
  if (ref.numel) ref.layout = layout_of(t, list.layouts);
  return ref;
}

size_t append(GradList& list, const GradRef& ref, size_t index) {
  const size_t number = group_of(list.groups, list.tensors[index].device(), list.tensors.size());
  list.groups[number].refs.push_back(ref);
  list.groups[number].rows.push_back(static_cast<int64_t>(index));
  list.any_double |= ref.dtype == DType::Double;
  return number;
}

}  // namespace

void GradList::prepare_write() {
  for (DeviceGroup& group : groups) {
    for (size_t i = 0; i < group.refs.size(); ++i) {
      const at::Tensor& t = tensors[group.rows[i]];
      if (t.numel()) group.refs[i].data = t.mutable_data_ptr();
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    }
  }
}

namespace {

bool same_layout(const StridedLayout* a, const StridedLayout* b) {
  if (!a || !b) return a == b;
  return a->sizes == b->sizes && a->strides == b->strides;
}

// A gradient that begins where an earlier one does counts once if it is that one, or a view of all
// of it, and is refused otherwise: threads would write the same memory twice.
void check_same_run(const char* op, const GradList& list, const GradRef& ref, size_t index) {
  for (const DeviceGroup& group : list.groups)
    for (const GradRef& earlier : group.refs)
      if (earlier.data == ref.data &&
          (earlier.numel != ref.numel || earlier.dtype != ref.dtype ||
           earlier.is_complex != ref.is_complex || !same_layout(earlier.layout, ref.layout)))
        fail<std::runtime_error>(op,
                                 ": expected gradients that do not overlap in memory, got one that "
                                 "begins where another does for tensor ",
                                 index, "; .clone() it first");
}

}  // namespace

void prefetch_fields(const at::Tensor& t) {
  const char* impl = reinterpret_cast<const char*>(t.unsafeGetTensorImpl());
  for (size_t line = 0; line < sizeof(at::TensorImpl); line += 64) __builtin_prefetch(impl + line);
  __builtin_prefetch(impl + sizeof(at::TensorImpl) - 1);
}

void prefetch_storage(const at::Tensor& t) {
  if (!t.has_storage()) return;
  const char* storage = reinterpret_cast<const char*>(
      t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
  __builtin_prefetch(storage);
  __builtin_prefetch(storage + 64);
}

const StridedLayout* layout_of(const at::Tensor& t, std::deque<StridedLayout>& layouts) {
  if (t.is_non_overlapping_and_dense()) return nullptr;
  layouts.push_back(coalesced_layout(t));
  return &layouts.back();
}

size_t add_gradient(const char* op, GradList& list, size_t index) {
  return append(list, ref_of(op, list, index), index);
}

size_t add_dense_gradient(GradList& list, size_t index) {
  const at::Tensor& t = list.tensors[index];
  return append(list,
                {const_cast<void*>(t.const_data_ptr()), t.numel(), *dtype_of(t.scalar_type()),
                 t.is_complex(), nullptr},
                index);
}

GradList check_gradients(const char* op, std::vector<at::Tensor> tensors, bool writes) {
  GradList list;
  list.tensors = std::move(tensors);
  const size_t n = list.tensors.size();
  AddressSet seen(writes ? n : 0);
  const auto add = [&](size_t i) {
    at::Tensor& t = list.tensors[i];
    if (!t.defined()) return;
    const GradRef ref = ref_of(op, list, i);
    if (writes && !t.is_non_overlapping_and_dense() &&
        at::has_internal_overlap(t) == at::MemOverlap::Yes)
      fail<std::runtime_error>(op,
                               ": expected gradients with an element per memory location, got an "
                               "expanded one for tensor ",
                               i, "; .clone() it first");
    if (writes && ref.numel && !seen.insert(ref.data)) {
      check_same_run(op, list, ref, i);
      t.reset();
      return;
    }
    append(list, ref, i);
  };
  // Threads do not help, for the misses then are on each other's lines.
  prefetched(n, add, ahead(12, [&](size_t i) { prefetch_fields(list.tensors[i]); }),
             ahead(6, [&](size_t i) { prefetch_storage(list.tensors[i]); }));
  return list;
}

}  // namespace gradfuse
