// Gradients as the kernels see them: read out of Python, checked, grouped by device.
#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <string>
#include <vector>

#include "ops.h"

struct _object;
using PyObject = _object;

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

  // Announces a write: copies copy-on-write storage, counts up autograd's versions.
  void prepare_write();
};

// Whether the object is a torch.Tensor by its type. Not isinstance, which believes a proxy or a
// mock.
bool is_tensor(PyObject* object);

// The tensors of a Python iterable, or their .grad. None and missing gradients become undefined.
std::vector<at::Tensor> read_tensors(const char* op, PyObject* iterable, bool of_grad);

// Checks every tensor before anything is written. `writes` says that the caller may write.
GradList check_gradients(const char* op, std::vector<at::Tensor> tensors, bool writes);

// Checks list.tensors[index], which is there, and appends it to the group of its device, for
// callers that only read and go through the list themselves. Returns the group's number.
size_t add_gradient(const char* op, GradList& list, size_t index);
// The same for one that the caller found to be a dense run of memory of a supported type.
size_t add_plain_gradient(GradList& list, size_t index);

// Asks for the cache lines of a tensor's fields, and when they are there of its storage's:
// thousands of small tensors are thousands of cache misses.
void prefetch_fields(const at::Tensor& t);
void prefetch_storage(const at::Tensor& t);

// Parameters and their gradients, cut into the units of adaptive clipping: the rows along the first
// dimension, or the whole of a vector or scalar. Both lists have the same groups and rows.
struct UnitList {
  GradList weights, grads;

  // The units of one device, in order; zero-size parameters are left out.
  std::vector<UnitRef> refs(size_t group);
};
UnitList check_units(const char* op, std::vector<at::Tensor> weights,
                     std::vector<at::Tensor> grads);

}  // namespace gradfuse
