// What the kernels of an optimizer's step are called with, on every device. Part of ops.h; apart,
// for files compiled for one instruction set must include no templates of the standard library.
#pragma once

#include <cstdint>

#include "math/adamw.h"
#include "math/clip.h"
#include "math/sgd.h"

namespace gradfuse {

enum class Rule : int32_t { AdamW, Sgd };

// A parameter, its gradient and its state: dense runs of numel elements in one order. Complex ones
// count their real parts singly.
struct ParamRef {
  void* param;
  const void* grad;
  void* first;    // AdamW: exp_avg; SGD: momentum_buffer, or null without momentum
  void* second;   // AdamW: exp_avg_sq
  void* largest;  // AdamW with amsgrad: max_exp_avg_sq; else null
  float* master;  // the parameter in float32 where it is of 16 bits and has one; else null
  float* step;  // []: steps taken; advanced by an update that is not skipped. Null: not counted
  int64_t numel;
  DType dtype;  // of param and grad
  DType state_dtype;  // of first, second, largest: dtype or Float
  int32_t group;
  int32_t row;  // among the optimizer's parameters: in coefficients, and of the random numbers
};

// Options of a parameter group.
struct GroupOptions {
  double lr;
  const float* lr_value;  // [], in place of lr, in the kernels' memory; or null
  AdamWOptions adamw;
  SgdOptions sgd;
  bool maximize;
};

// How the gradients come into an update: g = clamp(gradient * factor, -bound, bound).
struct GradientUse {
  const double* totals;  // [kTotals], in the kernels' memory, with the action and the factor; null:
                         // the gradients as they are
  const double* coefficients;  // [rows] on top of the factor, in the kernels' memory; or null
  double bound;
};

// The same for the elements of one parameter: a product of three, none of which the type that
// elements are computed in has no room for.
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

// How new values are rounded to bfloat16: to nearest, or at random by a hash of key, element and
// stream, so that the same step gives the same bits.
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
