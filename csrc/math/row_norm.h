// Arithmetic of layer norm and RMS norm for host and device: statistics of a row from its sums, and
// the coefficients of its elements' forward and backward. In float64, once per row; F is the type
// that elements are computed in.
//
// Ba, Kiros, Hinton 2016, "Layer Normalization", equation 4; Zhang, Sennrich 2019, "Root Mean
// Square Layer Normalization", equation 4.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common.h"

namespace gradfuse {

// Of a row's elements times `scale`, a power of two: 1 unless their squares leave the range of F.
struct RowStatistics {
  double mean;  // 0 for RMS norm
  double deviation;  // sqrt(variance + eps), or of the mean square
  double scale;
};

// Of two sums over a row of x * scale - shift and its square. RMS norm has no shift. `share` is
// 1 / width: GPUs divide slowly in float64.
GRADFUSE_HD RowStatistics row_statistics(double shift, double sum, double squares, double share,
                                         double eps, double scale, bool centred) {
  const double rest = centred ? sum * share : 0.0;  // what shift lacks to the mean
  const double square = squares * share - rest * rest;
  return {shift + rest, std::sqrt((square < 0.0 ? 0.0 : square) + eps * scale * scale), scale};
}

// Whether a row must be summed again with a scale, because its squares have left the range of F.
// What underflows beside eps does not count.
template <class F>
GRADFUSE_HD bool leaves_range(double sum, double squares, double share, double eps) {
  const double tiny = sizeof(F) == 4 ? 1e-28 : 1e-280;
  return !std::isfinite(sum) || !std::isfinite(squares) ||
         (squares * share < tiny && eps < 1e8 * tiny);
}

// The scale that brings the largest element to [1, 2), but leaves eps in the range as well.
template <class F>
GRADFUSE_HD double scale_of_row(double largest, double eps) {
  const double size = std::fmax(largest, std::sqrt(eps));
  if (!(size > 0.0) || !std::isfinite(size)) return 1.0;
  int exponent = std::ilogb(size);
  const int most = sizeof(F) == 4 ? 126 : 1022;
  exponent = exponent > most ? most : exponent < -most ? -most : exponent;
  return std::ldexp(1.0, -exponent);
}

// What the forward keeps of each row for the backward, and computes with itself, so that both see
// the same: [rows, kKeptOfRow] of F.
enum KeptOfRow { kRowMean, kRowMeanRest, kRowDeviation, kRowScale, kKeptOfRow };

// normalised = (x * scale - mean) * inverse + offset, where mean is rounded to F and offset makes
// up for that.
template <class F>
struct RowNormalisation {
  F scale, mean, inverse, offset;
};
template <class F>
GRADFUSE_HD RowNormalisation<F> row_normalisation(const void* stats, int64_t row) {
  const F* kept = static_cast<const F*>(stats) + row * kKeptOfRow;
  const F inverse = F(1) / kept[kRowDeviation];
  return {kept[kRowScale], kept[kRowMean], inverse, -kept[kRowMeanRest] * inverse};
}
template <class F>
GRADFUSE_HD RowNormalisation<F> keep_row(void* stats, int64_t row, RowStatistics s) {
  F* kept = static_cast<F*>(stats) + row * kKeptOfRow;
  kept[kRowMean] = static_cast<F>(s.mean);
  kept[kRowMeanRest] = static_cast<F>(s.mean - static_cast<double>(kept[kRowMean]));
  kept[kRowDeviation] = static_cast<F>(s.deviation);
  kept[kRowScale] = static_cast<F>(s.scale);
  return row_normalisation<F>(stats, row);
}

// With h the normalised element and g its gradient, that of the element is
// (g - (mean_gradient + h * slope)) * inverse * scale: the means over the row of g and of g * h are
// what its statistics add. Not one factor, which could leave the range.
template <class F>
struct RowGradient {
  F mean_gradient, slope;
};
template <class F>
GRADFUSE_HD RowGradient<F> row_gradient(double sum, double dot, double share, bool centred) {
  return {static_cast<F>(centred ? sum * share : 0.0), static_cast<F>(dot * share)};
}

}  // namespace gradfuse
