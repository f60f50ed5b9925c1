// Arithmetic of batch normalisation for host and device: statistics of a channel from its sums, and
// the coefficients of one element's forward and backward. All in float64, once per channel; F is
// the type that elements are computed in.
//
// Ioffe, Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing
// Internal Covariate Shift", algorithm 1 and section 3; Ioffe 2017, "Batch Renormalization".
#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"

namespace gradfuse {

// Sums over a channel of x - shift and its square. shift is one of the channel's elements: then
// (shift - mean)^2 <= count * variance, which bounds the cancellation wherever the mean lies.
struct ChannelSums {
  double sum;
  double squares;
};

// Of three elements of a float64 channel the middle one is the shift: if the first lies far from
// all others, squares cancel, and no wider type is there to sum them again.
GRADFUSE_HD double median(double a, double b, double c) {
  return std::fmax(std::fmin(a, b), std::fmin(std::fmax(a, b), c));
}

struct Moments {
  double mean;
  double variance;  // biased
};

GRADFUSE_HD Moments moments(ChannelSums s, double shift, double count) {
  const double mean = s.sum / count;
  // Squares beyond float64's range give an infinite variance, not inf - inf; an infinite element
  // gives NaN.
  const double variance =
      std::isinf(s.squares) ? s.squares + (mean - mean) : s.squares / count - mean * mean;
  return {shift + mean, variance < 0.0 ? 0.0 : variance};  // NaN stays
}

// A channel's values on one rank or several: how many, their mean, and the sum of their squared
// deviations from it.
struct Tally {
  double count, mean, m2;
};
// Of both together; Chan, Golub, LeVeque 1983, equation 1.5. A rank without values adds nothing.
GRADFUSE_HD Tally merged(Tally a, Tally b) {
  if (a.count == 0.0) return b;
  if (b.count == 0.0) return a;
  const double count = a.count + b.count, ahead = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + ahead * share, a.m2 + b.m2 + ahead * ahead * (a.count * share)};
}

// What ranks tell each other of a batch: rows [ranks, 1 + 2 * channels] of the count, the means and
// the sums of squared deviations.
struct Tallies {
  const double* data;  // null without other ranks
  int64_t ranks;

  GRADFUSE_HD static constexpr int64_t row(int64_t channels) { return 1 + 2 * channels; }

  GRADFUSE_HD Tally of_channel(int64_t channels, int64_t c) const {  // in the order of ranks
    Tally all = {0.0, 0.0, 0.0};
    for (int64_t r = 0; r < ranks; ++r) {
      const double* p = data + r * row(channels);
      all = merged(all, {p[0], p[1 + c], p[1 + channels + c]});
    }
    return all;
  }
};

// What the forward keeps of each channel for the backward, and computes with itself, so that both
// see the same: rows [3, channels] of F, the mean, what its rounding left, and the deviation
// sqrt(variance + eps), whose inverse could leave float32.
struct KeptStatistics {
  double mean, invstd;
};
template <class F>
GRADFUSE_HD KeptStatistics kept_statistics(const void* stats, int64_t channels, int64_t c) {
  const F* rows = static_cast<const F*>(stats) + c;
  return {static_cast<double>(rows[0]) + static_cast<double>(rows[channels]),
          1.0 / static_cast<double>(rows[2 * channels])};
}
template <class F>
GRADFUSE_HD KeptStatistics keep_statistics(void* stats, int64_t channels, int64_t c, double mean,
                                           double variance, double eps) {
  F* rows = static_cast<F*>(stats) + c;
  rows[0] = static_cast<F>(mean);
  rows[channels] = static_cast<F>(mean - static_cast<double>(rows[0]));
  rows[2 * channels] = static_cast<F>(std::sqrt(variance + eps));
  return kept_statistics<F>(stats, channels, c);
}

// Unbiased variance, for running_var: sum of squares / (count - 1).
GRADFUSE_HD double unbiased(double variance, double count) {
  return variance * (count / (count - 1.0));
}

GRADFUSE_HD double running_average(double old, double now, double momentum) {
  return (1.0 - momentum) * old + momentum * now;
}

// Limits of batch renormalisation after warm-up, and the steps of it: r_limit grows from 1 and
// d_limit from 0, from step `begin` to r_end and d_end.
struct Renorm {
  double r_limit, d_limit;
  double begin, r_end, d_end;
};

GRADFUSE_HD double risen(double step, double begin, double end) {
  if (step >= end) return 1.0;
  return step <= begin ? 0.0 : (step - begin) / (end - begin);
}

// What a channel's affine part is composed with: z = (h * scale + shift) * weight + bias, where h
// is normalised by the batch. Constants of the gradient; 1 and 0 without renormalisation.
struct Correction {
  double scale, shift;

  GRADFUSE_HD double weight(double w) const { return w * scale; }
  GRADFUSE_HD double bias(double w, double b) const { return b + w * shift; }
};

GRADFUSE_HD double bounded(double x, double low, double high) {
  return x < low ? low : x > high ? high : x;  // NaN stays
}

// r and d of algorithm 1: with neither at its limit, z is what the running statistics would give.
GRADFUSE_HD Correction renormalisation(const Renorm& renorm, double step, KeptStatistics kept,
                                       double running_mean, double running_var, double eps) {
  const double r = 1.0 + (renorm.r_limit - 1.0) * risen(step, renorm.begin, renorm.r_end);
  const double d = renorm.d_limit * risen(step, renorm.begin, renorm.d_end);
  const double deviation = std::sqrt(running_var + eps);
  return {bounded(1.0 / (kept.invstd * deviation), 1.0 / r, r),
          bounded((kept.mean - running_mean) / deviation, -d, d)};
}

// The forward keeps a correction in two rows behind the statistics.
constexpr int64_t kStatistics = 3;
constexpr int64_t kStatisticsAndCorrection = 5;

template <class F>
GRADFUSE_HD Correction kept_correction(const void* stats, int64_t channels, int64_t c) {
  const F* rows = static_cast<const F*>(stats) + kStatistics * channels + c;
  return {static_cast<double>(rows[0]), static_cast<double>(rows[channels])};
}
template <class F>
GRADFUSE_HD Correction keep_correction(void* stats, int64_t channels, int64_t c, Correction now) {
  F* rows = static_cast<F*>(stats) + kStatistics * channels + c;
  rows[0] = static_cast<F>(now.scale);
  rows[channels] = static_cast<F>(now.shift);
  return kept_correction<F>(stats, channels, c);
}

// How a channel's batches differ from its running statistics: smoothed differences of the mean and
// of the variance, the smoothed square of both, and the batches counted.
struct Drift {
  double mean, variance, square, batches;
};
constexpr int64_t kDriftRows = 4;
constexpr double kDriftSmoothing = 0.1;
constexpr double kLeastMomentum = 0.02;
constexpr double kMostMomentum = 0.5;
constexpr double kMostDifference = 4.0;  // in standard deviations: an outlier counts as no more

// The momentum of the next update, from the tracking signal of Trigg, Leach 1967, "Exponential
// smoothing with an adaptive response rate": the smoothed difference over the difference's smoothed
// size, which is 1 where all have one sign. Noise alone gives smoothing / (2 - smoothing) to its
// square; the momentum grows with what exceeds that. Few batches are averaged: 1 / (batches + 1).
GRADFUSE_HD double adaptive_momentum(Drift& drift, double mean, double variance,
                                     double running_mean, double running_var, double eps) {
  const double average = 1.0 / (drift.batches + 1.0);
  drift.batches += 1.0;
  if (average >= 1.0) return 1.0;
  const double scale = 1.0 / (running_var + eps);
  const double of_mean =
      bounded((mean - running_mean) * std::sqrt(scale), -kMostDifference, kMostDifference);
  const double of_variance =
      bounded((variance - running_var) * scale * std::sqrt(0.5), -kMostDifference, kMostDifference);
  double momentum = kLeastMomentum;
  if (std::isfinite(of_mean + of_variance)) {
    const double square = of_mean * of_mean + of_variance * of_variance;
    drift.mean = running_average(drift.mean, of_mean, kDriftSmoothing);
    drift.variance = running_average(drift.variance, of_variance, kDriftSmoothing);
    drift.square = running_average(drift.square, square, kDriftSmoothing);
    const double noise = kDriftSmoothing / (2.0 - kDriftSmoothing);
    const double smoothed = drift.mean * drift.mean + drift.variance * drift.variance;
    const double share = drift.square > 0.0 ? smoothed / drift.square : 0.0;
    const double signal = bounded((share - noise) / (1.0 - noise), 0.0, 1.0);
    momentum += (kMostMomentum - kLeastMomentum) * signal;
  }
  return momentum > average ? momentum : average;
}

// Elements and means are multiplied by this, which is exact and part of a fused multiply-add. Then
// no difference of finite values overflows, and the scale of the largest values is not subnormal.
constexpr double kShrink = 0x1p-4;

template <class F>
GRADFUSE_HD F shrunk_mean(double mean) {
  return static_cast<F>(mean * kShrink);
}
template <class F>
GRADFUSE_HD F scale_of_shrunk(double scale) {
  return static_cast<F>(scale / kShrink);
}

// z = (x * kShrink - mean) * scale + shift. mean is rounded to F; shift makes up for the error.
template <class F>
struct Normalisation {
  F mean, scale, shift;
};

// Correction of a normalised element for the rounded mean, which is shrunk / kShrink.
GRADFUSE_HD double normalisation_offset(double shrunk, KeptStatistics kept) {
  return (shrunk / kShrink - kept.mean) * kept.invstd;
}

template <class F>
GRADFUSE_HD Normalisation<F> normalisation(KeptStatistics kept, double weight, double bias) {
  const F shrunk = shrunk_mean<F>(kept.mean);
  const double scale = weight * kept.invstd;
  const double offset = normalisation_offset(static_cast<double>(shrunk), {kept.mean, scale});
  return {shrunk, scale_of_shrunk<F>(scale), static_cast<F>(bias + offset)};
}

// With h = (x * kShrink - mean) * invstd, grad_input = direct * g + (h * slope + shift), where g is
// the gradient before the activation. The normalised element itself is h + offset.
template <class F>
struct InputGradient {
  F mean, invstd, direct, slope, shift;
};

// Sums over a channel of g and of g * h: what the batch statistics add to the gradient comes from
// their means. In eval mode the statistics are constants and add nothing.
struct GradientSums {
  double sum;
  double dot;
};

// Sum of g * (normalised element): the gradient of weight, unless it is corrected.
GRADFUSE_HD double weight_gradient(GradientSums s, double offset) { return s.dot + offset * s.sum; }
GRADFUSE_HD double weight_gradient(GradientSums s, double offset, Correction now) {
  return now.scale * weight_gradient(s, offset) + now.shift * s.sum;
}

// The gradients of a channel's weight and bias.
struct ParameterGradients {
  double weight, bias;
};

// Those of the ghost batches so far: sums [2, channels]; null data if all samples are one batch.
struct GhostSums {
  double* data;
  bool is_first, is_last;

  // Adds a ghost batch's and returns the sum.
  GRADFUSE_HD ParameterGradients add(ParameterGradients now, int64_t channels, int64_t c) const {
    if (!data) return now;
    if (!is_first) now.weight += data[c], now.bias += data[channels + c];
    data[c] = now.weight;
    data[channels + c] = now.bias;
    return now;
  }
  GRADFUSE_HD bool is_complete() const { return !data || is_last; }
};

// Means over all values of a channel of g and of g * (normalised element).
struct GradientMeans {
  double of_g, of_product;
};
GRADFUSE_HD GradientMeans gradient_means(GradientSums s, double offset, double count) {
  return {s.sum / count, weight_gradient(s, offset) / count};
}

template <class F>
GRADFUSE_HD InputGradient<F> input_gradient(KeptStatistics kept, double weight, bool training,
                                            GradientMeans means) {
  const F shrunk = shrunk_mean<F>(kept.mean);
  const double direct = weight * kept.invstd;
  InputGradient<F> r = {shrunk, scale_of_shrunk<F>(kept.invstd), static_cast<F>(direct), F(0),
                        F(0)};
  if (!training) return r;
  const double offset = normalisation_offset(static_cast<double>(shrunk), kept);
  const double slope = -direct * means.of_product;
  r.slope = static_cast<F>(slope);
  r.shift = static_cast<F>(slope * offset - direct * means.of_g);
  return r;
}

// A channel's coefficients, in the order in which kernels keep vectors of them. The first three are
// those of the forward: a Normalisation. The backward needs all: kInvstd, then an InputGradient.
enum Coefficient {
  kMean,
  kScale,
  kShift,
  kForwardCoefficients,
  kInvstd = kForwardCoefficients,
  kDirect,
  kSlope,
  kOffset,
  kBackwardCoefficients
};

}  // namespace gradfuse
