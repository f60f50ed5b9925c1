// What every layer shares: the element types, and how a function is marked for host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GRADFUSE_HD __host__ __device__ inline
#define GRADFUSE_HD_FORCED __host__ __device__ __forceinline__
#else
#define GRADFUSE_HD inline
// For functions that only call what they are given. A unit of one instruction set hands them
// functions of that set, which the compiler inlines into its own but not into one of the baseline,
// as these are.
#define GRADFUSE_HD_FORCED inline __attribute__((always_inline))
#endif

// cudaStream_t, for declarations that CPU builds read too.
struct CUstream_st;

namespace gradfuse {

using Stream = CUstream_st*;

enum class DType : int32_t { Half, BFloat16, Float, Double };

GRADFUSE_HD constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::Double ? 8 : dtype == DType::Float ? 4 : 2;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>) with the C++ type that dtype names. The 16-bit types differ between the
// compilers that call this: each brings its own.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Half, class BFloat16, class F>
GRADFUSE_HD_FORCED auto with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::Half: return f(Type<Half>());
    case DType::BFloat16: return f(Type<BFloat16>());
    case DType::Float: return f(Type<float>());
    default: return f(Type<double>());
  }
}

}  // namespace gradfuse
