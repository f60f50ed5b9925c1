// The CPU kernels of batch normalisation's backward for one instruction set.
#ifndef GRADFUSE_CPU_BATCH_NORM_BACKWARD_KERNELS_H
#define GRADFUSE_CPU_BATCH_NORM_BACKWARD_KERNELS_H

#include "../math/batch_norm.h"
#include "../ops/batch_norm.h"
#include "../math/prefetch.h"
#include "batch_norm_spans.h"
#include "isa.h"

namespace gradfuse::cpu {

struct BatchNormBackwardKernels {
  // Adds the sums of g and of g * h (see math/batch_norm.h) to sums[0] and sums[1]. Writes act' to
  // `mask`, in the form of call.mask, unless it is null.
  void (*sums)(const BatchNormBackward& call, const Span& span, const void* coefficients,
               uint8_t* mask, double* sums, int64_t stride, bool wide);
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
#include "simd/vec_blocks.h"
#include "simd/vec_math.h"

#include "../math/activation_functions.h"
#include "batch_norm_traversal.h"
#include "batch_norm_sums.h"

// Gradient before the activation: grad_output * act', with act' from the mask, from the output, or
// from z computed again. Writes act' to `mask`, unless that is null or the call has a mask.
template <class T, Activation kActivation, class Count, class C>
inline Pair<VecFor<T>> gradient_before(const BatchNormBackward& call, const Place<T, Count>& place,
                                       const C& c, uint8_t* mask = nullptr) {
  using S = ScalarFor<T>;
  using V = VecFor<T>;
  const Pair<V> g = load_block(static_cast<const T*>(call.grad_output) + place.at, place.count);
  if constexpr (kActivation == Activation::None) {
    return g;
  } else if constexpr (needs_input(kActivation)) {
    const Pair<V> z = normalised(c, static_cast<const T*>(call.input),
                                 static_cast<const T*>(call.residual), call.scale, place);
    return g * each_half(z, [](V v) { return derivative_at<kActivation, S>(v); });
  } else if constexpr (has_mask(kActivation)) {
    const S slope = static_cast<S>(call.negative_slope);
    const Pair<V> flat = kActivation == Activation::LeakyRelu ? g * slope : Pair<V>{};
    if (call.mask) return select(lanes_of_block<T>(place.load_bits(call.mask)), g, flat);
    const Pair<V> y = load_block(static_cast<const T*>(call.output) + place.at, place.count);
    const auto passing = each_half(y, [](V v) { return passes<kActivation>(v, S(0), S(6)); });
    if (mask) place.store_bits(mask, bits_of_block<T>(passing));
    return select(passing, g, flat);
  } else {
    const Pair<V> y = load_block(static_cast<const T*>(call.output) + place.at, place.count);
    return g * each_half(y, [](V v) { return derivative_from_output<kActivation, S>(v, S(0)); });
  }
}

template <class T, Activation kActivation, bool kWide>
inline void sums_of(const BatchNormBackward& given, const Span& span, const void* coefficients,
                    uint8_t* mask, double* sums, int64_t stride) {
  const BatchNormBackward call = given;  // a copy: stores cannot alias it
  const T* x = static_cast<const T*>(call.input);
  const T* y = static_cast<const T*>(call.output);
  sum_span<T, kInvstd + 1, kWide, 2>(
      call.shape, span, coefficients, sums, stride, [=](const auto& place, const auto& c, auto& s) {
        place.prefetch(static_cast<const T*>(call.grad_output));
        if (x) place.prefetch(x);
        if (y) place.prefetch(y);
        const auto g = only_elements<T>(
            scaled<T>(call.scale, gradient_before<T, kActivation>(call, place, c, mask), place),
            place.count);
        Pair<VecFor<T>> h = {};
        if (x) h = difference<T>(load_block(x + place.at, place.count), c) * c(kInvstd);
        s.add(g, g, only_elements<T>(h, place.count));
      });
}

void sums(const BatchNormBackward& call, const Span& span, const void* coefficients, uint8_t* mask,
          double* sums, int64_t stride, bool wide) {
  with_type<Half, BFloat16>(call.shape.dtype, [&](auto type) {
    with_activation(call.activation, [&](auto activation) {
      using T = typename decltype(type)::type;
      constexpr Activation kActivation = decltype(activation)::value;
      if constexpr (!std::is_same_v<T, double>)
        if (wide)
          return sums_of<T, kActivation, true>(call, span, coefficients, mask, sums, stride);
      sums_of<T, kActivation, false>(call, span, coefficients, mask, sums, stride);
    });
  });
}

template <class T, Activation kActivation>
inline void apply_of(const BatchNormBackward& given, const Span& span, const void* coefficients,
                     int64_t stride) {
  const BatchNormBackward call = given;
  const T* x = call.training ? static_cast<const T*>(call.input) : nullptr;
  T* grad_input = static_cast<T*>(call.grad_input);
  T* grad_residual = static_cast<T*>(call.grad_residual);
  const bool past_caches = span.past_caches;
  const auto body = [=](const auto& place, const auto& c, NoState) {
    const auto g = gradient_before<T, kActivation>(call, place, c);
    // Loads come first: one waits for an earlier store at the same offset of another page.
    Pair<VecFor<T>> v = {};
    if (x) v = load_block(x + place.at, place.count);
    if (grad_residual) store_block(grad_residual + place.at, g, place.count, past_caches);
    if (!grad_input) return;
    auto d = scaled<T>(call.scale, g, place) * c(kDirect);
    if (x) d = d + ((difference<T>(v, c) * c(kInvstd)) * c(kSlope) + c(kOffset));
    store_block(grad_input + place.at, d, place.count, past_caches);
  };
  sweep<T, kBackwardCoefficients>(call.shape, span, coefficients, stride, body);
  if (past_caches) wait_for_streams();
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
