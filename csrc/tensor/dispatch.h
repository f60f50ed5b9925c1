// Picks the device's kernels for a call.
#pragma once

// The emulated build of tests/ptx/emulator passes its own.
#if defined(GRADFUSE_DEVICE_HEADER)
#include GRADFUSE_DEVICE_HEADER
#else
#include "device.h"
#endif

namespace gradfuse {

inline bool device_is_supported(at::DeviceType type) {
#if defined(GRADFUSE_CUDA)
  if (type == at::kCUDA) return true;
#endif
  return type == at::kCPU;
}

// Calls cpu(), or cuda(stream) with the device's current stream. A build without CUDA never calls
// `cuda`, so it needs only the declarations of cuda::.
template <class Cpu, class Cuda>
void run_on(at::Device device, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (is_host(device)) return cpu();
#if defined(GRADFUSE_CUDA)
  on_device(device, cuda);
#endif
}

inline at::Tensor scratch_on(at::Device device, int64_t bytes) {
  return empty_on_device({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

}  // namespace gradfuse
