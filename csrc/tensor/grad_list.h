// Gradients as the kernels see them: checked, grouped by device.
#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "../math/runs.h"

namespace gradfuse {

// The gradients that lie on one device.
struct DeviceGroup {
  at::Device device;
  std::vector<GradRef> refs;
  std::vector<int64_t> rows;  // index of each ref in the list
};

// A checked list of gradients. Holds references, so that they outlive a release of the GIL.
struct GradList {
  std::vector<at::Tensor> tensors;  // undefined if missing; of a sparse one, its values
  std::deque<StridedLayout> layouts;
  std::vector<DeviceGroup> groups;  // in order of first appearance
  // (index, that of the same gradient): elements given again, which are in no group.
  std::vector<std::pair<size_t, size_t>> repeats;
  std::vector<at::Tensor> sparse;  // the sparse ones themselves
  // (group, place in it) of those that are no dense runs, and may have copy-on-write storage.
  std::vector<std::pair<size_t, size_t>> others;
  bool any_double = false;

  // To be called before a write: copies copy-on-write storage, bumps autograd's versions.
  void prepare_write();
};

// What a caller does with a list. A gradient that is given twice counts twice where it is only
// read, unless it is that of a step. One that is written counts once, and may overlap no other.
enum class Access { Read, ReadOnce, Write };

// Checks every tensor before anything is written.
GradList check_gradients(const char* op, std::vector<at::Tensor> tensors, Access access);

// Checks list.tensors[index], which must be defined, and appends it to the group of its device. For
// callers that only read and iterate over the list themselves. Returns the group's number.
size_t add_gradient(const char* op, GradList& list, size_t index);
// The same for a tensor that the caller knows to be a dense run of a supported type.
size_t add_dense_gradient(GradList& list, size_t index, const GradRef& ref, at::Device device);
// The same for one that is that of another index.
size_t add_repeat(GradList& list, size_t index, size_t first);
// The index of the earlier gradient with the elements of this one, whose address is not new.
std::optional<size_t> find_same(const GradList& list, const GradRef& ref);

// Prefetch the cache lines of a tensor's fields and, once these have arrived, its storage's:
// thousands of small tensors are thousands of cache misses.
void prefetch_fields(const at::Tensor& t);
void prefetch_storage(const at::Tensor& t);

// The fewest dimensions that describe the same elements, for a cheap walk. Null, with nothing added
// to `layouts`, for a tensor that is one dense run.
const StridedLayout* layout_of(const at::Tensor& t, std::deque<StridedLayout>& layouts);

}  // namespace gradfuse
