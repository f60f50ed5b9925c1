#include "grad_list.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>

#include "../cpu/parallel.h"
#include "../math/prefetch.h"
#include "address_set.h"
#include "checks.h"
#include "dispatch.h"
#include "dtype.h"
#include "sparse.h"
#include "storage.h"
#include "version.h"

namespace gradfuse {
namespace {

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

// Throws unless a tensor has plain memory of its own, and as much as its shape needs.
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

size_t append(GradList& list, const GradRef& ref, size_t index, at::Device device) {
  const size_t number = group_of(list.groups, device, list.tensors.size());
  list.groups[number].refs.push_back(ref);
  list.groups[number].rows.push_back(static_cast<int64_t>(index));
  list.any_double |= ref.dtype == DType::Double;
  return number;
}

}  // namespace

void GradList::prepare_write() {
  for (const auto& [number, place] : others) {
    DeviceGroup& group = groups[number];
    const at::Tensor& t = tensors[group.rows[place]];
    if (t.numel()) group.refs[place].data = t.mutable_data_ptr();
  }
  for (const DeviceGroup& group : groups)
    bump_versions(group.rows.size(), [&](size_t i, auto f) { f(tensors[group.rows[i]]); });
  for (const at::Tensor& t : sparse) bump_version(t);
}

namespace {

bool same_layout(const StridedLayout* a, const StridedLayout* b) {
  if (!a || !b) return a == b;
  return a->sizes == b->sizes && a->strides == b->strides;
}

}  // namespace

void prefetch_fields(const at::Tensor& t) {
  const char* impl = reinterpret_cast<const char*>(t.unsafeGetTensorImpl());
  for (size_t line = 0; line < sizeof(at::TensorImpl); line += 64) prefetch_line(impl + line);
  prefetch_line(impl + sizeof(at::TensorImpl) - 1);
}

void prefetch_storage(const at::Tensor& t) {
  const char* storage = reinterpret_cast<const char*>(
      t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
  prefetch_line(storage);
  prefetch_line(storage + 64);
}

const StridedLayout* layout_of(const at::Tensor& t, std::deque<StridedLayout>& layouts) {
  if (t.is_non_overlapping_and_dense()) return nullptr;
  layouts.push_back(coalesced_layout(t));
  return &layouts.back();
}

size_t add_gradient(const char* op, GradList& list, size_t index) {
  return append(list, ref_of(op, list, index), index, list.tensors[index].device());
}

size_t add_dense_gradient(GradList& list, size_t index, const GradRef& ref, at::Device device) {
  return append(list, ref, index, device);
}

std::optional<size_t> find_same(const GradList& list, const GradRef& ref) {
  for (const DeviceGroup& group : list.groups)
    for (size_t i = 0; i < group.refs.size(); ++i) {
      const GradRef& other = group.refs[i];
      if (other.data == ref.data && other.numel == ref.numel && other.dtype == ref.dtype &&
          other.is_complex == ref.is_complex && same_layout(other.layout, ref.layout))
        return static_cast<size_t>(group.rows[i]);
    }
  return std::nullopt;
}

size_t add_repeat(GradList& list, size_t index, size_t first) {
  list.repeats.emplace_back(index, first);
  return group_of(list.groups, list.tensors[first].device(), 0);
}

namespace {

// A tensor that is a dense run of a supported type and device, as nearly all are.
struct DenseRef {
  bool found = false;
  GradRef ref;
  at::Device device = at::kCPU;
};

DenseRef dense_ref(const at::Tensor& t) {
  DenseRef out;
  if (!t.defined() || !is_dense_run(t)) return out;
  const std::optional<DType> dtype = dtype_of(t.scalar_type());
  out.device = t.device();
  out.found = dtype && device_is_supported(out.device.type());
  if (out.found)
    out.ref = {t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr, t.numel(), *dtype,
               t.is_complex(), nullptr};
  return out;
}

// Threads share this, for it waits for the fields of scattered tensors.
std::vector<DenseRef> dense_refs(const std::vector<at::Tensor>& tensors) {
  std::vector<DenseRef> out(tensors.size());
  cpu::for_each_run(static_cast<int64_t>(tensors.size()), [&](size_t begin, size_t end) {
    prefetched(
        begin, end, [&](size_t i) { out[i] = dense_ref(tensors[i]); },
        ahead(12, [&](size_t i) { prefetch_fields(tensors[i]); }),
        ahead(6, [&](size_t i) { prefetch_storage(tensors[i]); }));
  });
  return out;
}

}  // namespace

GradList check_gradients(const char* op, std::vector<at::Tensor> tensors, Access access) {
  GradList list;
  list.tensors = std::move(tensors);
  const size_t n = list.tensors.size();
  const bool writes = access == Access::Write;
  AddressSet seen(access == Access::Read ? 0 : n);
  const std::vector<DenseRef> dense = dense_refs(list.tensors);
  for (size_t i = 0; i < n; ++i) {
    at::Tensor& t = list.tensors[i];
    if (!t.defined()) continue;
    if (!dense[i].found && t.is_sparse()) {
      list.sparse.push_back(t);
      t = coalesced_values(t);
    }
    const GradRef ref = dense[i].found ? dense[i].ref : ref_of(op, list, i);
    if (writes && !dense[i].found && !t.is_non_overlapping_and_dense() &&
        at::has_internal_overlap(t) == at::MemOverlap::Yes)
      fail<std::runtime_error>(op,
                               ": expected gradients with an element per memory location, got an "
                               "expanded one for tensor ",
                               i, "; .clone() it first");
    if (access != Access::Read && ref.numel && !seen.insert(ref.data)) {
      if (const std::optional<size_t> first = find_same(list, ref)) {
        add_repeat(list, i, *first);
        continue;
      }
      if (writes)  // threads would write the same memory twice
        fail<std::runtime_error>(op,
                                 ": expected gradients that do not overlap in memory, got one that "
                                 "begins where another does for tensor ",
                                 i, "; .clone() it first");
    }
    const size_t number = append(list, ref, i, dense[i].found ? dense[i].device : t.device());
    if (!dense[i].found) list.others.emplace_back(number, list.groups[number].refs.size() - 1);
  }
  return list;
}

}  // namespace gradfuse
