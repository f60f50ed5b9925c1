// Runs the dense kernels on parts of gradients of any layout and type.
#pragma once

#include "clip_kernels.h"
#include "exact_kernels.h"
#include "strided.h"

namespace gradfuse::cpu {

constexpr int64_t kBuffer = 2048;  // elements gathered at a time

inline char* at(const GradRef& g, int64_t element) {
  return static_cast<char*>(g.data) + element * element_bytes(g.dtype) * (g.is_complex ? 2 : 1);
}

// Calls f(pointer, count) for dense runs of the elements [start, start + n) of g, in order. Strided
// ones pass through a buffer, and complex ones come in pieces of its size.
template <class F>
void read_run(const GradRef& g, int64_t start, int64_t n, F f) {
  if (!g.layout && !g.is_complex) {
    f(at(g, start), n);
    return;
  }
  alignas(64) char gathered[kBuffer * 16];
  const int64_t bytes = element_bytes(g.dtype) * (g.is_complex ? 2 : 1);
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t m = std::min(kBuffer, n - i);
    const void* dense = at(g, start + i);
    if (g.layout) {
      copy_strided(g.data, *g.layout, bytes, start + i, m, gathered, true);
      dense = gathered;
    }
    f(dense, m);
  }
}

// Stats of a dense run of at most kBuffer elements of a complex gradient.
inline Stats complex_stats(const GradRef& g, const void* dense, int64_t n, NormSpec spec) {
  alignas(64) double modulus[kBuffer];
  if (g.dtype == DType::Float)
    moduli<float>(dense, n, modulus);
  else
    moduli<double>(dense, n, modulus);
  return clip_kernels().stats(modulus, DType::Double, n, spec);
}

// Stats of elements [start, start + n) of g.
inline Stats run_stats(const GradRef& g, int64_t start, int64_t n, NormSpec spec) {
  Stats total = {};
  read_run(g, start, n, [&](const void* x, int64_t m) {
    const Stats s =
        g.is_complex ? complex_stats(g, x, m, spec) : clip_kernels().stats(x, g.dtype, m, spec);
    total = merge(total, s, spec.p);
  });
  return total;
}

// A sum of squares that is carried as often as it must be.
struct LimbSum {
  int64_t* words;
  LimbForm form;
  int64_t pending = 0;  // squares since the last carry

  // Adds those of at most kCarryAfter numbers.
  Stats add(const void* x, DType dtype, int64_t n) {
    if (pending + n > kCarryAfter) finish();
    pending += n;
    return exact_kernels().add_squares(x, dtype, n, words, form);
  }
  void finish() {
    carry(words, form);
    pending = 0;
  }
};

// The same, and adds the squares to the sum. The stats of a complex gradient are of its moduli.
inline Stats run_exact(const GradRef& g, int64_t start, int64_t n, LimbSum& sum) {
  const NormSpec spec = norm_spec(2.0);
  Stats total = {};
  read_run(g, start, n, [&](const void* x, int64_t m) {
    if (g.is_complex) {
      sum.add(x, g.dtype, 2 * m);
      total = merge(total, complex_stats(g, x, m, spec), spec.p);
      return;
    }
    for (int64_t i = 0; i < m; i += kCarryAfter) {
      const char* const part = static_cast<const char*>(x) + i * element_bytes(g.dtype);
      total = merge(total, sum.add(part, g.dtype, std::min(kCarryAfter, m - i)), spec.p);
    }
  });
  return total;
}

// Applies f(pointer, count) to dense runs that hold elements [start, start + n) of g; a complex
// element counts as two. A gathered run is written back if f returns true.
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
