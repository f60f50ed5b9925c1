// The CPU kernels of batch normalisation's backward for one instruction set.
#ifndef GRADFUSE_CPU_BATCH_NORM_BACKWARD_KERNELS_H
#define GRADFUSE_CPU_BATCH_NORM_BACKWARD_KERNELS_H

#include "../math/batch_norm.h"
#include "../ops/batch_norm.h"
#include "batch_norm_spans.h"
#include "isa.h"

namespace gradfuse::cpu {

struct BatchNormBackwardKernels {
  // Adds the sums of g and of g * h (see math/batch_norm.h) to sums[0] and sums[1].
  void (*sums)(const BatchNormBackward& call, const Span& span, const void* coefficients,
               double* sums, int64_t stride, bool wide);
  // Writes the wanted gradients of input and residual.
  void (*apply)(const BatchNormBackward& call, const Span& span, const void* coefficients,
                int64_t stride);
};
GRADFUSE_KERNEL_TABLE(BatchNormBackwardKernels, batch_norm_backward_kernels)

}  // namespace gradfuse::cpu

#endif

#ifdef GRADFUSE_IN_UNIT
namespace {

#include "simd/vec.h"
#include "simd/vec_io.h"
#include "simd/vec_math.h"

#include "../math/activation_functions.h"
#include "batch_norm_traversal.h"

// Gradient before the activation: grad_output * act', with act' from the mask, from the output, or
// from z computed again.
template <class T, Activation kActivation, class Count>
inline VecFor<T> gradient_before(const BatchNormBackward& call, const Piece<T, Count>& piece,
                                 const Coefficients<T>& c) {
  using S = ScalarFor<T>;
  using V = VecFor<T>;
  const V g = load_lanes(static_cast<const T*>(call.grad_output) + piece.at, piece.count);
  if constexpr (kActivation == Activation::None) {
    return g;
  } else if constexpr (needs_input(kActivation)) {
    return g *
           derivative_at<kActivation, S>(normalised(c, static_cast<const T*>(call.input),
                                                    static_cast<const T*>(call.residual), piece));
  } else if constexpr (has_mask(kActivation)) {
    const S slope = static_cast<S>(call.negative_slope);
    const V flat = kActivation == Activation::LeakyRelu ? g * slope : V{};
    if (call.mask) return lanes_of<V>(piece.load_bits(call.mask)) ? g : flat;
    const V y = load_lanes(static_cast<const T*>(call.output) + piece.at, piece.count);
    return passes<kActivation>(y, S(0), S(6)) ? g : flat;
  } else {
    const V y = load_lanes(static_cast<const T*>(call.output) + piece.at, piece.count);
    return g * derivative_from_output<kActivation, S>(y, S(0));
  }
}

template <class T, Activation kActivation, bool kWide>
inline void sums_of(const BatchNormBackward& given, const Span& span, const void* coefficients,
                    double* sums, int64_t stride) {
  const BatchNormBackward call = given;  // a copy: stores cannot alias it
  const T* x = static_cast<const T*>(call.input);
  sum_span<T, kInvstd + 1, kWide>(
      call.shape, span, coefficients, sums, stride,
      [=](const auto& piece, const Coefficients<T>& c, TwoSums<T, kWide>& s) {
        const VecFor<T> g =
            only_lanes(gradient_before<T, kActivation>(call, piece, c), piece.count);
        VecFor<T> h = VecFor<T>{};
        if (x) h = difference<T>(load_lanes(x + piece.at, piece.count), c) * c.v[kInvstd];
        s.add(g, g, only_lanes(h, piece.count));
      });
}

void sums(const BatchNormBackward& call, const Span& span, const void* coefficients, double* sums,
          int64_t stride, bool wide) {
  with_type<Half, BFloat16>(call.shape.dtype, [&](auto type) {
    with_activation(call.activation, [&](auto activation) {
      using T = typename decltype(type)::type;
      constexpr Activation kActivation = decltype(activation)::value;
      if constexpr (!std::is_same_v<T, double>)
        if (wide) return sums_of<T, kActivation, true>(call, span, coefficients, sums, stride);
      sums_of<T, kActivation, false>(call, span, coefficients, sums, stride);
    });
  });
}

template <class T, Activation kActivation>
inline void apply_of(const BatchNormBackward& given, const Span& span, const void* coefficients,
                     int64_t stride) {
  constexpr int kRows = 2;  // more rows are more concurrent streams than the caches handle well
  const BatchNormBackward call = given;
  const T* x = call.training ? static_cast<const T*>(call.input) : nullptr;
  T* grad_input = static_cast<T*>(call.grad_input);
  T* grad_residual = static_cast<T*>(call.grad_residual);
  traverse<T, kBackwardCoefficients, kRows, NoState>(
      call.shape, span, coefficients, stride,
      [=](const auto& piece, const Coefficients<T>& c, NoState) {
        const VecFor<T> g = gradient_before<T, kActivation>(call, piece, c);
        if (grad_residual) store_lanes(grad_residual + piece.at, g, piece.count);
        if (!grad_input) return;
        VecFor<T> d = g * c.v[kDirect];
        if (x) {
          const VecFor<T> e = difference<T>(load_lanes(x + piece.at, piece.count), c);
          d += (e * c.v[kInvstd]) * c.v[kSlope] + c.v[kOffset];
        }
        store_lanes(grad_input + piece.at, d, piece.count);
      },
      [](int64_t, NoState) {});
}

void apply(const BatchNormBackward& call, const Span& span, const void* coefficients,
           int64_t stride) {
  with_type<Half, BFloat16>(call.shape.dtype, [&](auto type) {
    with_activation(call.activation, [&](auto activation) {
      apply_of<typename decltype(type)::type, decltype(activation)::value>(call, span, coefficients,
                                                                           stride);
    });
  });
}

}  // namespace

const BatchNormBackwardKernels batch_norm_backward_kernels = {sums, apply};

#endif
