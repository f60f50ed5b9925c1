// Elementary functions of vectors, for math/activation.h. float32: to about 2 ulp, by polynomials
// of our own fit; float64: the C library's, lane by lane. Include after vec.h, in the same
// namespace.

template <size_t kTerms>
inline FloatVec polynomial(FloatVec x, const float (&c)[kTerms]) {  // c[0] + c[1] x + ...
  FloatVec sum = FloatVec{} + c[kTerms - 1];
  for (size_t i = kTerms - 1; i-- > 0;) sum = sum * x + c[i];
  return sum;
}

// e^v = 2^n e^r, |r| <= ln(2) / 2, e^r by its Taylor series. 2^n is applied in two halves, so that
// results up to the largest and down to the smallest subnormal come out.
inline FloatVec exponential(FloatVec v) {
  constexpr float kToInteger = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  constexpr float kTaylor[] = {1.0f,      1.0f,       0.5f,       1.0f / 6,
                               1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
  const FloatVec low = FloatVec{} - 104.0f, high = FloatVec{} + 89.0f;  // 0 and inf beyond
  v = (v < low) ? low : v;
  v = (v > high) ? high : v;
  const FloatVec shifted = v * 0x1.715476p0f + kToInteger;
  const FloatVec n = shifted - kToInteger;
  const FloatVec r = (v - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;  // ln(2) in two parts
  const IntVec exponent = bit_cast<IntVec>(shifted) - bit_cast<IntVec>(FloatVec{} + kToInteger);
  const IntVec half = exponent >> 1;
  const FloatVec first = bit_cast<FloatVec>((half + 127) << 23);
  const FloatVec second = bit_cast<FloatVec>((exponent - half + 127) << 23);
  return polynomial(r, kTaylor) * first * second;
}

inline FloatVec magnitude_of(FloatVec v) {
  return bit_cast<FloatVec>(bit_cast<IntVec>(v) & 0x7fffffff);
}
inline FloatVec with_sign_of(FloatVec v, FloatVec sign) {
  return bit_cast<FloatVec>((bit_cast<IntVec>(sign) & ~0x7fffffff) | bit_cast<IntVec>(v));
}

// By its continued fraction, cut off after seven terms, where |v| < 1; else by e^(2|v|).
inline FloatVec hyperbolic_tangent(FloatVec v) {
  const FloatVec a = magnitude_of(v);
  const FloatVec s = v * v;
  const FloatVec near = v * (135135.0f + s * (17325.0f + s * (378.0f + s))) /
                        (135135.0f + s * (62370.0f + s * (3150.0f + s * 28.0f)));
  const FloatVec far = with_sign_of(1.0f - 2.0f / (exponential(a + a) + 1.0f), v);
  return (a >= 1.0f) ? far : near;  // NaN is near
}

inline FloatVec normal_density(FloatVec v) { return 0.3989422804f * exponential(-0.5f * (v * v)); }

// (1 + erf(t)) / 2 at t = v / sqrt(2): erf as t P(t^2) where |t| < 1, else 1 - erfc with
// erfc(t) = u e^(Q(u) - t^2), u = 2 / (2 + t). P and Q are least-squares fits at Chebyshev nodes.
inline FloatVec normal_cdf(FloatVec v) {
  constexpr float kP[] = {1.12837917f,    -0.376126269f,  0.112835975f,   -0.0268543288f,
                          0.00518931194f, -0.0008018855f, 7.88249712e-05f};
  constexpr float kQ[] = {-1.26540449f, 0.9974339f,    0.400615332f, -0.0556478363f,
                          0.356586849f, -0.963519939f, 0.687526896f, -0.156634738f};
  const FloatVec t = v * 0.7071067812f;
  const FloatVec a = magnitude_of(t);
  const FloatVec near = 0.5f + 0.5f * (t * polynomial(t * t, kP));
  const FloatVec u = 2.0f / (2.0f + a);
  const FloatVec tail = 0.5f * u * exponential(polynomial(u, kQ) - a * a);
  const FloatVec far = (v > 0.0f) ? 1.0f - tail : tail;
  return (a >= 1.0f) ? far : near;
}

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
