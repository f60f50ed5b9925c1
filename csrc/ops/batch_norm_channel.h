// What a channel's sums become, for host and device alike: statistics, running averages,
// coefficients, and the gradients of weight and bias.
//
// Vectors has the access to vectors of channels: read(vector, element, otherwise) and write(vector,
// element, value), of the host or of the device.
#pragma once

#include <cmath>

#include "../math/batch_norm.h"
#include "batch_norm.h"

namespace gradfuse {

// Updates a channel's running averages by the batch's mean and unbiased variance.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Vectors>
GRADFUSE_HD void update_running(const BatchNormForward& call, int64_t c, double mean, double var) {
  const double old_mean = Vectors::read(call.running_mean, c, 0.0);
  const double old_var = Vectors::read(call.running_var, c, 1.0);
  double momentum = call.momentum_value ? *call.momentum_value : call.momentum;
  if (call.drift.data) {
    const int64_t channels = call.shape.channels;
    Drift drift = {Vectors::read(call.drift, c, 0.0), Vectors::read(call.drift, channels + c, 0.0),
                   Vectors::read(call.drift, 2 * channels + c, 0.0),
                   Vectors::read(call.drift, 3 * channels + c, 0.0)};
    momentum = adaptive_momentum(drift, mean, var, old_mean, old_var, call.eps);
    Vectors::write(call.drift, c, drift.mean);
    Vectors::write(call.drift, channels + c, drift.variance);
    Vectors::write(call.drift, 2 * channels + c, drift.square);
    Vectors::write(call.drift, 3 * channels + c, drift.batches);
  }
  Vectors::write(call.running_mean, c, running_average(old_mean, mean, momentum));
  Vectors::write(call.running_var, c, running_average(old_var, var, momentum));
}

// What a channel is normalised by when training.
struct Statistics {
  double count;
  Moments moments;
};
// Those of the call's own batch, from sums of differences from `shift`.
GRADFUSE_HD Statistics own_statistics(const BatchNormForward& call, ChannelSums sums,
                                      double shift) {
  const double count = static_cast<double>(call.shape.count());
  return {count, moments(sums, shift, count)};
}
GRADFUSE_HD Statistics statistics_over_ranks(const BatchNormForward& call, int64_t c) {
  const Tally all = call.over_ranks.of_channel(call.shape.channels, c);
  return {all.count, {all.mean, all.m2 / all.count}};
}

// Writes a channel's part of call.tally.
GRADFUSE_HD void write_tally(const BatchNormForward& call, int64_t c, Statistics own) {
  if (c == 0) call.tally[0] = own.count;
  call.tally[1 + c] = own.moments.mean;
  call.tally[1 + call.shape.channels + c] = own.moments.variance * own.count;
}

// Writes a channel's statistics and running averages, and returns its coefficients. `batch` is used
// if the call trains.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F, class Vectors>
GRADFUSE_HD Normalisation<F> finish_forward(const BatchNormForward& call, int64_t c,
                                            Statistics batch) {
  const int64_t channels = call.shape.channels;
  const double weight = Vectors::read(call.weight, c, 1.0);
  const double bias = Vectors::read(call.bias, c, 0.0);
  const double mean = Vectors::read(call.running_mean, c, 0.0);
  const double var = Vectors::read(call.running_var, c, 1.0);
  if (!call.training)
    return normalisation<F>(keep_statistics<F>(call.stats, channels, c, mean, var, call.eps),
                            weight, bias);
  const Moments now = batch.moments;
  const KeptStatistics kept =
      keep_statistics<F>(call.stats, channels, c, now.mean, now.variance, call.eps);
  Correction correction = {1.0, 0.0};
  if (call.renormalises) {
    const double step = call.step ? static_cast<double>(*call.step) : HUGE_VAL;
    correction = keep_correction<F>(call.stats, channels, c,
                                    renormalisation(call.renorm, step, kept, mean, var, call.eps));
  }
  if (call.running_mean.data && batch.count > 0.0)  // NaN if a rank refused its input
    update_running<Vectors>(call, c, now.mean, unbiased(now.variance, batch.count));
  return normalisation<F>(kept, correction.weight(weight), correction.bias(weight, bias));
}

template <class F>
GRADFUSE_HD KeptStatistics kept_of(const BatchNormBackward& call, int64_t c) {
  return kept_statistics<F>(call.stats, call.shape.channels, c);
}
template <class F>
GRADFUSE_HD Correction correction_of(const BatchNormBackward& call, int64_t c) {
  if (!call.renormalises) return {1.0, 0.0};
  return kept_correction<F>(call.stats, call.shape.channels, c);
}

// The coefficients of the forward.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F, class Vectors>
GRADFUSE_HD Normalisation<F> normalisation_of(const BatchNormBackward& call, int64_t c) {
  const Correction correction = correction_of<F>(call, c);
  const double weight = Vectors::read(call.weight, c, 1.0);
  const double bias = Vectors::read(call.bias, c, 0.0);
  return normalisation<F>(kept_of<F>(call, c), correction.weight(weight),
                          correction.bias(weight, bias));
}

// Whether a backward call has to sum over its own batch.
inline bool needs_sums(const BatchNormBackward& call) {
  return call.sums || call.grad_weight.data || call.grad_bias.data ||
         (call.training && call.grad_input && !call.means);
}

// Writes a channel's parameter gradients, or its part of call.sums, and returns the coefficients of
// its input gradient.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F, class Vectors>
GRADFUSE_HD InputGradient<F> finish_backward(const BatchNormBackward& call, int64_t c,
                                             GradientSums sums) {
  const KeptStatistics kept = kept_of<F>(call, c);
  const Correction correction = correction_of<F>(call, c);
  const double weight = correction.weight(Vectors::read(call.weight, c, 1.0));
  const int64_t channels = call.shape.channels;
  const double count = static_cast<double>(call.shape.count());
  const double mean = static_cast<double>(shrunk_mean<F>(kept.mean));
  const double offset = normalisation_offset(mean, kept);
  const GradientMeans means = call.means ? GradientMeans{call.means[c], call.means[channels + c]}
                                         : gradient_means(sums, offset, count);
  const InputGradient<F> g = input_gradient<F>(kept, weight, call.training, means);
  if (call.sums) {
    call.sums[c] = sums.sum;
    call.sums[channels + c] = weight_gradient(sums, offset);
  }
  const ParameterGradients all =
      call.ghosts.add({weight_gradient(sums, offset, correction), sums.sum}, channels, c);
  if (call.ghosts.is_complete()) {
    Vectors::write(call.grad_weight, c, all.weight);
    Vectors::write(call.grad_bias, c, all.bias);
  }
  return g;
}

}  // namespace gradfuse
