// Where a tensor's kernels run, memory and streams of that device, waits for it: what the functions
// above the launchers need to know of CPU and CUDA. tests/ptx/device.h stands in for this file
// where an emulator runs the CUDA kernels.
#ifndef GRADFUSE_DEVICE_H
#define GRADFUSE_DEVICE_H

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#if defined(GRADFUSE_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace gradfuse {

// Whether a device's kernels are those of cpu::, and the host may touch its memory.
inline bool is_host(at::Device device) { return device.is_cpu(); }

inline at::Tensor empty_on_device(at::IntArrayRef sizes, at::TensorOptions options) {
  return at::empty(sizes, options);
}
inline at::Tensor empty_on_device(at::IntArrayRef sizes, at::IntArrayRef strides,
                                  at::TensorOptions options) {
  return at::empty_strided(sizes, strides, options);
}

// A copy of a tensor with other strides, which leave no gap and no overlap.
inline at::Tensor dense_copy(const at::Tensor& t, at::IntArrayRef strides) {
  return at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
}

// A contiguous copy of a tensor in another type, unless it is one already.
inline at::Tensor converted(const at::Tensor& t, at::ScalarType type) {
  return t.to(type).resolve_neg().contiguous();
}

// The tensor where the host can read it. Waits for its device.
inline at::Tensor on_host(const at::Tensor& t) { return t.cpu(); }

#if defined(GRADFUSE_CUDA)
// Runs f(stream) on the device's current stream.
template <class F>
void on_device(at::Device device, F f) {
  const c10::cuda::CUDAGuard guard(device);
  f(c10::cuda::getCurrentCUDAStream().stream());
}
#endif

}  // namespace gradfuse

#endif
