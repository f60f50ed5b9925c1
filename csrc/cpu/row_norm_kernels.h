// Kernels of layer norm and RMS norm over whole rows, for one instruction set.
#ifndef GRADFUSE_CPU_ROW_NORM_KERNELS_H
#define GRADFUSE_CPU_ROW_NORM_KERNELS_H

#include "../math/prefetch.h"
#include "../math/row_norm.h"
#include "../ops/row_norm.h"
#include "isa.h"

namespace gradfuse::cpu {

// Kernels work on whole blocks, so a vector in scratch memory has this multiple of elements.
constexpr int64_t kRowPadding = 32;
inline int64_t padded_row(int64_t width) {
  return (width + kRowPadding - 1) / kRowPadding * kRowPadding;
}
// Bytes for a bit of each element of a row.
inline int64_t kept_bytes(int64_t width) { return padded_row(width) / 8 + 64; }

// Vectors of padded_row(width) elements of the compute type, in the order of a block's lanes, zeros
// behind the row.
struct RowParameters {
  const void* weight;  // with its offset
  const void* bias;
};
struct RowScratch {
  void* row;       // the sum; in the backward the normalised row
  void* gradient;  // that of the normalised row
  void* partial;   // [2] vectors: the gradients of bias and weight over some rows
  uint8_t* kept;   // [kept_bytes]: whether each element stays
};

struct RowNormKernels {
  // Rows [begin, end).
  void (*forward)(const RowNormForward& call, RowParameters parameters, RowScratch scratch,
                  int64_t begin, int64_t end, bool past_caches);
  // The same; writes the rows' gradients of bias and weight to sums, [2][padded_row(width)].
  void (*backward)(const RowNormBackward& call, RowParameters parameters, RowScratch scratch,
                   double* sums, int64_t begin, int64_t end, bool past_caches);
  // Bring n elements, whole blocks, from the order in memory into that of a block's lanes, and back.
  void (*into_lane_order)(DType dtype, void* v, int64_t n);
  void (*into_element_order)(DType dtype, double* v, int64_t n);
};
GRADFUSE_KERNEL_TABLE(RowNormKernels, row_norm_kernels)

}  // namespace gradfuse::cpu

#endif

#ifdef GRADFUSE_IN_UNIT
namespace {

#include "simd/vec.h"
#include "simd/vec_io.h"
#include "simd/vec_blocks.h"
#include "simd/vec_random.h"
#include "row_norm_rows.h"

// Statistics of a row in scratch memory. `first` is the sum of its elements, of their squares for
// RMS norm.
template <class T, bool kCentred>
inline RowStatistics statistics_of(const ScalarFor<T>* v, int64_t width, double first, double eps) {
  using S = ScalarFor<T>;
  const double count = static_cast<double>(width);
  S shift = kCentred ? static_cast<S>(first / count) : S(0);
  RowMoments m = kCentred ? moments_about<T>(v, width, S(1), shift) : RowMoments{0.0, first};
  double scale = 1.0;
  if (leaves_range<S>(m.sum, m.squares, count, eps)) {
    scale = scale_of_row<S>(largest_of<T>(v, width), eps);
    if (kCentred)
      shift = static_cast<S>(moments_about<T>(v, width, static_cast<S>(scale), S(0)).sum / count);
    m = moments_about<T>(v, width, static_cast<S>(scale), shift);
  }
  return row_statistics(static_cast<double>(shift), m.sum, m.squares, count, eps, scale, kCentred);
}

template <class T, class R, class S, bool kCentred>
inline void forward_of(const RowNormForward& given, RowParameters parameters, RowScratch scratch,
                       int64_t begin, int64_t end, bool past_caches) {
  using F = ScalarFor<T>;
  const RowNormForward call = given;  // a copy: stores cannot alias it
  const int64_t width = call.shape.width;
  F* const values = static_cast<F*>(scratch.row);
  const F* const weight = static_cast<const F*>(parameters.weight);
  const F* const bias = static_cast<const F*>(parameters.bias);
  for (int64_t row = begin; row < end; ++row) {
    LaneSum<T> first;
    S* const sum = call.sum ? static_cast<S*>(call.sum) + row * width : nullptr;
    gather<T, R, S>(
        call.shape, call.addends, row, scratch.kept, sum, past_caches, values,
        [&](Pair<VecFor<T>> v) { first.add(kCentred ? v : v * v); }, [&] { first.fold(); });
    const RowStatistics s = statistics_of<T, kCentred>(values, width, first.result(), call.eps);
    const RowNormalisation<F> n = keep_row<F>(call.stats, row, s);
    T* const output = static_cast<T*>(call.output) + row * width;
    const NextRow<T, R> next = {call.addends, row + 1 < end ? (row + 1) * width : -1};
    for_each_block<T>(width, [&](int64_t i, auto count) {
      next.prefetch(i);
      Pair<VecFor<T>> h = normalised<kCentred>(load_pair(values + i), n) * load_pair(weight + i);
      if constexpr (kCentred) h = h + load_pair(bias + i);
      store_block(output + i, h, count, past_caches);
    });
  }
  if (past_caches) wait_for_streams();
}

void forward(const RowNormForward& call, RowParameters parameters, RowScratch scratch,
             int64_t begin, int64_t end, bool past_caches) {
  with_row_types(call.shape, [&](auto type, auto residual_type, auto sum_type) {
    using T = typename decltype(type)::type;
    using R = typename decltype(residual_type)::type;
    using S = typename decltype(sum_type)::type;
    if (call.centred)
      forward_of<T, R, S, true>(call, parameters, scratch, begin, end, past_caches);
    else
      forward_of<T, R, S, false>(call, parameters, scratch, begin, end, past_caches);
  });
}

// The first sweep of a row: keeps the normalised elements h and their gradients g, adds to the sums
// for bias and weight, and returns the sums of g and of g * h. `value(i, count)` loads the row.
template <class T, bool kCentred, class Value>
inline RowMoments gradient_sums(const RowNormBackward& call, int64_t row,
                                const RowNormalisation<ScalarFor<T>>& n, RowParameters parameters,
                                RowScratch scratch, Value value) {
  using F = ScalarFor<T>;
  const int64_t width = call.shape.width, padded = padded_row(width);
  const T* const grad_output = static_cast<const T*>(call.grad_output) + row * width;
  const F* const weight = static_cast<const F*>(parameters.weight);
  F* const values = static_cast<F*>(scratch.row);
  F* const gradients = static_cast<F*>(scratch.gradient);
  F* const of_bias = call.grad_bias.data ? static_cast<F*>(scratch.partial) : nullptr;
  F* const of_weight = call.grad_weight.data ? static_cast<F*>(scratch.partial) + padded : nullptr;
  LaneSum<T> sum, dot;
  for_each_block<T>(
      width,
      [&](int64_t i, auto count) {
        const auto g_out = load_block(grad_output + i, count);
        const auto h = normalised<kCentred>(value(i, count), n);
        const auto g = g_out * load_pair(weight + i);
        const auto product = g_out * h;
        if (of_weight) store_pair(of_weight + i, load_pair(of_weight + i) + product);
        if (of_bias) store_pair(of_bias + i, load_pair(of_bias + i) + g_out);
        store_pair(values + i, h);
        store_pair(gradients + i, g);
        if constexpr (kCentred) sum.add(g);
        dot.add(g * h);
      },
      [&] {
        sum.fold();
        dot.fold();
      });
  const RowMoments s = {sum.result(), dot.result()};
  if (std::isfinite(s.sum) && std::isfinite(s.squares)) return s;
  return wide_gradient_sums<T, kCentred>(values, gradients, width);
}

template <class T, class R, class S, bool kCentred>
inline void backward_of_row(const RowNormBackward& call, int64_t row, RowParameters parameters,
                            RowScratch scratch, bool past_caches) {
  using F = ScalarFor<T>;
  using V = VecFor<T>;
  const int64_t width = call.shape.width, at = row * width;
  const RowNormalisation<F> n = row_normalisation<F>(call.stats, row);
  F* const values = static_cast<F*>(scratch.row);
  const F* const gradients = static_cast<const F*>(scratch.gradient);
  RowMoments sums;
  if (call.sum) {
    const S* const sum = static_cast<const S*>(call.sum) + at;
    sums = gradient_sums<T, kCentred>(
        call, row, n, parameters, scratch,
        [&](int64_t i, auto count) { return load_as<T>(sum + i, count); });
  } else {
    gather<T, R, S>(
        call.shape, call.addends, row, scratch.kept, static_cast<S*>(nullptr), false, values,
        [](Pair<V>) {}, [] {});
    sums = gradient_sums<T, kCentred>(call, row, n, parameters, scratch,
                                      [&](int64_t i, auto) { return load_pair(values + i); });
  }
  const RowGradient<F> r =
      row_gradient<F>(sums.sum, sums.squares, static_cast<double>(width), kCentred);
  const S* const grad_sum = call.grad_sum ? static_cast<const S*>(call.grad_sum) + at : nullptr;
  R* const grad_residual = call.grad_residual ? static_cast<R*>(call.grad_residual) + at : nullptr;
  T* const grad_input = call.grad_input ? static_cast<T*>(call.grad_input) + at : nullptr;
  if (!grad_residual && !grad_input) return;
  const Pair<V> mean = {V{} + r.mean_gradient, V{} + r.mean_gradient};
  const F factor = factor_of<F>(call.addends, row);
  const bool drops = call.addends.dropout.seed && factor != F(0);
  if (drops && grad_input && call.sum)
    kept_elements(call.addends.dropout, at, width, scratch.kept);
  for_each_block<T>(width, [&](int64_t i, auto count) {
    const auto h = load_pair(values + i), g = load_pair(gradients + i);
    Pair<V> d = ((g - (h * r.slope + mean)) * n.inverse) * n.scale;
    if (grad_sum) d = d + load_as<T>(grad_sum + i, count);
    if (grad_residual) store_as<T>(grad_residual + i, d, count, past_caches);
    if (!grad_input) return;
    d = factor == F(0) ? Pair<V>{} : d * factor;
    if (drops) d = select(lanes_of_block<T>(kept_of_block<T>(scratch.kept, i)), d, Pair<V>{});
    store_block(grad_input + i, d, count, past_caches);
  });
}

// Rows whose gradients of bias and weight are added in the compute type.
constexpr int64_t kPartialRows = 64;

template <class T, class R, class S, bool kCentred>
inline void backward_of(const RowNormBackward& given, RowParameters parameters, RowScratch scratch,
                        double* sums, int64_t begin, int64_t end, bool past_caches) {
  using F = ScalarFor<T>;
  const RowNormBackward call = given;
  const int64_t values = 2 * padded_row(call.shape.width);
  F* const partial = static_cast<F*>(scratch.partial);
  for (int64_t first = begin; first < end; first += kPartialRows) {
    std::memset(partial, 0, static_cast<size_t>(values) * sizeof(F));
    for (int64_t row = first; row < least(first + kPartialRows, end); ++row)
      backward_of_row<T, R, S, kCentred>(call, row, parameters, scratch, past_caches);
    for (int64_t i = 0; i < values; ++i)
      sums[i] = (first == begin ? 0.0 : sums[i]) + static_cast<double>(partial[i]);
  }
  if (past_caches) wait_for_streams();
}

void backward(const RowNormBackward& call, RowParameters parameters, RowScratch scratch,
              double* sums, int64_t begin, int64_t end, bool past_caches) {
  with_row_types(call.shape, [&](auto type, auto residual_type, auto sum_type) {
    using T = typename decltype(type)::type;
    using R = typename decltype(residual_type)::type;
    using S = typename decltype(sum_type)::type;
    if (call.centred)
      backward_of<T, R, S, true>(call, parameters, scratch, sums, begin, end, past_caches);
    else
      backward_of<T, R, S, false>(call, parameters, scratch, sums, begin, end, past_caches);
  });
}

void into_lane_order(DType dtype, void* v, int64_t n) {
  with_type<Half, BFloat16>(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    ScalarFor<T>* const p = static_cast<ScalarFor<T>*>(v);
    if constexpr (kAlternates<T>)
      for (int64_t i = 0; i < n; i += kBlock<T>) store_pair(p + i, load_floats_of_block<T>(p + i));
  });
}

void into_element_order(DType dtype, double* v, int64_t n) {
  with_type<Half, BFloat16>(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t i = 0; i < n; i += kBlock<T>) in_element_order<T>(v + i);
  });
}

}  // namespace

const RowNormKernels row_norm_kernels = {forward, backward, into_lane_order, into_element_order};

#endif
