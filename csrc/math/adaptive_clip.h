// Adaptive gradient clipping for host and device: the factor of one unit.
#pragma once

#include "norm.h"

namespace gradfuse {

// Factor of one unit's gradient (Brock et al. 2021, eq. 3), 1 if it is not clipped. As value *
// 2^exponent, because float64 gradients of 1e300 beside weights of 1e-10 need one outside float64's
// range. Non-finite norms give what the division gives. `scale` is the loss scale of the gradient,
// which changes no coefficient.
GRADFUSE_HD ScaledNorm unit_coefficient(ScaledNorm weight, ScaledNorm grad, double clip_factor,
                                        double eps, double scale) {
  if (to_double(weight) < eps) weight = {eps, 0.0};
  const ScaledNorm limit = {clip_factor * scale * weight.value, weight.exponent};
  if (times_power(grad.value, grad.exponent - limit.exponent) <= limit.value) return {1.0, 0.0};
  const double least = 1e-6 * scale;
  if (to_double(grad) < least) grad = {least, 0.0};
  return {limit.value / grad.value, limit.exponent - grad.exponent};
}

}  // namespace gradfuse
