// The optimizers' updates of one element, for host and device alike and for vectors as for scalars:
// V is what one step computes, S the scalar that its lanes are. Sources in adamw.h and sgd.h.
//
// Include inside a namespace that has square_root(V), so that on the CPU every instruction set
// compiles its own.

// The same in the type that elements are computed in.
template <class S>
GRADFUSE_HD AdamWFactors<S> narrowed(const AdamWFactors<double>& f) {
  return {static_cast<S>(f.one_minus_beta1),
          static_cast<S>(f.beta2),
          static_cast<S>(f.one_minus_beta2),
          static_cast<S>(f.decay),
          static_cast<S>(f.step_size),
          static_cast<S>(f.inv_sqrt_bias_correction2),
          static_cast<S>(f.eps)};
}

// The second moment after gradient g.
template <class S, class V>
GRADFUSE_HD V adamw_exp_avg_sq(V g, V exp_avg_sq, const AdamWFactors<S>& f) {
  return exp_avg_sq * f.beta2 + g * g * f.one_minus_beta2;
}

// One update. `max_exp_avg_sq`, of amsgrad, is null without it. Assumes a square_root(V) beside V.
template <class S, class V>
GRADFUSE_HD void adamw_update(V& param, V g, V& exp_avg, V& exp_avg_sq, V* max_exp_avg_sq,
                              const AdamWFactors<S>& f) {
  exp_avg = exp_avg + (g - exp_avg) * f.one_minus_beta1;
  exp_avg_sq = adamw_exp_avg_sq(g, exp_avg_sq, f);
  V bound = exp_avg_sq;
  if (max_exp_avg_sq) {
    *max_exp_avg_sq = (*max_exp_avg_sq <= exp_avg_sq) ? exp_avg_sq : *max_exp_avg_sq;
    *max_exp_avg_sq = (exp_avg_sq != exp_avg_sq)
                          ? exp_avg_sq
                          : *max_exp_avg_sq;  // NaN stays, as in torch.maximum
    bound = *max_exp_avg_sq;
  }
  param = param * f.decay -
          exp_avg * f.step_size / (square_root(bound) * f.inv_sqrt_bias_correction2 + f.eps);
}

// The term of an element in the mean square of g / sqrt(second moment), bias-corrected: what update
// clipping bounds by 1.
template <class S, class V>
GRADFUSE_HD V adamw_ratio(V g, V exp_avg_sq, const AdamWFactors<S>& f) {
  const V corrected = adamw_exp_avg_sq(g, exp_avg_sq, f) *
                      (f.inv_sqrt_bias_correction2 * f.inv_sqrt_bias_correction2);
  const V least = V{} + f.eps * f.eps;
  return g * g / ((corrected > least) ? corrected : least);
}

template <class S>
GRADFUSE_HD SgdFactors<S> narrowed(const SgdFactors<double>& f) {
  return {static_cast<S>(f.lr), static_cast<S>(f.weight_decay), static_cast<S>(f.momentum),
          static_cast<S>(f.one_minus_dampening), f.nesterov};
}

// One update. `buffer` is null without momentum; zero before the exp_avg step.
template <class S, class V>
GRADFUSE_HD void sgd_update(V& param, V g, V* buffer, const SgdFactors<S>& f) {
  if (f.weight_decay != S(0)) g = g + param * f.weight_decay;
  if (buffer) {
    *buffer = *buffer * f.momentum + g * f.one_minus_dampening;
    g = f.nesterov ? g + *buffer * f.momentum : *buffer;
  }
  param = param - g * f.lr;
}

// 32 bits that look random, from numbers that do not: `hashed` of every lane.
template <class U>
GRADFUSE_HD U random_bits(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
