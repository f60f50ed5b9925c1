// Stands in for libcudart in the libraries that the tests build of nvcc's objects: "device" memory
// is the host's, and every launch, copy and wait is handed to the hooks that cudart.py sets. Any
// other symbol that nvcc's objects need is an error when they are linked.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using LaunchHook = int (*)(const char* kernel, const unsigned* grid_and_block, void** arguments,
                           size_t shared_bytes, void* stream);
using EventHook = void (*)(const char* name, void* to, const void* from, size_t bytes);

LaunchHook on_launch = nullptr;
EventHook on_event = nullptr;
cudaError_t last_error = cudaSuccess;
int driver_version = CUDART_VERSION;

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local Configuration pushed;

// Host stubs to kernel names. Filled by static initialisers, hence made at first use.
std::unordered_map<const void*, std::string>& kernel_names() {
  static auto* names = new std::unordered_map<const void*, std::string>;
  return *names;
}

std::mutex freed_mutex;
std::vector<void*>& freed() {
  static auto* pointers = new std::vector<void*>;
  return *pointers;
}

void event(const char* name, void* to = nullptr, const void* from = nullptr, size_t bytes = 0) {
  if (on_event) on_event(name, to, from, bytes);
}

cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

cudaError_t launch(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                   cudaStream_t stream) {
  const auto found = kernel_names().find(stub);
  if (found == kernel_names().end() || !on_launch) return failed(cudaErrorInvalidDeviceFunction);
  const unsigned sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const int error = on_launch(found->second.c_str(), sizes, arguments, shared_bytes, stream);
  return error ? failed(static_cast<cudaError_t>(error)) : cudaSuccess;
}

}  // namespace

EXPORT void ptx_set_hooks(LaunchHook launch_hook, EventHook event_hook) {
  on_launch = launch_hook;
  on_event = event_hook;
}

EXPORT void ptx_set_driver(int version) { driver_version = version; }

// Releases one of the allocations given to cudaFree and returns its address; null if there is none.
EXPORT void* ptx_release_freed() {
  const std::lock_guard<std::mutex> lock(freed_mutex);
  if (freed().empty()) return nullptr;
  void* const pointer = freed().back();
  freed().pop_back();
  std::free(pointer);
  return pointer;
}

extern "C" {

// Functions that nvcc generates calls of.

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernel_names()[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  pushed = {grid, block, shared_bytes, static_cast<cudaStream_t>(stream)};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
// Since CUDA 13; before, the stubs call cudaLaunchKernel.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared_bytes, stream);
}

// The runtime's own functions.

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  return launch(stub, grid, block, arguments, shared_bytes, stream);
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[64];
  snprintf(text, sizeof(text), "emulated CUDA error %d", static_cast<int>(error));
  return text;
}
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const size_t rounded = (bytes + 255) / 256 * 256;
  *pointer = std::aligned_alloc(256, rounded ? rounded : 256);
  if (!*pointer) return failed(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xa5, rounded);  // garbage, so that reads of it show
  event("cudaMalloc", *pointer, nullptr, bytes);
  return cudaSuccess;
}
// Calls no hook, because a tensor may die where no Python code may run: Python polls
// ptx_release_freed.
cudaError_t cudaFree(void* pointer) {
  const std::lock_guard<std::mutex> lock(freed_mutex);
  freed().push_back(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  event("cudaMemcpy", to, from, bytes);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  event("cudaMemcpyAsync", to, from, bytes);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  event("cudaMemsetAsync", to, nullptr, bytes);
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  event("cudaStreamSynchronize");
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  event("cudaDeviceSynchronize");
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  const auto found = kernel_names().find(stub);
  if (found == kernel_names().end() || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return failed(cudaErrorInvalidValue);
  event("cudaFuncSetAttribute", nullptr, found->second.c_str(), static_cast<size_t>(value));
  return cudaSuccess;
}
}
