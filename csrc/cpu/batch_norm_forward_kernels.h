// The CPU kernels of batch normalisation's forward for one instruction set.
#ifndef GRADFUSE_CPU_BATCH_NORM_FORWARD_KERNELS_H
#define GRADFUSE_CPU_BATCH_NORM_FORWARD_KERNELS_H

#include "../math/batch_norm.h"
#include "../ops/batch_norm.h"
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
#include "simd/vec_math.h"

#include "../math/activation_functions.h"
#include "batch_norm_traversal.h"

template <class T, bool kWide>
inline void sums_of(const BatchNormForward& call, const Span& span, const void* coefficients,
                    double* sums, int64_t stride) {
  const T* x = static_cast<const T*>(call.input);
  sum_span<T, kMean + 1, kWide>(
      call.shape, span, coefficients, sums, stride,
      [=](const auto& piece, const Coefficients<T>& c, TwoSums<T, kWide>& s) {
        const VecFor<T> v = load_lanes(x + piece.at, piece.count);
        const VecFor<T> shift = only_lanes(c.v[kMean], piece.count);
        if constexpr (kWide) {
          const Pair<DoubleVec> wide = widen(v), from = widen(shift);
          const Pair<DoubleVec> d = {wide.a - from.a, wide.b - from.b};
          s.add_wide(d, d, d);
        } else {
          const VecFor<T> d = v - shift;
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
  constexpr int kRows = 2;  // more rows are more concurrent streams than the caches handle well
  const MaskBounds bounds = mask_bounds(kActivation, call.shape.dtype);
  const S above = static_cast<S>(bounds.above), below = static_cast<S>(bounds.below);
  const S slope = static_cast<S>(call.negative_slope);
  const T* x = static_cast<const T*>(call.input);
  const T* residual = static_cast<const T*>(call.residual);
  T* y = static_cast<T*>(call.output);
  uint8_t* mask = call.mask;
  traverse<T, kForwardCoefficients, kRows, NoState>(
      call.shape, span, coefficients, stride,
      [=](const auto& piece, const Coefficients<T>& c, NoState) {
        const VecFor<T> z = normalised(c, x, residual, piece);
        store_lanes(y + piece.at, activate<kActivation, S>(z, slope), piece.count);
        if constexpr (has_mask(kActivation))
          if (mask)
            piece.store_bits(mask, bits_of<VecFor<T>>(passes<kActivation>(z, above, below)));
      },
      [](int64_t, NoState) {});
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
