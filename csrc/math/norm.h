// Norms for host and device alike: overflow-safe sums of powers, merged in a fixed order. No
// tensors, no launches, no loops over memory.
//
// A sum of p-th powers is kept as value * 2^(p * exponent) (after Blue 1978, "A portable Fortran
// program to find the Euclidean norm of a vector"), so that no sum over finite values overflows or
// vanishes. Squares and magnitudes of float32 and narrower types need no exponent in float64.
#pragma once

#include <cmath>

#include "common.h"

namespace gradfuse {

enum class NormKind : int32_t { L2, L1, Inf, P };

struct NormSpec {
  NormKind kind;
  double p;  // the order; infinity for Inf
};

GRADFUSE_HD NormSpec norm_spec(double p) {
  if (p == 2.0) return {NormKind::L2, p};
  if (p == 1.0) return {NormKind::L1, p};
  return {std::isinf(p) ? NormKind::Inf : NormKind::P, p};
}

// value * 2^(p * exponent), where p is the power the sum was taken of. The exponent is a whole
// number, and so exact, for p = 1 and p = 2.
struct ScaledSum {
  double value;
  double exponent;
};

GRADFUSE_HD ScaledSum add(ScaledSum a, ScaledSum b, double p) {
  if (a.exponent == b.exponent) return {a.value + b.value, a.exponent};
  if (b.value == 0.0) return a;
  if (a.value == 0.0) return b;
  const bool a_is_high = a.exponent > b.exponent;
  const double high = a_is_high ? a.value : b.value;
  const double low = a_is_high ? b.value : a.value;
  const double exponent = a_is_high ? a.exponent : b.exponent;
  if (!std::isfinite(low)) return {low + high, exponent};  // not inf * 0
  const double distance = (a_is_high ? b.exponent : a.exponent) - exponent;
  return {high + low * std::exp2(p * distance), exponent};
}

// The larger of two magnitudes; NaN if either is.
GRADFUSE_HD double max_abs(double a, double b) { return (a >= b || a != a) ? a : b; }

// What one read of a chunk, a tensor or all of them yields.
struct Stats {
  ScaledSum l2;       // sum of |x|^2
  ScaledSum lp;       // sum of |x|^p for L1 and P; of no meaning otherwise
  double amax;        // largest |x|, NaN if any x is
  int64_t nonfinite;  // count of NaN and inf
  int64_t zeros;      // count of exact zeros
};

GRADFUSE_HD Stats merge(const Stats& a, const Stats& b, double p) {
  return {add(a.l2, b.l2, 2.0), add(a.lp, b.lp, p), max_abs(a.amax, b.amax),
          a.nonfinite + b.nonfinite, a.zeros + b.zeros};
}

// Squares of float32 values may be summed in float32 if the largest magnitude lies in this range:
// 2^15 squares do not overflow, and what underflows is below 2^-34 of the largest square.
constexpr float kSafeFloatMin = 0x1p-57f;
constexpr float kSafeFloatMax = 0x1p+56f;
// The same for float64 squares, with room for 2^63 of them.
constexpr double kSafeDoubleMin = 0x1p-480;
constexpr double kSafeDoubleMax = 0x1p+480;

// The exponent to scale a chunk by before raising to a power; 0 for zero and non-finite maxima.
GRADFUSE_HD int32_t scale_exponent(double amax) {
  return (amax > 0.0 && std::isfinite(amax)) ? std::ilogb(amax) : 0;
}

// x * 2^exponent in two steps, so that neither factor leaves the range of float64.
struct PowerOfTwo {
  double first, second;
};
GRADFUSE_HD PowerOfTwo power_of_two(int32_t exponent) {
  const int32_t half = exponent / 2;
  return {std::ldexp(1.0, half), std::ldexp(1.0, exponent - half)};
}

// A norm, value * 2^exponent.
struct ScaledNorm {
  double value;
  double exponent;
};

// value * 2^exponent, in two steps: the power alone may leave the range that the product is in.
GRADFUSE_HD double times_power(double value, double exponent) {
  if (exponent == 0.0) return value;
  const double half = std::floor(exponent / 2.0);
  return value * std::exp2(half) * std::exp2(exponent - half);
}

// The sum, or for Inf the maximum, whose root is the norm.
GRADFUSE_HD ScaledSum sum_of(const Stats& s, NormSpec spec) {
  if (spec.kind == NormKind::L2) return s.l2;
  if (spec.kind == NormKind::Inf) return {s.amax, 0};
  return s.lp;
}

GRADFUSE_HD ScaledSum combine(ScaledSum a, ScaledSum b, NormSpec spec) {
  if (spec.kind == NormKind::Inf) return {max_abs(a.value, b.value), 0};
  return add(a, b, spec.p);
}

GRADFUSE_HD ScaledNorm norm_of(ScaledSum sum, NormSpec spec) {
  if (spec.kind == NormKind::L2) return {std::sqrt(sum.value), sum.exponent};
  if (spec.kind != NormKind::P) return {sum.value, sum.exponent};
  const double root = std::pow(sum.value, 1.0 / spec.p);
  if (std::isfinite(root) || !std::isfinite(sum.value)) return {root, sum.exponent};
  return {1.0, sum.exponent + std::log2(sum.value) / spec.p};  // small p: beyond float64
}

GRADFUSE_HD double to_double(ScaledNorm norm) { return times_power(norm.value, norm.exponent); }

// A factor for gradients. float64 has few bits for one below 2^-1022, or none, though a gradient of
// 1e300 times it is a number like any other: there it is a product of three normal ones.
struct Factor {
  double whole;
  double first, second, third;  // whole, 1, 1 but there

  // Exact in each step but the last where the result is normal.
  GRADFUSE_HD double times(double x) const { return x * first * second * third; }
};

GRADFUSE_HD Factor factor_of(ScaledNorm f) {
  const double whole = to_double(f);
  if (whole >= 0x1p-1022 || !(f.value > 0.0)) return {whole, whole, 1.0, 1.0};
  const double half = std::floor(f.exponent / 2.0);
  return {whole, std::exp2(half), std::exp2(f.exponent - half), f.value};
}

}  // namespace gradfuse
