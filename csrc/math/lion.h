// Lion: values computed once per parameter and step. The update of an element is in updates.h.
//
// Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2.
#pragma once

#include "common.h"

namespace gradfuse {

struct LionOptions {
  double beta1, beta2, weight_decay;
};

// Values shared by all elements of a parameter in one step.
template <class S>
struct LionFactors {
  S one_minus_beta1, one_minus_beta2;
  S decay;  // 1 - lr * weight_decay
  S lr;
};

GRADFUSE_HD LionFactors<double> lion_factors(const LionOptions& o, double lr) {
  return {1.0 - o.beta1, 1.0 - o.beta2, 1.0 - lr * o.weight_decay, lr};
}

}  // namespace gradfuse
