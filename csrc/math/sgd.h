// Stochastic gradient descent with momentum: what is computed once for a parameter and step. The
// update of an element is in updates.h.
//
// Source: torch.optim.SGD; Sutskever, Martens, Dahl, Hinton 2013, "On the importance of
// initialization and momentum in deep learning", whose velocity is minus lr times the buffer here.
#pragma once

#include "common.h"

namespace gradfuse {

struct SgdOptions {
  double momentum, dampening, weight_decay;
  bool nesterov;
};

// What is the same for all elements of a parameter at one step.
template <class S>
struct SgdFactors {
  S lr, weight_decay, momentum;
  S one_minus_dampening;  // 1 - dampening; 1 in the first step, which takes the gradient whole
  bool nesterov;
};

GRADFUSE_HD SgdFactors<double> sgd_factors(const SgdOptions& o, double lr, bool is_first) {
  return {lr, o.weight_decay, o.momentum, is_first ? 1.0 : 1.0 - o.dampening, o.nesterov};
}

}  // namespace gradfuse
