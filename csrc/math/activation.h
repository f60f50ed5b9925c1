// Which activations there are, and what their backward needs to know.
#pragma once

#include <cmath>
#include <type_traits>

#include "common.h"

namespace gradfuse {

// gradfuse/_codes.py has the same numbers.
enum class Activation : int32_t {
  None,
  Relu,
  Relu6,
  LeakyRelu,
  Silu,
  Gelu,
  GeluTanh,
  Hardswish,
  Sigmoid,
  Tanh
};
constexpr int kActivations = 10;

// Calls f with the activation as a constant.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
GRADFUSE_HD_FORCED void with_activation(Activation a, F f) {
  using A = Activation;
  switch (a) {
    case A::None: f(std::integral_constant<A, A::None>()); break;
    case A::Relu: f(std::integral_constant<A, A::Relu>()); break;
    case A::Relu6: f(std::integral_constant<A, A::Relu6>()); break;
    case A::LeakyRelu: f(std::integral_constant<A, A::LeakyRelu>()); break;
    case A::Silu: f(std::integral_constant<A, A::Silu>()); break;
    case A::Gelu: f(std::integral_constant<A, A::Gelu>()); break;
    case A::GeluTanh: f(std::integral_constant<A, A::GeluTanh>()); break;
    case A::Hardswish: f(std::integral_constant<A, A::Hardswish>()); break;
    case A::Sigmoid: f(std::integral_constant<A, A::Sigmoid>()); break;
    case A::Tanh: f(std::integral_constant<A, A::Tanh>()); break;
  }
}

// Where the derivative takes only two values, one bit says which: 1 where it is set; where not, 0
// or leaky_relu's negative slope.
GRADFUSE_HD constexpr bool has_mask(Activation a) {
  return a == Activation::Relu || a == Activation::Relu6 || a == Activation::LeakyRelu;
}
// The derivative follows from the output; for those with a mask, it may.
GRADFUSE_HD constexpr bool needs_output(Activation a) {
  return a == Activation::Sigmoid || a == Activation::Tanh;
}
// The backward normalises the input, and adds the residual, again.
GRADFUSE_HD constexpr bool needs_input(Activation a) {
  return a == Activation::Silu || a == Activation::Gelu || a == Activation::GeluTanh ||
         a == Activation::Hardswish;
}

// A mask bit is set where the output, rounded to the dtype, is on neither of the activation's flat
// ends: relu !(z <= above); relu6 z > above and z < below; leaky_relu z > above. So a NaN passes
// relu's gradient alone, as in torch.
//
// In the 16-bit types a small z rounds to 0 and one just under 6 to 6; half-way goes to even, which
// 0 and 6 are.
struct MaskBounds {
  double above;
  double below;
};

GRADFUSE_HD MaskBounds mask_bounds(Activation a, DType dtype) {
  MaskBounds b = {0.0, 6.0};
  if (dtype == DType::BFloat16) b = {0x1p-134, 6.0 - 0x1p-6};
  if (dtype == DType::Half) b = {0x1p-25, 6.0 - 0x1p-9};
  if (a != Activation::Relu6) b.below = INFINITY;
  return b;
}

}  // namespace gradfuse
