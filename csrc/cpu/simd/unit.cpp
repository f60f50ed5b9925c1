// The CPU kernels of one op for one instruction set. setup.py compiles this file once for each
// pair:
//
//   GRADFUSE_KERNELS    the op's header, as clip_kernels.h
//   GRADFUSE_ISA        baseline, avx2 or avx512: the namespace of the kernels
//   GRADFUSE_VEC_BYTES  16, 32 or 64: the width of its vectors
//
// The header is included twice, as in Highway: first for the op's table and its includes, whose
// inline functions must run on every machine, then for the kernels, compiled for the target. The
// target stays set to the end of the file, because GCC compiles a template for the target in force
// where it is instantiated. Kernels use no standard library templates that contain code: the linker
// keeps one copy of each for all callers, which may be that of the widest set.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include GRADFUSE_KERNELS

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Macros are not expanded in pragmas.
#if GRADFUSE_VEC_BYTES == 64 && defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#elif GRADFUSE_VEC_BYTES == 64
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#elif GRADFUSE_VEC_BYTES == 32 && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif GRADFUSE_VEC_BYTES == 32
#pragma GCC target("avx2,fma,f16c")
#endif

#define GRADFUSE_IN_UNIT
namespace gradfuse::cpu::GRADFUSE_ISA {
#include GRADFUSE_KERNELS
}  // namespace gradfuse::cpu::GRADFUSE_ISA

#if GRADFUSE_VEC_BYTES > 16 && defined(__clang__)
#pragma clang attribute pop
#endif
