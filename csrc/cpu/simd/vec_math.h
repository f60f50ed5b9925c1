// Elementary functions of vectors, for math/activation.h. float32: by polynomials; float64: the C
// library's, lane by lane. Include after vec.h, in the same namespace.

inline IntVec bits_of_float(FloatVec v) { return bit_cast<IntVec>(v); }
inline FloatVec float_of_bits(IntVec v) { return bit_cast<FloatVec>(v); }

#include "../../math/elementary.h"

inline FloatVec exponential(FloatVec v) { return exponential_float(v); }
inline FloatVec hyperbolic_tangent(FloatVec v) { return hyperbolic_tangent_float(v); }
inline FloatVec normal_cdf(FloatVec v) { return normal_cdf_float(v); }
inline FloatVec normal_density(FloatVec v) { return normal_density_float(v); }

template <class F>
inline DoubleVec by_lane(DoubleVec v, F f) {
  for (int i = 0; i < kDoubles; ++i) v[i] = f(v[i]);
  return v;
}
inline DoubleVec exponential(DoubleVec v) {
  return by_lane(v, [](double x) { return std::exp(x); });
}
inline DoubleVec hyperbolic_tangent(DoubleVec v) {
  return by_lane(v, [](double x) { return std::tanh(x); });
}
inline DoubleVec normal_cdf(DoubleVec v) {
  return by_lane(v, [](double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); });
}
inline DoubleVec normal_density(DoubleVec v) {
  return 0.39894228040143267794 * exponential(-0.5 * (v * v));
}
