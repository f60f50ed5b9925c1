// Adaptive gradient clipping for host and device alike: the factor of one unit.
#pragma once

#include "norm.h"

namespace gradfuse {

// Adaptive gradient clipping of one unit (Brock et al. 2021, eq. 3): the factor for its gradient,
// 1 where it stays as it is, as value * 2^exponent: float64 gradients of 1e300 beside weights
// of 1e-10 need one that float64 has no room for. Non-finite norms give what the division gives.
GRADFUSE_HD ScaledNorm unit_coefficient(ScaledNorm weight, ScaledNorm grad, double clip_factor,
                                        double eps) {
  if (to_double(weight) < eps) weight = {eps, 0.0};
  const ScaledNorm limit = {clip_factor * weight.value, weight.exponent};
  if (times_power(grad.value, grad.exponent - limit.exponent) <= limit.value) return {1.0, 0.0};
  if (to_double(grad) < 1e-6) grad = {1e-6, 0.0};
  return {limit.value / grad.value, limit.exponent - grad.exponent};
}

}  // namespace gradfuse
