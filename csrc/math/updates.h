// The optimizers' updates of one element for host and device, for vectors and scalars: V is the
// type of the computation, S its scalar. Sources in adamw.h, sgd.h, lion.h and schedule_free.h.
//
// Include inside a namespace that has square_root(V), so that on the CPU every instruction set
// compiles its own.

#include "arctangent.h"

// The factors in the compute type.
template <class S>
GRADFUSE_HD AdamWFactors<S> narrowed(const AdamWFactors<double>& f) {
  return {static_cast<S>(f.one_minus_beta1),
          static_cast<S>(f.beta2),
          static_cast<S>(f.one_minus_beta2),
          static_cast<S>(f.decay),
          static_cast<S>(f.coupled_decay),
          static_cast<S>(f.step_size),
          static_cast<S>(f.inv_bias_correction1),
          static_cast<S>(f.inv_sqrt_bias_correction2),
          static_cast<S>(f.eps),
          f.atan2};
}

// The second moment after gradient g.
template <class S, class V>
GRADFUSE_HD V second_moment(V g, V exp_avg_sq, S beta2, S one_minus_beta2) {
  return exp_avg_sq * beta2 + g * g * one_minus_beta2;
}

// Takes gradient g into the moments. `max_exp_avg_sq` is null without amsgrad. Returns the moment
// that the update divides by.
template <class S, class V>
GRADFUSE_HD V adamw_moments(V param, V g, V& exp_avg, V& exp_avg_sq, V* max_exp_avg_sq,
                            const AdamWFactors<S>& f) {
  if (f.coupled_decay != S(0)) g = g + param * f.coupled_decay;
  exp_avg = exp_avg + (g - exp_avg) * f.one_minus_beta1;
  exp_avg_sq = second_moment(g, exp_avg_sq, f.beta2, f.one_minus_beta2);
  if (!max_exp_avg_sq) return exp_avg_sq;
  *max_exp_avg_sq = (*max_exp_avg_sq <= exp_avg_sq) ? exp_avg_sq : *max_exp_avg_sq;
  *max_exp_avg_sq =
      (exp_avg_sq != exp_avg_sq) ? exp_avg_sq : *max_exp_avg_sq;  // NaN stays, as in torch.maximum
  return *max_exp_avg_sq;
}

// One update.
template <class S, class V>
GRADFUSE_HD void adamw_update(V& param, V g, V& exp_avg, V& exp_avg_sq, V* max_exp_avg_sq,
                              const AdamWFactors<S>& f) {
  const V bound = adamw_moments(param, g, exp_avg, exp_avg_sq, max_exp_avg_sq, f);
  const V root = square_root(bound) * f.inv_sqrt_bias_correction2;
  if (f.atan2)
    param = param * f.decay - f.step_size * arctangent<S>(exp_avg * f.inv_bias_correction1, root);
  else
    param = param * f.decay - exp_avg * f.step_size / (root + f.eps);
}

// An element's term of the mean square of g / sqrt(second moment), bias-corrected, which update
// clipping bounds by 1.
template <class S, class V>
GRADFUSE_HD V adamw_ratio(V g, V exp_avg_sq, const AdamWFactors<S>& f) {
  const V corrected = second_moment(g, exp_avg_sq, f.beta2, f.one_minus_beta2) *
                      (f.inv_sqrt_bias_correction2 * f.inv_sqrt_bias_correction2);
  const V least = V{} + f.eps * f.eps;
  const V zero = V{};
  return (g == zero) ? zero : g * g / ((corrected > least) ? corrected : least);
}

// LAMB's update of an element for a learning rate of 1, with the decay of weights.
template <class S, class V>
GRADFUSE_HD V lamb_direction(V param, V g, V exp_avg, V exp_avg_sq, S weight_decay,
                             const AdamWFactors<S>& f) {
  const V bound = adamw_moments(param, g, exp_avg, exp_avg_sq, static_cast<V*>(nullptr), f);
  const V zero = V{};
  const V quotient =
      exp_avg * f.inv_bias_correction1 / (square_root(bound) * f.inv_sqrt_bias_correction2 + f.eps);
  return ((exp_avg == zero) ? zero : quotient) + param * weight_decay;
}

template <class S>
GRADFUSE_HD LionFactors<S> narrowed(const LionFactors<double>& f) {
  return {static_cast<S>(f.one_minus_beta1), static_cast<S>(f.one_minus_beta2),
          static_cast<S>(f.decay), static_cast<S>(f.lr)};
}

// One update by the sign of a mean of gradient and momentum.
template <class S, class V>
GRADFUSE_HD void lion_update(V& param, V g, V& exp_avg, const LionFactors<S>& f) {
  const V zero = V{};
  const V mean = exp_avg + (g - exp_avg) * f.one_minus_beta1;
  V move = (mean > zero) ? zero + f.lr : mean * S(0);  // NaN stays
  move = (mean < zero) ? zero - f.lr : move;
  param = param * f.decay - move;
  exp_avg = exp_avg + (g - exp_avg) * f.one_minus_beta2;
}

template <class S>
GRADFUSE_HD ScheduleFreeFactors<S> narrowed(const ScheduleFreeFactors<double>& f) {
  return {static_cast<S>(f.beta2),
          static_cast<S>(f.one_minus_beta2),
          static_cast<S>(f.inv_sqrt_bias_correction2),
          static_cast<S>(f.eps),
          static_cast<S>(f.weight_decay),
          static_cast<S>(f.weight),
          static_cast<S>(f.step_of_y),
          static_cast<S>(f.lr)};
}

// One update of y, the parameter, and z.
template <class S, class V>
GRADFUSE_HD void schedule_free_update(V& y, V g, V& z, V& exp_avg_sq,
                                      const ScheduleFreeFactors<S>& f) {
  exp_avg_sq = second_moment(g, exp_avg_sq, f.beta2, f.one_minus_beta2);
  V move = g / (square_root(exp_avg_sq) * f.inv_sqrt_bias_correction2 + f.eps);
  if (f.weight_decay != S(0)) move = move + y * f.weight_decay;
  y = y + (z - y) * f.weight - move * f.step_of_y;
  z = z - move * f.lr;
}

template <class S>
GRADFUSE_HD SgdFactors<S> narrowed(const SgdFactors<double>& f) {
  return {static_cast<S>(f.lr), static_cast<S>(f.weight_decay), static_cast<S>(f.momentum),
          static_cast<S>(f.one_minus_dampening), f.nesterov};
}

// One update. `buffer` is null without momentum, and zero before the first step.
template <class S, class V>
GRADFUSE_HD void sgd_update(V& param, V g, V* buffer, const SgdFactors<S>& f) {
  if (f.weight_decay != S(0)) g = g + param * f.weight_decay;
  if (buffer) {
    *buffer = *buffer * f.momentum + g * f.one_minus_dampening;
    g = f.nesterov ? g + *buffer * f.momentum : *buffer;
  }
  param = param - g * f.lr;
}
