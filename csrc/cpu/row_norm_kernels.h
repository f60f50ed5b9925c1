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
// Rows that go through one sweep after another, so that the sums of one row are ready when the next
// sweep comes to it.
constexpr int64_t kMostRowsAtOnce = 16;
inline int64_t rows_at_once(int64_t width) {
  constexpr int64_t kElements = 2048;  // which the L1 cache holds
  const int64_t rows = kElements / padded_row(width);
  return rows < 1 ? 1 : rows > kMostRowsAtOnce ? kMostRowsAtOnce : rows;
}
// Elements whose random bits are computed at once.
constexpr int64_t kStrip = 512;

// Vectors of padded_row(width) elements of the compute type, in the order of a block's lanes, zeros
// behind the row.
struct RowParameters {
  const void* weight;  // with its offset
  const void* bias;
};
struct RowScratch {
  void* rows;     // [rows_at_once] vectors: the sums
  void* partial;  // [2] vectors: the gradients of bias and weight over some rows
  uint8_t* kept;  // [kKeptBytes]: whether each element of a strip stays
};
constexpr int64_t kKeptBytes = kStrip / 8 + 128;

struct RowNormKernels {
  // Rows [begin, end).
  void (*forward)(const RowNormForward& call, RowParameters parameters, RowScratch scratch,
                  int64_t begin, int64_t end, bool past_caches);
  // The same; writes the rows' gradients of bias and weight to sums, [2][padded_row(width)].
  void (*backward)(const RowNormBackward& call, RowParameters parameters, RowScratch scratch,
                   double* sums, int64_t begin, int64_t end, bool past_caches);
  // Bring n elements, whole blocks, from the order in memory into that of a block's lanes, and
  // back.
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
  const double share = 1.0 / static_cast<double>(width);
  S shift = kCentred ? static_cast<S>(first * share) : S(0);
  RowMoments m = kCentred ? moments_about<T>(v, width, S(1), shift) : RowMoments{0.0, first};
  double scale = 1.0;
  if (leaves_range<S>(m.sum, m.squares, share, eps)) {
    scale = scale_of_row<S>(largest_of<T>(v, width), eps);
    if (kCentred)
      shift = static_cast<S>(moments_about<T>(v, width, static_cast<S>(scale), S(0)).sum * share);
    m = moments_about<T>(v, width, static_cast<S>(scale), shift);
  }
  return row_statistics(static_cast<double>(shift), m.sum, m.squares, share, eps, scale, kCentred);
}

template <class T, class R, class S, bool kCentred>
inline void forward_of(const RowNormForward& given, RowParameters parameters, RowScratch scratch,
                       int64_t begin, int64_t end, bool past_caches) {
  using F = ScalarFor<T>;
  const RowNormForward call = given;  // a copy: stores cannot alias it
  const int64_t width = call.shape.width, padded = padded_row(width);
  const int64_t at_once = rows_at_once(width);
  const F* const weight = static_cast<const F*>(parameters.weight);
  const F* const bias = static_cast<const F*>(parameters.bias);
  const KeptElements keep(call.addends.dropout);
  for (int64_t row = begin; row < end; row += at_once) {
    F* const values = static_cast<F*>(scratch.rows);
    const int64_t rows = least(at_once, end - row);
    double first[kMostRowsAtOnce];
    for (int64_t k = 0; k < rows; ++k) {
      LaneSum<T> of_row;
      S* const sum = call.sum ? static_cast<S*>(call.sum) + (row + k) * width : nullptr;
      gather<T, R, S>(
          call.shape, call.addends, row + k, keep, scratch.kept, sum, past_caches,
          values + k * padded, [&](Pair<VecFor<T>> v) { of_row.add(kCentred ? v : v * v); },
          [&] { of_row.fold(); });
      first[k] = of_row.result();
    }
    if (!call.output) continue;
    RowNormalisation<F> n[kMostRowsAtOnce];
    for (int64_t k = 0; k < rows; ++k)
      n[k] =
          keep_row<F>(call.stats, row + k,
                      statistics_of<T, kCentred>(values + k * padded, width, first[k], call.eps));
    for (int64_t k = 0; k < rows; ++k) {
      const F* const v = values + k * padded;
      T* const output = static_cast<T*>(call.output) + (row + k) * width;
      const int64_t later = row + k + at_once;
      const LaneNormalisation<VecFor<T>> lanes(n[k]);
      const LaterRow<T, R> next = {call.addends, later < end ? later * width : -1};
      for_each_block<T>(0, width, [&](int64_t i, auto count) {
        next.prefetch(i);
        Pair<VecFor<T>> h = normalised<kCentred>(load_pair(v + i), lanes) * load_pair(weight + i);
        if constexpr (kCentred) h = h + load_pair(bias + i);
        store_block(output + i, h, count, past_caches);
      });
    }
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

// Loads blocks of a row's sum: the one that the forward kept, or the one in scratch memory.
template <class T, class S>
struct SumOfRow {
  const S* kept;
  const ScalarFor<T>* again;

  template <class Count>
  Pair<VecFor<T>> operator()(int64_t i, Count count) const {
    return kept ? load_as<T>(kept + i, count) : load_pair(again + i);
  }
};

// The first sweep of a row: adds to the sums for bias and weight, and returns the sums of g and of
// g * h. g is the gradient of the normalised element h.
template <class T, bool kCentred, class Sum>
inline RowMoments gradient_sums(const RowNormBackward& call, int64_t row,
                                const RowNormalisation<ScalarFor<T>>& normalisation,
                                const void* weights, void* partial, const Sum& given_sum) {
  using F = ScalarFor<T>;
  const LaneNormalisation<VecFor<T>> n(normalisation);
  const Sum sum_of_row = given_sum;
  const int64_t width = call.shape.width;
  const T* const grad_output = static_cast<const T*>(call.grad_output) + row * width;
  const F* const weight = static_cast<const F*>(weights);
  F* const of_bias = call.grad_bias.data ? static_cast<F*>(partial) : nullptr;
  F* const of_weight =
      call.grad_weight.data ? static_cast<F*>(partial) + padded_row(width) : nullptr;
  LaneSum<T> sum, dot;
  for_each_block<T>(
      0, width,
      [&](int64_t i, auto count) {
        const auto g_out = load_block(grad_output + i, count);
        const auto h = normalised<kCentred>(sum_of_row(i, count), n);
        const auto product = g_out * h;
        if (of_weight) store_pair(of_weight + i, load_pair(of_weight + i) + product);
        if (of_bias) store_pair(of_bias + i, load_pair(of_bias + i) + g_out);
        const auto w = load_pair(weight + i);
        if constexpr (kCentred) sum.add(g_out * w);
        dot.add(product * w);
      },
      [&] {
        sum.fold();
        dot.fold();
      });
  RowMoments s = {sum.result(), dot.result()};
  if (std::isfinite(s.sum) && std::isfinite(s.squares)) return s;
  // In float64, for those in float32 may have overflowed.
  s = RowMoments{0.0, 0.0};
  for_each_block<T>(0, width, [&](int64_t i, auto count) {
    F g[kBlock<T>], h[kBlock<T>];
    store_pair(g, load_block(grad_output + i, count));
    store_pair(h, normalised<kCentred>(sum_of_row(i, count), n));
    for (int64_t j = 0; j < kBlock<T>; ++j) {
      const double of_h = static_cast<double>(g[j]) * static_cast<double>(weight[i + j]);
      if (kCentred) s.sum += of_h;
      s.squares += of_h * static_cast<double>(h[j]);
    }
  });
  return s;
}

// The second sweep of a row: writes the gradients of residual and input.
template <class T, class R, class S, bool kCentred>
inline void write_gradients(const RowNormBackward& call, int64_t row,
                            const RowNormalisation<ScalarFor<T>>& normalisation,
                            const void* weights, RowGradient<ScalarFor<T>> r,
                            const SumOfRow<T, S>& given_sum, const KeptElements& keep,
                            uint8_t* kept, int64_t later, bool past_caches) {
  using F = ScalarFor<T>;
  using V = VecFor<T>;
  const int64_t width = call.shape.width, at = row * width;
  const T* const grad_output = static_cast<const T*>(call.grad_output) + at;
  const F* const weight = static_cast<const F*>(weights);
  const S* const grad_sum = call.grad_sum ? static_cast<const S*>(call.grad_sum) + at : nullptr;
  R* const grad_residual = call.grad_residual ? static_cast<R*>(call.grad_residual) + at : nullptr;
  T* const grad_input = call.grad_input ? static_cast<T*>(call.grad_input) + at : nullptr;
  const LaneNormalisation<V> n(normalisation);
  const SumOfRow<T, S> sum_of_row = given_sum;
  const V mean = V{} + r.mean_gradient, slope = V{} + r.slope;
  const F factor = factor_of<F>(call.addends, row);
  const bool left_out = factor == F(0);
  const bool drops = call.addends.dropout.seed && !left_out && grad_input;
  const T* const next_output = static_cast<const T*>(call.grad_output) + later * width;
  const S* const next_sum = call.sum ? static_cast<const S*>(call.sum) + later * width : nullptr;
  for_each_strip(width, [&](int64_t begin, int64_t end) {
    if (drops) keep(at + begin, end - begin, kept);
    for_each_block<T>(begin, end, [&](int64_t i, auto count) {
      const auto g = load_block(grad_output + i, count) * load_pair(weight + i);
      const auto h = normalised<kCentred>(sum_of_row(i, count), n);
      Pair<V> d = {((g.a - (h.a * slope + mean)) * n.inverse) * n.scale,
                   ((g.b - (h.b * slope + mean)) * n.inverse) * n.scale};
      if (grad_sum) d = d + load_as<T>(grad_sum + i, count);
      if (later >= 0) {
        prefetch_block<T>(next_output + i);
        if (next_sum) prefetch_block<T>(next_sum + i);
      }
      if (grad_residual) store_as<T>(grad_residual + i, d, count, past_caches);
      if (!grad_input) return;
      d = left_out ? Pair<V>{} : d * factor;
      if (drops) d = only_kept<T>(kept, i - begin, d);
      store_block(grad_input + i, d, count, past_caches);
    });
  });
}

// The same where only the sum has a gradient.
template <class T, class R, class S>
inline void write_sum_gradients(const RowNormBackward& call, int64_t row, const KeptElements& keep,
                                uint8_t* kept, bool past_caches) {
  using F = ScalarFor<T>;
  using V = VecFor<T>;
  const int64_t width = call.shape.width, at = row * width;
  const S* const grad_sum = static_cast<const S*>(call.grad_sum) + at;
  R* const grad_residual = call.grad_residual ? static_cast<R*>(call.grad_residual) + at : nullptr;
  T* const grad_input = call.grad_input ? static_cast<T*>(call.grad_input) + at : nullptr;
  const F factor = factor_of<F>(call.addends, row);
  const bool left_out = factor == F(0);
  const bool drops = call.addends.dropout.seed && !left_out && grad_input;
  for_each_strip(width, [&](int64_t begin, int64_t end) {
    if (drops) keep(at + begin, end - begin, kept);
    for_each_block<T>(begin, end, [&](int64_t i, auto count) {
      Pair<V> d = load_as<T>(grad_sum + i, count);
      if (grad_residual) store_as<T>(grad_residual + i, d, count, past_caches);
      if (!grad_input) return;
      d = left_out ? Pair<V>{} : d * factor;
      if (drops) d = only_kept<T>(kept, i - begin, d);
      store_block(grad_input + i, d, count, past_caches);
    });
  });
}

// Rows whose gradients of bias and weight are added in the compute type.
constexpr int64_t kPartialRows = 64;

template <class T, class R, class S, bool kCentred>
inline void backward_of(const RowNormBackward& given, RowParameters parameters, RowScratch scratch,
                        double* sums, int64_t begin, int64_t end, bool past_caches) {
  using F = ScalarFor<T>;
  const RowNormBackward call = given;
  const int64_t width = call.shape.width, padded = padded_row(width);
  const int64_t at_once = rows_at_once(width);
  F* const partial = static_cast<F*>(scratch.partial);
  const KeptElements keep(call.addends.dropout);
  const double share = 1.0 / static_cast<double>(width);
  const bool writes = call.grad_input || call.grad_residual;
  std::memset(partial, 0, static_cast<size_t>(2 * padded) * sizeof(F));
  for (int64_t i = 0; i < 2 * padded; ++i) sums[i] = 0.0;
  int64_t pending = 0;
  for (int64_t row = begin; row < end; row += at_once) {
    const int64_t rows = least(at_once, end - row);
    SumOfRow<T, S> sum_of_row[kMostRowsAtOnce];
    RowNormalisation<F> n[kMostRowsAtOnce];
    RowGradient<F> r[kMostRowsAtOnce];
    for (int64_t k = 0; call.grad_output && k < rows; ++k) {
      F* const values = static_cast<F*>(scratch.rows) + k * padded;
      sum_of_row[k] = {call.sum ? static_cast<const S*>(call.sum) + (row + k) * width : nullptr,
                       values};
      if (!call.sum)
        gather<T, R, S>(
            call.shape, call.addends, row + k, keep, scratch.kept, static_cast<S*>(nullptr), false,
            values, [](Pair<VecFor<T>>) {}, [] {});
      n[k] = row_normalisation<F>(call.stats, row + k);
      const RowMoments s = gradient_sums<T, kCentred>(call, row + k, n[k], parameters.weight,
                                                      partial, sum_of_row[k]);
      r[k] = row_gradient<F>(s.sum, s.squares, share, kCentred);
    }
    for (int64_t k = 0; writes && k < rows; ++k) {
      const int64_t later = row + k + at_once;
      if (!call.grad_output) {
        write_sum_gradients<T, R, S>(call, row + k, keep, scratch.kept, past_caches);
        continue;
      }
      write_gradients<T, R, S, kCentred>(call, row + k, n[k], parameters.weight, r[k],
                                         sum_of_row[k], keep, scratch.kept,
                                         later < end ? later : -1, past_caches);
    }
    pending += rows;
    if (pending < kPartialRows && row + rows < end) continue;
    for (int64_t i = 0; i < 2 * padded; ++i) {
      sums[i] += static_cast<double>(partial[i]);
      partial[i] = F(0);
    }
    pending = 0;
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
