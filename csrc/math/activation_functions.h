// The activations and their derivatives, for host and device alike and for vectors as for scalars:
// V is what one step computes, S the scalar that its lanes are.
//
// Include inside a namespace that has, for its V, overloads of
//   exponential(V)      e^v
//   hyperbolic_tangent(V)
//   normal_cdf(V)       the standard normal distribution function
//   normal_density(V)   and its derivative
// so that on the CPU every instruction set compiles its own. The enumeration is in activation.h.

// z > 0 and the like are lane masks for vectors and bool for scalars; both choose with ?:.

// S(1) / (1 + e^-z), without overflow to NaN: e^-z may be inf.
template <class S, class V>
GRADFUSE_HD V sigmoid(V z) {
  return S(1) / (S(1) + exponential(-z));
}

// The argument of gelu's tanh form: sqrt(2/pi) * (z + 0.044715 z^3), and its derivative.
template <class S, class V>
GRADFUSE_HD V gelu_argument(V z) {
  return S(0.7978845608028654) * (z + S(0.044715) * (z * z * z));
}
template <class S, class V>
GRADFUSE_HD V gelu_argument_slope(V z) {
  return S(0.7978845608028654) * (S(1) + S(0.134145) * (z * z));
}

// act(z). NaN stays NaN.
template <Activation kActivation, class S, class V>
GRADFUSE_HD V activate(V z, S negative_slope) {
  if constexpr (kActivation == Activation::Relu) {
    return (z <= S(0)) ? V{} : z;
  } else if constexpr (kActivation == Activation::Relu6) {
    const V six = V{} + S(6);
    const V above = (z <= S(0)) ? V{} : z;
    return (above >= S(6)) ? six : above;
  } else if constexpr (kActivation == Activation::LeakyRelu) {
    const V scaled = z * negative_slope;
    return (z > S(0)) ? z : scaled;
  } else if constexpr (kActivation == Activation::Silu) {
    return z / (S(1) + exponential(-z));
  } else if constexpr (kActivation == Activation::Gelu) {
    return z * normal_cdf(z);
  } else if constexpr (kActivation == Activation::GeluTanh) {
    return z * (S(0.5) + S(0.5) * hyperbolic_tangent(gelu_argument<S>(z)));
  } else if constexpr (kActivation == Activation::Hardswish) {
    const V middle = z * (z + S(3)) * S(1.0 / 6.0);
    const V low = (z <= S(-3)) ? V{} : middle;
    return (z >= S(3)) ? z : low;
  } else if constexpr (kActivation == Activation::Sigmoid) {
    return sigmoid<S>(z);
  } else if constexpr (kActivation == Activation::Tanh) {
    return hyperbolic_tangent(z);
  } else {
    return z;
  }
}

// d act(z) / dz for the activations whose backward computes z again.
template <Activation kActivation, class S, class V>
GRADFUSE_HD V derivative_at(V z) {
  const V one = V{} + S(1);
  if constexpr (kActivation == Activation::Silu) {
    const V s = sigmoid<S>(z);
    return s * (one + z * (one - s));
  } else if constexpr (kActivation == Activation::Gelu) {
    return normal_cdf(z) + z * normal_density(z);
  } else if constexpr (kActivation == Activation::GeluTanh) {
    const V t = hyperbolic_tangent(gelu_argument<S>(z));
    return S(0.5) * ((one + t) + z * (one - t * t) * gelu_argument_slope<S>(z));
  } else {
    static_assert(kActivation == Activation::Hardswish, "of an activation that computes z again");
    const V middle = z * S(1.0 / 3.0) + S(0.5);
    const V low = (z <= S(-3)) ? V{} : middle;
    return (z >= S(3)) ? one : low;
  }
}

// d act / dz from y = act(z), for the activations that save their output.
template <Activation kActivation, class S, class V>
GRADFUSE_HD V derivative_from_output(V y, S negative_slope) {
  const V one = V{} + S(1);
  if constexpr (kActivation == Activation::Relu) {
    return (y <= S(0)) ? V{} : one;
  } else if constexpr (kActivation == Activation::Relu6) {
    const V below = (y < S(6)) ? one : V{};
    return (y > S(0)) ? below : V{};
  } else if constexpr (kActivation == Activation::LeakyRelu) {
    const V slope = V{} + negative_slope;
    return (y > S(0)) ? one : slope;
  } else if constexpr (kActivation == Activation::Sigmoid) {
    return y * (one - y);
  } else {
    static_assert(kActivation == Activation::Tanh, "of an activation that saves its output");
    return one - y * y;
  }
}
