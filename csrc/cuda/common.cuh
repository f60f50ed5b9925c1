// Shared by the kernels: element types, 16-byte accesses, loops over a run, checked launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../math/common.h"
#include "../math/runs.h"

namespace gradfuse::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// The type that T is computed in, and its conversions.
template <class T>
struct Element {
  using Wide = T;
  static __device__ Wide widen(T x) { return x; }
  static __device__ T narrow(Wide x) { return x; }
};
template <>
struct Element<__half> {
  using Wide = float;
  static __device__ float widen(__half x) { return __half2float(x); }
  static __device__ __half narrow(float x) { return __float2half_rn(x); }
};
template <>
struct Element<__nv_bfloat16> {
  using Wide = float;
  static __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

// Calls f(Type<T>) with the element type that dtype names.
#pragma nv_exec_check_disable
template <class F>
__host__ __device__ void with_type(DType dtype, F f) {
  gradfuse::with_type<__half, __nv_bfloat16>(dtype, f);
}

template <class T>
constexpr int kPer16Bytes = 16 / sizeof(T);

// 16 bytes as elements. Loaded and stored as one uint4: an aligned struct of narrower members would
// compile to narrower accesses.
template <class T>
union Word {
  uint4 raw;
  T element[kPer16Bytes<T>];
  __device__ Word() : raw() {}
};

template <class T>
__device__ Word<T> load_word(const T* p) {
  Word<T> w;
  w.raw = *reinterpret_cast<const uint4*>(p);
  return w;
}
// Uses an intrinsic: nvcc splits plain stores of a union, some into stores of 4, 4 and 8 bytes.
template <class T>
__device__ void store_word(T* p, const Word<T>& w) {
  __stwb(reinterpret_cast<uint4*>(p), w.raw);
}

// Elements before the first 16-byte boundary at or after x, at most n.
template <class T>
__device__ int64_t unaligned_head(const T* x, int64_t n) {
  const int64_t head = (16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T);
  return head < n ? head : n;
}

// Visits x[0..n) with the block's threads: one(i) for the elements at the unaligned ends, words(i,
// Word...) with kUnroll aligned words at elements i + u * kBlock * kPer16Bytes, and word(i, Word)
// for the remaining words. Assumes blockDim.x == kBlock.
template <class T, int kBlock, int kUnroll, class One, class Words, class Last>
__device__ void visit_run(const T* x, int64_t n, One one, Words words, Last word) {
  constexpr int kPer = kPer16Bytes<T>;
  const int64_t head = unaligned_head(x, n);
  const int64_t whole = (n - head) / kPer;  // words
  if (threadIdx.x < head) one(static_cast<int64_t>(threadIdx.x));
  int64_t w = threadIdx.x;
  for (; w + (kUnroll - 1) * kBlock < whole; w += kUnroll * kBlock) {
    Word<T> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = load_word(x + head + (w + u * kBlock) * kPer);
    words(head + w * kPer, loaded);
  }
  for (; w < whole; w += kBlock) word(head + w * kPer, load_word(x + head + w * kPer));
  const int64_t tail = head + whole * kPer + threadIdx.x;
  if (tail < n) one(tail);
}

// A run that takes a launch of its own: strided, complex, or unfit for a batch. Its dimensions are
// coalesced; torch allows 64.
struct StridedRun {
  static constexpr int kMaxDims = 64;
  void* data;
  int64_t numel;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];
  int32_t dims;
  DType dtype;
  bool is_complex;
};

inline StridedRun strided_run(const GradRef& g) {
  StridedRun run = {};
  run.data = g.data;
  run.numel = g.numel;
  run.dtype = g.dtype;
  run.is_complex = g.is_complex;
  if (g.layout) {
    run.dims = static_cast<int32_t>(g.layout->sizes.size());
    if (run.dims > StridedRun::kMaxDims)
      throw std::runtime_error(
          "gradients: expected at most 64 dimensions that do not coalesce, got " +
          std::to_string(run.dims));
    for (int d = 0; d < run.dims; ++d) {
      run.sizes[d] = g.layout->sizes[d];
      run.strides[d] = g.layout->strides[d];
    }
  } else {
    run.dims = 1;
    run.sizes[0] = g.numel;
    run.strides[0] = 1;
  }
  return run;
}

// Offset in elements of element i in row-major order.
__device__ inline int64_t strided_offset(const StridedRun& run, int64_t i) {
  int64_t offset = 0;
  for (int d = run.dims - 1; d > 0; --d) {
    offset += i % run.sizes[d] * run.strides[d];
    i /= run.sizes[d];
  }
  return offset + i * run.strides[0];
}

// Element i of the run's memory, as float64.
__device__ inline double load_element(const StridedRun& run, int64_t i) {
  double value = 0.0;
  with_type(run.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    value = Element<T>::widen(static_cast<const T*>(run.data)[i]);
  });
  return value;
}

// Whether a gradient goes into a batch of dense runs.
inline bool is_batched(const GradRef& g) { return !g.layout && !g.is_complex; }

// Why a launch failed. Up to CUDA 12.0 drivers refuse more than 4 KB of parameters, and call them
// an invalid argument.
inline std::string cause_of(cudaError_t error) {
  constexpr int kLargeParameters = 12010;
  int driver = 0;
  if (error == cudaErrorInvalidValue && cudaDriverGetVersion(&driver) == cudaSuccess &&
      driver < kLargeParameters)
    return "expected a driver of CUDA 12.1 (version 530) or newer, got one of CUDA " +
           std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  return cudaGetErrorString(error);
}

// To be called after every launch.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": launch failed: " + cause_of(error));
}

}  // namespace gradfuse::cuda
