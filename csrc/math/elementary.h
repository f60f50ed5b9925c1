// Elementary functions in float32 for host and device, for vectors and scalars, to about 2 ulp.
// Coefficients without a source are our own least-squares fits at Chebyshev nodes.
//
// Include inside a namespace that has, for its V, bits_of_float(V) and float_of_bits(...), which
// reinterpret the bits.

// c + c1 x + c2 x^2 + ...
template <class V>
GRADFUSE_HD V polynomial(V, float c) {
  return V{} + c;
}
template <class V, class... Rest>
GRADFUSE_HD V polynomial(V x, float c, Rest... rest) {
  return polynomial(x, rest...) * x + c;
}

// e^v = 2^n e^r, |r| <= ln(2) / 2, e^r by its Taylor series. 2^n is applied in two halves, so that
// the largest finite and the smallest subnormal results are reached.
template <class V>
GRADFUSE_HD V exponential_float(V v) {
  constexpr float kToInteger = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  const V low = V{} - 104.0f, high = V{} + 89.0f;  // 0 and inf beyond
  v = (v < low) ? low : v;
  v = (v > high) ? high : v;
  const V shifted = v * 0x1.715476p0f + kToInteger;
  const V n = shifted - kToInteger;
  const V r = (v - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;  // ln(2) in two parts
  const auto exponent = bits_of_float(shifted) - bits_of_float(V{} + kToInteger);
  const auto half = exponent >> 1;
  const V first = float_of_bits((half + 127) << 23);
  const V second = float_of_bits((exponent - half + 127) << 23);
  return polynomial(r, 1.0f, 1.0f, 0.5f, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040) *
         first * second;
}

template <class V>
GRADFUSE_HD V magnitude_of(V v) {
  return float_of_bits(bits_of_float(v) & 0x7fffffff);
}
template <class V>
GRADFUSE_HD V with_sign_of(V v, V sign) {
  return float_of_bits((bits_of_float(sign) & ~0x7fffffff) | bits_of_float(v));
}

// If |v| < 1, the continued fraction, cut off after seven terms; else from e^(2|v|).
template <class V>
GRADFUSE_HD V hyperbolic_tangent_float(V v) {
  const V a = magnitude_of(v);
  const V s = v * v;
  const V near = v * polynomial(s, 135135.0f, 17325.0f, 378.0f, 1.0f) /
                 polynomial(s, 135135.0f, 62370.0f, 3150.0f, 28.0f);
  const V far = with_sign_of(1.0f - 2.0f / (exponential_float(a + a) + 1.0f), v);
  return (a >= 1.0f) ? far : near;  // NaN takes near
}

template <class V>
GRADFUSE_HD V normal_density_float(V v) {
  return 0.3989422804f * exponential_float(-0.5f * (v * v));
}

// (1 + erf(t)) / 2 at t = v / sqrt(2): erf as t P(t^2) where |t| < 1, else 1 - erfc with
// erfc(t) = u e^(Q(u) - t^2), u = 2 / (2 + t).
template <class V>
GRADFUSE_HD V normal_cdf_float(V v) {
  const V t = v * 0.7071067812f;
  const V a = magnitude_of(t);
  const V p = polynomial(t * t, 1.12837917f, -0.376126269f, 0.112835975f, -0.0268543288f,
                         0.00518931194f, -0.0008018855f, 7.88249712e-05f);
  const V near = 0.5f + 0.5f * (t * p);
  const V u = 2.0f / (2.0f + a);
  const V q = polynomial(u, -1.26540449f, 0.9974339f, 0.400615332f, -0.0556478363f, 0.356586849f,
                         -0.963519939f, 0.687526896f, -0.156634738f);
  const V tail = 0.5f * u * exponential_float(q - a * a);
  const V far = (v > 0.0f) ? 1.0f - tail : tail;
  return (a >= 1.0f) ? far : near;
}
