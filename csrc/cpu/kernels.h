// The table of CPU kernels that exist once per instruction set, and the choice among them.
// Torch-free, so that the kernels compile in a second.
#pragma once

#include <cstdint>

#include "../math/clip.h"

namespace gradfuse::cpu {

struct ClipKernels {
  const char* isa;
  // Stats of x[0..n). One read.
  Stats (*stats)(const void* x, DType dtype, int64_t n, NormSpec spec);
  // x *= coefficient, rounded once from float64 (from float32 for 16-bit types where that is exact
  // enough).
  void (*scale)(void* x, DType dtype, int64_t n, double coefficient);
  // x = min(max(x, -bound), bound); NaN stays. Stores only blocks that change;
  // returns whether there were any.
  bool (*clamp)(void* x, DType dtype, int64_t n, double bound);
};

extern const ClipKernels kClipBaseline;
#if defined(__x86_64__)
extern const ClipKernels kClipAvx2;
extern const ClipKernels kClipAvx512;
#endif

// The widest set this machine runs, or the one named by GRADFUSE_ISA (baseline | avx2 | avx512).
// Throws std::invalid_argument if that name is unknown or the machine lacks it. Chosen once.
const ClipKernels& clip_kernels();

}  // namespace gradfuse::cpu
