// The arctangent for host and device, for vectors and scalars of float32 and float64, to about
// 2 ulp. Coefficients are our own least-squares fits at Chebyshev nodes.
//
// Include inside a namespace.

// P of atan(z) = z + z^3 P(z^2), |z| <= sqrt(2) - 1, in the precision of S.
template <class V>
GRADFUSE_HD V arctangent_series(V u, float) {
  V p = V{} - 0.0645937628f;
  p = p * u + 0.107462984f;
  p = p * u - 0.142642326f;
  p = p * u + 0.199995501f;
  return p * u - 0.333333318f;
}
template <class V>
GRADFUSE_HD V arctangent_series(V u, double) {
  V p = V{} - 0.0192025292684122814;
  p = p * u + 0.039253696320618563;
  p = p * u - 0.0508625488582314313;
  p = p * u + 0.0585831181050115304;
  p = p * u - 0.0666453136980500885;
  p = p * u + 0.0769218469937177728;
  p = p * u - 0.0909090464769567952;
  p = p * u + 0.111111110171003266;
  p = p * u - 0.142857142846913806;
  p = p * u + 0.199999999999956506;
  return p * u - 0.333333333333333303;
}

// atan2(y, x) for x >= 0; 0 where both are. The quotient of the smaller and the larger magnitude is
// at most 1, and above sqrt(2) - 1 replaced by (q - 1) / (q + 1).
template <class S, class V>
GRADFUSE_HD V arctangent(V y, V x) {
  constexpr S kQuarter = static_cast<S>(0.785398163397448309616);
  const V zero = V{};
  const V a = (y < zero) ? -y : y;
  const V small = (a > x) ? x : a;
  const V large = (a > x) ? a : x;
  const V bound = large * static_cast<S>(0.414213562373095049);
  const V top = (small > bound) ? small - large : small;
  const V below = (small > bound) ? small + large : large;
  const V z = top / ((below == zero) ? zero + S(1) : below);
  const V u = z * z;
  V r = z + z * u * arctangent_series(u, S());
  r = (small > bound) ? r + kQuarter : r;
  r = (a > x) ? 2 * kQuarter - r : r;
  return (y < zero) ? -r : r;
}
