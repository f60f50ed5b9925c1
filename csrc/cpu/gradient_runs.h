// Parts of gradients of any layout and type, as the dense kernels take them.
#pragma once

#include "clip_kernels.h"
#include "strided.h"

namespace gradfuse::cpu {

constexpr int64_t kBuffer = 2048;  // elements gathered at a time

inline char* at(const GradRef& g, int64_t element) {
  return static_cast<char*>(g.data) + element * element_bytes(g.dtype) * (g.is_complex ? 2 : 1);
}

// Stats of elements [start, start + n) of g. Strided and complex ones pass through a buffer.
inline Stats run_stats(const GradRef& g, int64_t start, int64_t n, NormSpec spec) {
  const ClipKernels& kernels = clip_kernels();
  if (!g.layout && !g.is_complex) return kernels.stats(at(g, start), g.dtype, n, spec);
  alignas(64) char gathered[kBuffer * 16];
  alignas(64) double modulus[kBuffer];
  const int64_t bytes = element_bytes(g.dtype) * (g.is_complex ? 2 : 1);
  Stats total = {};
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t m = std::min(kBuffer, n - i);
    const void* dense = at(g, start + i);
    if (g.layout) {
      copy_strided(g.data, *g.layout, bytes, start + i, m, gathered, true);
      dense = gathered;
    }
    DType dtype = g.dtype;
    if (g.is_complex) {
      if (dtype == DType::Float)
        moduli<float>(dense, m, modulus);
      else
        moduli<double>(dense, m, modulus);
      dense = modulus;
      dtype = DType::Double;
    }
    total = merge(total, kernels.stats(dense, dtype, m, spec), spec.p);
  }
  return total;
}

// Applies f(pointer, elements) to dense runs that hold elements [start, start + n) of g, parts of
// complex numbers counted singly. What was gathered is written back if f returns true.
template <class F>
void update_run(const GradRef& g, int64_t start, int64_t n, F f) {
  const int64_t parts = g.is_complex ? 2 : 1;
  if (!g.layout) {
    f(at(g, start), n * parts);
    return;
  }
  alignas(64) char gathered[kBuffer * 16];
  const int64_t bytes = element_bytes(g.dtype) * parts;
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t m = std::min(kBuffer, n - i);
    copy_strided(g.data, *g.layout, bytes, start + i, m, gathered, true);
    if (f(gathered, m * parts))
      copy_strided(g.data, *g.layout, bytes, start + i, m, gathered, false);
  }
}

// x *= factor. Returns true, for update_run.
inline bool scale_by(void* x, DType dtype, int64_t n, const Factor& factor) {
  const ClipKernels& kernels = clip_kernels();
  if ((factor.second == 1.0 && factor.third == 1.0) || dtype != DType::Double) {
    kernels.scale(x, dtype, n, factor.whole);
  } else {
    for (double step : {factor.first, factor.second, factor.third})
      kernels.scale(x, dtype, n, step);
  }
  return true;
}

}  // namespace gradfuse::cpu
