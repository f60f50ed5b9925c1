// The CPU kernels of batch normalisation's forward for one instruction set.
#ifndef GRADFUSE_CPU_BATCH_NORM_FORWARD_KERNELS_H
#define GRADFUSE_CPU_BATCH_NORM_FORWARD_KERNELS_H

#include "../math/batch_norm.h"
#include "../ops/batch_norm.h"
#include "../math/prefetch.h"
#include "batch_norm_spans.h"
#include "isa.h"

namespace gradfuse::cpu {

struct BatchNormForwardKernels {
  // Adds the sums of x - kMean (here not times kShrink) and of its square to sums[0] and sums[1].
  // Reads the span once. A few float32 terms are summed in float32 before they are widened; if
  // `wide` (not for Double), each is computed in float64, so that no finite term is lost.
  void (*sums)(const BatchNormForward& call, const Span& span, const void* coefficients,
               double* sums, int64_t stride, bool wide);
  // Writes the output and the mask. Reads input and residual once.
  void (*apply)(const BatchNormForward& call, const Span& span, const void* coefficients,
                int64_t stride);
};
GRADFUSE_KERNEL_TABLE(BatchNormForwardKernels, batch_norm_forward_kernels)

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

template <class T, bool kWide>
inline void sums_of(const BatchNormForward& call, const Span& span, const void* coefficients,
                    double* sums, int64_t stride) {
  const T* x = static_cast<const T*>(call.input);
  sum_span<T, kMean + 1, kWide, 8>(
      call.shape, span, coefficients, sums, stride, [=](const auto& place, const auto& c, auto& s) {
        place.prefetch(x);
        const auto v = load_block(x + place.at, place.count);
        const auto shift = only_elements<T>(c(kMean), place.count);
        if constexpr (kWide) {
          const auto wide_difference = [](auto from, auto to) { return widen(from) - widen(to); };
          const Pair<DoubleVec> a = wide_difference(v.a, shift.a);
          const Pair<DoubleVec> b = wide_difference(v.b, shift.b);
          s.add_wide(0, a, a, a);
          s.add_wide(1, b, b, b);
        } else {
          const auto d = v - shift;
          s.add(d, d, d);
        }
      });
}

void sums(const BatchNormForward& call, const Span& span, const void* coefficients, double* sums,
          int64_t stride, bool wide) {
  with_type<Half, BFloat16>(call.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>)
      if (wide) return sums_of<T, true>(call, span, coefficients, sums, stride);
    sums_of<T, false>(call, span, coefficients, sums, stride);
  });
}

template <class T, Activation kActivation>
inline void apply_of(const BatchNormForward& call, const Span& span, const void* coefficients,
                     int64_t stride) {
  using S = ScalarFor<T>;
  const MaskBounds bounds = mask_bounds(kActivation, call.shape.dtype);
  const S above = static_cast<S>(bounds.above), below = static_cast<S>(bounds.below);
  const S slope = static_cast<S>(call.negative_slope);
  const T* x = static_cast<const T*>(call.input);
  const T* residual = static_cast<const T*>(call.residual);
  T* y = static_cast<T*>(call.output);
  uint8_t* mask = call.mask;
  const BranchScale scale = call.scale;
  const bool past_caches = span.past_caches;
  sweep<T, kForwardCoefficients>(
      call.shape, span, coefficients, stride, [=](const auto& place, const auto& c, NoState) {
        place.prefetch(x);
        if (residual) place.prefetch(residual);
        const auto z = normalised(c, x, residual, scale, place);
        store_block(y + place.at,
                    each_half(z, [=](auto v) { return activate<kActivation, S>(v, slope); }),
                    place.count, past_caches);
        if constexpr (has_mask(kActivation))
          if (mask)
            place.store_bits(mask, bits_of_block<T>(each_half(z, [=](auto v) {
                               return passes<kActivation>(v, above, below);
                             })));
      });
  if (past_caches) wait_for_streams();
}

void apply(const BatchNormForward& call, const Span& span, const void* coefficients,
           int64_t stride) {
  with_type<Half, BFloat16>(call.shape.dtype, [&](auto type) {
    with_activation(call.activation, [&](auto activation) {
      apply_of<typename decltype(type)::type, decltype(activation)::value>(call, span, coefficients,
                                                                           stride);
    });
  });
}

}  // namespace

const BatchNormForwardKernels batch_norm_forward_kernels = {sums, apply};

#endif
