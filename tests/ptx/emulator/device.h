// Replaces csrc/tensor/device.h in the emulated build: every tensor is on the device, whose memory
// is the host's. Allocations are registered with the emulator and filled with garbage.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <cuda_runtime_api.h>

#include <stdexcept>

namespace gradfuse {

inline bool is_host(at::Device) { return false; }

inline at::Tensor empty_on_device(at::IntArrayRef sizes, at::TensorOptions options) {
  int64_t bytes = options.dtype().itemsize();
  for (int64_t size : sizes) bytes *= size;
  void* data = nullptr;
  if (cudaMalloc(&data, bytes) != cudaSuccess) throw std::runtime_error("out of memory");
  return at::from_blob(data, sizes, [](void* p) { cudaFree(p); }, options);
}

inline at::Tensor empty_strided_on_device(at::IntArrayRef sizes, at::IntArrayRef strides,
                                          at::TensorOptions options) {
  return empty_on_device(sizes, options).as_strided(sizes, strides);
}

inline at::Tensor converted(const at::Tensor& t, at::ScalarType type) {
  const at::Tensor from = t.to(type).resolve_neg().contiguous();
  const at::Tensor out = empty_on_device(from.sizes(), from.options());
  cudaMemcpyAsync(out.data_ptr(), from.data_ptr(), from.nbytes(), cudaMemcpyDeviceToDevice, {});
  return out;
}

inline at::Tensor dense_copy(const at::Tensor& t, at::IntArrayRef strides) {
  const at::Tensor from = at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
  const at::Tensor out = empty_strided_on_device(t.sizes(), strides, t.options());
  cudaMemcpyAsync(out.data_ptr(), from.data_ptr(), from.nbytes(), cudaMemcpyDeviceToDevice, {});
  return out;
}

inline at::Tensor on_host(const at::Tensor& t) {
  const at::Tensor out = at::empty(t.sizes(), t.options());
  cudaMemcpy(out.data_ptr(), t.data_ptr(), t.nbytes(), cudaMemcpyDeviceToHost);
  return out;
}

template <class F>
void on_device(at::Device, F f) {
  f(cudaStream_t{});
}

}  // namespace gradfuse
