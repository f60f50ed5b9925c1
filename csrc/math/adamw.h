// Adam, AdamW and LAMB: values computed once per parameter and step. The update of an element is in
// updates.h. LAMB is AdamW whose learning rate is multiplied by a parameter's trust ratio.
//
// Source: Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1; Loshchilov,
// Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; Reddi, Kale, Kumar 2018, "On
// the Convergence of Adam and Beyond", algorithm 2 (amsgrad); Wortsman et al. 2023, "Stable and
// low-precision training for large-scale vision-language models", algorithm 2 (update clipping);
// Everett et al. 2024, "Scaling Exponents Across Parameterizations and Optimizers", section 4
// (atan2); You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76
// minutes", algorithm 2 (LAMB).
#pragma once

#include <cmath>

#include "common.h"

namespace gradfuse {

struct AdamWOptions {
  double beta1, beta2, eps, weight_decay;
  bool decoupled;  // the decay of weights does not enter the moments
};

// LAMB's learning rate for each parameter.
struct TrustOptions {
  bool adapts;  // else the ratio is 1
  bool clips;  // the ratio is at most 1
};

// Values shared by all elements of a parameter in one step.
template <class S>
struct AdamWFactors {
  S one_minus_beta1;
  S beta2, one_minus_beta2;
  S decay;  // 1 - lr * weight_decay
  S coupled_decay;  // of Adam: what of the parameter is added to its gradient
  S step_size;  // lr / (1 - beta1^step); with atan2 lr
  S inv_bias_correction1;  // 1 / (1 - beta1^step), of atan2
  S inv_sqrt_bias_correction2;  // 1 / sqrt(1 - beta2^step)
  S eps;
  bool atan2;
};

// `step` is the number of the coming update, counted from 1.
GRADFUSE_HD AdamWFactors<double> adamw_factors(const AdamWOptions& o, double lr, double step,
                                               bool atan2) {
  const double inv_bias_correction1 = 1.0 / (1.0 - std::pow(o.beta1, step));
  const double bias_correction2 = 1.0 - std::pow(o.beta2, step);
  return {1.0 - o.beta1,
          o.beta2,
          1.0 - o.beta2,
          o.decoupled ? 1.0 - lr * o.weight_decay : 1.0,
          o.decoupled ? 0.0 : o.weight_decay,
          atan2 ? lr : lr * inv_bias_correction1,
          inv_bias_correction1,
          1.0 / std::sqrt(bias_correction2),
          o.eps,
          atan2};
}

// Update clipping: the learning rate's factor, from the mean square of g / sqrt(exp_avg_sq).
GRADFUSE_HD double update_clip_factor(double mean_square) {
  return mean_square > 1.0 ? 1.0 / std::sqrt(mean_square) : 1.0;
}

// LAMB: the learning rate's factor, from the sums of squares of a parameter and of its update.
GRADFUSE_HD double trust_ratio(double param_squares, double update_squares, TrustOptions o) {
  if (!o.adapts || !(param_squares > 0.0) || !(update_squares > 0.0)) return 1.0;
  const double ratio = std::sqrt(param_squares) / std::sqrt(update_squares);
  return o.clips && ratio > 1.0 ? 1.0 : ratio;
}

// eps for gradients that a clip multiplied by `coefficient`: eps times it, so that the update does
// not depend on the clip's scale. Not below what the second moment resolves, whose smallest normal
// number is `smallest`: there it is 0 while the first is not, and the quotient would explode.
GRADFUSE_HD double followed_eps(double eps, double beta2, double coefficient, double smallest) {
  const double resolved = std::sqrt(smallest / (1.0 - beta2));
  const double least = eps < resolved ? eps : resolved;
  const double followed = eps * coefficient;
  return followed < least ? least : followed;
}

}  // namespace gradfuse
