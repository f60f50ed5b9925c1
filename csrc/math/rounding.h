// How new values are rounded to bfloat16, for host and device alike.
#pragma once

#include "common.h"

namespace gradfuse {

// To nearest, or at random by a hash of key, element and stream, so that the same step gives the
// same bits.
struct Rounding {
  bool stochastic;
  uint32_t key;
};

// A hash of a number (after Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
// generators"); updates.h has it for vectors.
GRADFUSE_HD uint32_t hashed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

GRADFUSE_HD Rounding rounding_of(bool stochastic, int32_t row, double step) {
  const uint32_t count = static_cast<uint32_t>(step);
  return {stochastic, hashed(static_cast<uint32_t>(row) ^ hashed(count))};
}

}  // namespace gradfuse
