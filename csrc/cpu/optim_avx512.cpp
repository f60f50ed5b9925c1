// The optimizer kernels for avx512, as optim_kernels.h defines them.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After the headers: their inline functions must stay runnable on every machine. In force to the
// end of the file: GCC gives a template the target in force where it is instantiated.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define GRADFUSE_VEC_BYTES 64

namespace gradfuse::cpu {
namespace {
#include "optim_kernels.h"
}  // namespace

const OptimKernels kOptimAvx512 = {adamw, sgd, adamw_ratio_sum};

}  // namespace gradfuse::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
