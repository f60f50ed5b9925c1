// How a gradient enters an optimizer's update, for host and device.
#pragma once

#include "adamw.h"
#include "lion.h"
#include "norm.h"
#include "schedule_free.h"
#include "sgd.h"

namespace gradfuse {

// g = clamp(gradient * first * second * third, -bound, bound). The factor is a product of three,
// each within the range of the compute type.
struct ElementFactor {
  double first, second, third;
  double bound;
};

GRADFUSE_HD ElementFactor element_factor(ScaledNorm factor, DType dtype, double bound,
                                         bool maximize) {
  Factor f = factor_of(factor);
  // Below 2^-126 float32 loses bits, although 1e30 times such a factor is a normal number.
  if (dtype != DType::Double && f.whole < 0x1p-126)
    f = {f.whole, 0x1p-100, 0x1p-100, f.whole * 0x1p200};
  return {maximize ? -f.first : f.first, f.second, f.third, bound};
}

}  // namespace gradfuse
