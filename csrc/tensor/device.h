// Devices as the code above the launchers needs them: which kernels they run, their memory and
// streams, waiting for them. tests/ptx/emulator/device.h replaces this file where an emulator runs
// the CUDA kernels; dispatch.h includes one of the two.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
// Memory for a result that will be written whole. The system provides fresh memory page by page,
// which costs more than the writing, so large results on the host ask for pages of 2 MiB.
inline at::Tensor empty_strided_on_device(at::IntArrayRef sizes, at::IntArrayRef strides,
                                          at::TensorOptions options) {
  const at::Tensor t = at::empty_strided(sizes, strides, options);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (is_host(t.device()) && t.nbytes() >= 2 * kPage) {
    const uintptr_t data = reinterpret_cast<uintptr_t>(t.data_ptr());
    const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
    const uintptr_t end = (data + t.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may fail
  }
#endif
  return t;
}

// A copy of a tensor with other strides, which must be dense.
inline at::Tensor dense_copy(const at::Tensor& t, at::IntArrayRef strides) {
  return at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
}

// The tensor as contiguous in another type; a copy unless it already is.
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
