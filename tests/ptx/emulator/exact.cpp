// What numpy lacks: the fused multiply-add, rounded once.
#include <cmath>
#include <cstdint>

#if defined(__x86_64__)
#define CLONES __attribute__((target_clones("fma", "default")))
#else
#define CLONES
#endif

extern "C" {

CLONES void ptx_fma_f32(const float* a, const float* b, const float* c, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::fma(a[i], b[i], c[i]);
}

CLONES void ptx_fma_f64(const double* a, const double* b, const double* c, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::fma(a[i], b[i], c[i]);
}
}
