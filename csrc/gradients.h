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
