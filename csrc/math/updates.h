// The optimizers' updates of one element, for host and device alike and for vectors as for scalars:
// V is what one step computes, S the scalar that its lanes are. Sources in adamw.h and sgd.h.
//
// Include inside a namespace that has square_root(V), so that on the CPU every instruction set
// compiles its own.

// The same in the type that elements are computed in.
template <class S>
GRADFUSE_HD AdamWFactors<S> narrowed(const AdamWFactors<double>& f) {
  return {static_cast<S>(f.rest1), static_cast<S>(f.beta2),     static_cast<S>(f.rest2),
          static_cast<S>(f.decay), static_cast<S>(f.step_size), static_cast<S>(f.root),
          static_cast<S>(f.eps)};
}

// The second moment after gradient g.
template <class S, class V>
GRADFUSE_HD V adamw_second(V g, V second, const AdamWFactors<S>& f) {
  return second * f.beta2 + g * g * f.rest2;
}

// One update. `largest`, of amsgrad, is null without it. Assumes a square_root(V) beside V.
template <class S, class V>
GRADFUSE_HD void adamw_update(V& param, V g, V& first, V& second, V* largest,
                              const AdamWFactors<S>& f) {
  first = first + (g - first) * f.rest1;
  second = adamw_second(g, second, f);
  V bound = second;
  if (largest) {
    *largest = (*largest <= second) ? second : *largest;
    *largest = (second != second) ? second : *largest;  // NaN stays, as in torch.maximum
    bound = *largest;
  }
  param = param * f.decay - first * f.step_size / (square_root(bound) * f.root + f.eps);
}

// The term of an element in the mean square of g / sqrt(second moment), bias-corrected: what update
// clipping bounds by 1.
template <class S, class V>
GRADFUSE_HD V adamw_ratio(V g, V second, const AdamWFactors<S>& f) {
  const V corrected = adamw_second(g, second, f) * (f.root * f.root);
  const V least = V{} + f.eps * f.eps;
  return g * g / ((corrected > least) ? corrected : least);
}

template <class S>
GRADFUSE_HD SgdFactors<S> narrowed(const SgdFactors<double>& f) {
  return {static_cast<S>(f.lr), static_cast<S>(f.weight_decay), static_cast<S>(f.momentum),
          static_cast<S>(f.rest), f.nesterov};
}

// One update. `buffer` is null without momentum; zero before the first step.
template <class S, class V>
GRADFUSE_HD void sgd_update(V& param, V g, V* buffer, const SgdFactors<S>& f) {
  if (f.weight_decay != S(0)) g = g + param * f.weight_decay;
  if (buffer) {
    *buffer = *buffer * f.momentum + g * f.rest;
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
