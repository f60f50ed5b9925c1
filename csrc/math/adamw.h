// AdamW: what is computed once for a parameter and step. The update of an element is in updates.h.
//
// Source: Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1; Loshchilov,
// Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; Reddi, Kale, Kumar 2018, "On
// the Convergence of Adam and Beyond", algorithm 2 (amsgrad); Wortsman et al. 2023, "Stable and
// low-precision training for large-scale vision-language models", algorithm 2 (update clipping).
#pragma once

#include <cmath>

#include "common.h"

namespace gradfuse {

struct AdamWOptions {
  double beta1, beta2, eps, weight_decay;
};

// What is the same for all elements of a parameter at one step.
template <class S>
struct AdamWFactors {
  S one_minus_beta1;         // 1 - beta1
  S beta2, one_minus_beta2;  // beta2, 1 - beta2
  S decay;         // 1 - lr * weight_decay
  S step_size;     // lr / (1 - beta1^step)
  S inv_sqrt_bias_correction2;          // 1 / sqrt(1 - beta2^step)
  S eps;
};

// `step` counts from 1, that of the update about to be made.
GRADFUSE_HD AdamWFactors<double> adamw_factors(const AdamWOptions& o, double lr, double step) {
  const double bias_correction1 = 1.0 - std::pow(o.beta1, step);
  const double bias_correction2 = 1.0 - std::pow(o.beta2, step);
  return {1.0 - o.beta1,
          o.beta2,
          1.0 - o.beta2,
          1.0 - lr * o.weight_decay,
          lr / bias_correction1,
          1.0 / std::sqrt(bias_correction2),
          o.eps};
}

// The factor of the learning rate for a mean square of g / sqrt(exp_avg_sq): update clipping.
GRADFUSE_HD double update_clip_factor(double mean_square) {
  return mean_square > 1.0 ? 1.0 / std::sqrt(mean_square) : 1.0;
}

}  // namespace gradfuse
