// How a gradient comes into an optimizer's update, for host and device alike.
#pragma once

#include "adamw.h"
#include "norm.h"
#include "sgd.h"

namespace gradfuse {

// g = clamp(gradient * first * second * third, -bound, bound). The factor is a product of three,
// each of which has room in the type that elements are computed in.
struct ElementFactor {
  double first, second, third;
  double bound;
};

GRADFUSE_HD ElementFactor element_factor(ScaledNorm factor, DType dtype, double bound,
                                         bool maximize) {
  Factor f = factor_of(factor);
  // float32 has few bits for a factor below 2^-126, though 1e30 times it is a number like any
  // other.
  if (dtype != DType::Double && f.whole < 0x1p-126)
    f = {f.whole, 0x1p-100, 0x1p-100, f.whole * 0x1p200};
  return {maximize ? -f.first : f.first, f.second, f.third, bound};
}

}  // namespace gradfuse
