// Gradients as the kernels see them: checked, grouped by device.
#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <vector>

#include "../math/runs.h"

namespace gradfuse {

// The gradients that lie on one device.
struct DeviceGroup {
  at::Device device;
  std::vector<GradRef> refs;
  std::vector<int64_t> rows;  // of refs in the list
};

// A checked list of gradients. Holds references, so that they outlive a release of the GIL.
struct GradList {
  std::vector<at::Tensor> tensors;  // undefined where there is none, or a repeated one
  std::deque<StridedLayout> layouts;
  std::vector<DeviceGroup> groups;  // in order of first appearance
  bool any_double = false;

  // To be called before a write: copies copy-on-write storage, bumps autograd's versions.
  void prepare_write();
};

// Checks every tensor before anything is written. `writes` says that the caller may write.
GradList check_gradients(const char* op, std::vector<at::Tensor> tensors, bool writes);

// Checks list.tensors[index], which is there, and appends it to the group of its device, for
// callers that only read and go through the list themselves. Returns the group's number.
size_t add_gradient(const char* op, GradList& list, size_t index);
// The same for one that the caller found to be a dense run of memory of a supported type.
size_t add_dense_gradient(GradList& list, size_t index);

// Asks for the cache lines of a tensor's fields, and when they are there of its storage's:
// thousands of small tensors are thousands of cache misses.
void prefetch_fields(const at::Tensor& t);
void prefetch_storage(const at::Tensor& t);

// The fewest dimensions that describe the same elements, for a cheap walk. Null, and nothing added
// to `layouts`, for a tensor that is one dense run.
const StridedLayout* layout_of(const at::Tensor& t, std::deque<StridedLayout>& layouts);

}  // namespace gradfuse
