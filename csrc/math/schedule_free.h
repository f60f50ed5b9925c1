// Schedule-free AdamW: values computed once per parameter and step. The update of an element is in
// updates.h.
//
// A parameter holds y, at which gradients are taken, and its state z, the iterate of AdamW without
// momentum. x, the weighted mean of all z, is not stored: y = (1 - beta1) z + beta1 x.
//
// Source: Defazio et al. 2024, "The Road Less Scheduled", algorithm 1, with the weights of its
// implementation: the largest learning rate so far to a power, times the step's number to another.
#pragma once

#include <cmath>

#include "common.h"

namespace gradfuse {

struct ScheduleFreeOptions {
  double beta1, beta2, eps, weight_decay;
  double warmup_steps;  // over which the learning rate grows linearly
  double r, weight_lr_power;
};

// What the mean has seen, stored as two float64 tensors [] for each parameter.
struct Averaging {
  double weight_sum;
  double lr_max;
};

// Values shared by all elements of a parameter in one step.
template <class S>
struct ScheduleFreeFactors {
  S beta2, one_minus_beta2;
  S inv_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^step)
  S eps, weight_decay;
  S weight;  // of z in the mean
  S step_of_y;  // minus what y moves along the update
  S lr;
};

struct ScheduleFreeStep {
  ScheduleFreeFactors<double> factors;
  Averaging after;
};

// `step` is the number of the coming update, counted from 1.
GRADFUSE_HD ScheduleFreeStep schedule_free_step(const ScheduleFreeOptions& o, double lr,
                                                double step, Averaging before) {
  if (step <= o.warmup_steps) lr *= step / o.warmup_steps;
  Averaging after = before;
  if (lr > after.lr_max) after.lr_max = lr;
  const double weight = std::pow(step, o.r) * std::pow(after.lr_max, o.weight_lr_power);
  after.weight_sum += weight;
  const double c = after.weight_sum > 0.0 ? weight / after.weight_sum : 0.0;
  return {{o.beta2, 1.0 - o.beta2, 1.0 / std::sqrt(1.0 - std::pow(o.beta2, step)), o.eps,
           o.weight_decay, c, lr * (1.0 - o.beta1 * (1.0 - c)), lr},
          after};
}

}  // namespace gradfuse
