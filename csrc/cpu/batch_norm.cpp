// Traversal of batch normalisation on the CPU: splits the tensor into spans, which the threads sum
// and sweep. Spans depend on sizes alone and their sums are added in a fixed order, so the bits of
// the result do not depend on the threads.
//
// Positions contiguous (inner > 1): a span holds a few channels of all samples. Both sweeps of a
// span run back to back, so that the second reads from the L2 cache. If there are too few channels
// for all threads, samples and positions are split too, and the sweeps run as below.
//
// Channels contiguous (inner == 1): a span holds some rows of some columns. All spans are summed,
// then all are swept in reverse order, because the last ones are still in the cache.

#include "../ops/batch_norm_channel.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../math/batch_norm.h"
#include "../math/runs.h"
#include "batch_norm_backward_kernels.h"
#include "batch_norm_forward_kernels.h"
#include "caches.h"
#include "parallel.h"

namespace gradfuse::cpu {
namespace {

constexpr int64_t kSpanElements = 65536;
constexpr int64_t kRunElements = 1024;  // minimum contiguous elements of a span
constexpr int64_t kLeastColumns = 256;
constexpr int64_t kLeastRows = 128;  // minimum rows of a span: keeps its sums small beside its data
constexpr int64_t kMostRowSpans = 512;
constexpr int64_t kEnoughChannelSpans = 48;
constexpr int64_t kLeastParallelElements = 1 << 15;  // about 10 us of work

// Splits a tensor into spans: `columns` groups of channels, each of `parts` spans.
class Spans {
 public:
  Spans(const BatchNormShape& s, bool past_caches) : shape_(s), past_caches_(past_caches) {
    samples_ = s.outer, positions_ = s.inner;
    if (s.inner == 1) {
      // Few rows: columns are shared out in their place.
      const int64_t half = divided_up(divided_up(s.channels, 2), kChannelPadding) * kChannelPadding;
      const int64_t most = s.outer <= kLeastRows ? std::max(half, kLeastColumns) : s.channels;
      channels_ = std::min({s.channels, most, kMostColumns});
      samples_ = std::min(s.outer, std::max(kLeastRows, divided_up(s.outer, kMostRowSpans)));
    } else {
      channels_ = std::min(s.channels, std::min(kMostChannels, divided_up(kRunElements, s.inner)));
      if (s.numel() >= kLeastParallelElements &&
          divided_up(s.channels, channels_) < kEnoughChannelSpans) {
        positions_ = std::min(s.inner, kSpanElements);
        samples_ = std::clamp<int64_t>(kSpanElements / (positions_ * channels_), 1, s.outer);
      }
    }
    columns_ = divided_up(s.channels, channels_);
    sample_parts_ = divided_up(s.outer, samples_);
    position_parts_ = divided_up(s.inner, positions_);
  }
  int64_t columns() const { return columns_; }
  int64_t parts() const { return sample_parts_ * position_parts_; }
  int64_t widest() const { return channels_; }

  Span operator()(int64_t column, int64_t part) const {
    const int64_t n = part / position_parts_ * samples_, p = part % position_parts_ * positions_;
    const int64_t c = column * channels_;
    return {n,           std::min(n + samples_, shape_.outer),
            c,           std::min(c + channels_, shape_.channels),
            p,           std::min(p + positions_, shape_.inner),
            past_caches_};
  }

 private:
  BatchNormShape shape_;
  bool past_caches_;
  int64_t channels_, samples_, positions_;
  int64_t columns_, sample_parts_, position_parts_;
};

int64_t padded(int64_t channels) { return divided_up(channels, kChannelPadding) * kChannelPadding; }

double read(const void* data, DType dtype, int64_t i) {
  return with_type<c10::Half, c10::BFloat16>(dtype, [&](auto type) {
    return static_cast<double>(static_cast<const typename decltype(type)::type*>(data)[i]);
  });
}
struct Vectors {
  static double read(ChannelRef v, int64_t i, double otherwise) {
    return v.data ? cpu::read(v.data, v.dtype, i) : otherwise;
  }
  static void write(ChannelRef v, int64_t i, double value) {
    if (!v.data) return;
    with_type<c10::Half, c10::BFloat16>(v.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      static_cast<T*>(v.data)[i] = static_cast<T>(value);
    });
  }
};

// Whether to store results past the caches, of a call of so many elements over all ghost batches.
// Each row must begin with a cache line, so that vectors are aligned.
bool store_past_caches(const BatchNormShape& shape, int64_t elements,
                       std::initializer_list<const void*> read,
                       std::initializer_list<const void*> results) {
  const int64_t size = with_type<c10::Half, c10::BFloat16>(shape.dtype, [](auto type) {
    return static_cast<int64_t>(sizeof(typename decltype(type)::type));
  });
  int64_t tensors = 0;
  for (const void* p : read) tensors += p != nullptr;
  for (const void* p : results) {
    tensors += p != nullptr;
    if (!on_cache_lines(p)) return false;
  }
  const int64_t row = shape.inner == 1 ? shape.channels : shape.inner;
  return row * size % kCacheLine == 0 && stores_past_caches(tensors * elements * size);
}

// Coefficient vectors of channels [channel, end), `stride` elements apart.
template <class F>
struct Columns {
  int64_t channel, end;
  F* coefficients;
  int64_t stride;

  F& operator()(int coefficient, int64_t c) const {
    return coefficients[coefficient * stride + c - channel];
  }
};

// Forward and backward share one traversal, `run`, over a Direction with these members:
//   prepare_sweep_by_sweep()  called if all spans are summed before any is swept again
//   has_sums()  whether the statistics need a first sweep
//   applies()   whether there is a second sweep
//   past_caches(elements)  whether the second sweep stores past the caches
//   prepare(columns)                     the coefficients that the first sweep needs
//   sum(span, columns, sums, wide)       the first sweep of a span: sums [2][stride]
//   finish(columns, sums)                the channels' results, and the second sweep's coefficients
//   apply(span, columns)                 the second sweep of a span
template <class F>
struct Forward {
  using Element = F;
  static constexpr int kCoefficients = kForwardCoefficients;
  static constexpr bool kSquares = true;  // the second sum holds the squares of the first's terms

  const BatchNormForward& call;
  const BatchNormForwardKernels& kernels = batch_norm_forward_kernels();

  void prepare_sweep_by_sweep() {}
  bool has_sums() const { return call.training && !call.over_ranks.data; }
  bool applies() const { return !call.tally; }
  bool past_caches(int64_t elements) const {
    return store_past_caches(call.shape, elements, {call.input, call.residual}, {call.output});
  }

  // The sums are shifted by an element of each channel.
  void prepare(const Columns<F>& columns) const {
    const BatchNormShape& shape = call.shape;
    const auto element = [&](int64_t c, int64_t outer, int64_t inner) {
      return read(call.input, shape.dtype, (outer * shape.channels + c) * shape.inner + inner);
    };
    for (int64_t c = columns.channel; c < columns.end; ++c) {
      double shift = element(c, 0, 0);
      if (std::is_same_v<F, double>)
        shift = median(shift, element(c, shape.outer / 2, shape.inner / 2),
                       element(c, shape.outer - 1, shape.inner - 1));
      columns(kMean, c) = static_cast<F>(shift);
    }
  }
  void sum(const Span& span, const Columns<F>& columns, double* sums, bool wide) const {
    kernels.sums(call, span, columns.coefficients, sums, columns.stride, wide);
  }
  void finish(const Columns<F>& columns, const double* sums) const {
    for (int64_t c = columns.channel; c < columns.end; ++c) {
      const double* s = sums + c - columns.channel;
      const Statistics batch =
          call.over_ranks.data ? statistics_over_ranks(call, c)
                               : own_statistics(call, {s[0], s[columns.stride]}, columns(kMean, c));
      if (call.tally) {
        write_tally(call, c, batch);
        continue;
      }
      const auto n = finish_forward<F, Vectors>(call, c, batch);
      columns(kMean, c) = n.mean;
      columns(kScale, c) = n.scale;
      columns(kShift, c) = n.shift;
    }
  }
  void apply(const Span& span, const Columns<F>& columns) const {
    kernels.apply(call, span, columns.coefficients, columns.stride);
  }
};

template <class F>
struct Backward {
  using Element = F;
  static constexpr int kCoefficients = kBackwardCoefficients;
  static constexpr bool kSquares = false;

  const BatchNormBackward& call;
  const BatchNormBackwardKernels& kernels = batch_norm_backward_kernels();
  std::unique_ptr<uint8_t[]> mask;  // of the first sweep for the second
  BatchNormBackward second = call;

  // Where the output tells act' and the second sweep finds it in the cache no more, the first keeps
  // act' as a mask: a bit in place of an element.
  void prepare_sweep_by_sweep() {
    if (!has_mask(call.activation) || call.mask || !has_sums() || !applies()) return;
    mask.reset(new uint8_t[call.shape.mask_rows() * call.shape.mask_bytes_per_row()]);
    second.mask = mask.get();
    second.output = nullptr;
  }

  bool has_sums() const { return needs_sums(call); }
  bool applies() const { return call.grad_input || call.grad_residual; }
  bool past_caches(int64_t elements) const {
    return store_past_caches(call.shape, elements, {call.grad_output, call.input, call.output},
                             {call.grad_input, call.grad_residual});
  }

  void prepare(const Columns<F>& columns) const {
    for (int64_t c = columns.channel; c < columns.end; ++c) {
      const auto n = normalisation_of<F, Vectors>(call, c);
      columns(kMean, c) = n.mean;
      columns(kScale, c) = n.scale;
      columns(kShift, c) = n.shift;
      columns(kInvstd, c) = scale_of_shrunk<F>(kept_of<F>(call, c).invstd);
    }
  }
  void sum(const Span& span, const Columns<F>& columns, double* sums, bool wide) const {
    kernels.sums(call, span, columns.coefficients, mask.get(), sums, columns.stride, wide);
  }
  void finish(const Columns<F>& columns, const double* sums) const {
    for (int64_t c = columns.channel; c < columns.end; ++c) {
      const double* s = sums + c - columns.channel;
      const auto g = finish_backward<F, Vectors>(call, c, {s[0], s[columns.stride]});
      columns(kDirect, c) = g.direct;
      columns(kSlope, c) = g.slope;
      columns(kOffset, c) = g.shift;
    }
  }
  void apply(const Span& span, const Columns<F>& columns) const {
    kernels.apply(second, span, columns.coefficients, columns.stride);
  }
};

// Whether the sums must be repeated in float64: float32 terms may have overflowed or underflowed,
// or the squares cancel because the shift lies more than 8 standard deviations from the mean.
bool left_range(const double* sums, int64_t stride, int64_t channels, double elements,
                bool squares) {
  for (int64_t i = 0; i < channels; ++i) {
    const double a = sums[i], b = std::abs(sums[stride + i]);
    if (!std::isfinite(a) || !std::isfinite(b)) return true;
    if (b < 1e-28 * elements && (a != 0.0 || b != 0.0)) return true;
    if (squares && 65.0 * a * a > 64.0 * b * elements) return true;
  }
  return false;
}

// First sweep of a span: in float32, repeated in float64 if that left its range.
template <class Direction, class F>
void sum_span(const Direction& direction, const Span& span, const Columns<F>& columns,
              double* sums) {
  const int64_t stride = columns.stride;
  std::fill_n(sums, 2 * stride, 0.0);
  direction.sum(span, columns, sums, false);
  const double elements =
      static_cast<double>((span.outer_end - span.outer) * (span.inner_end - span.inner));
  if (std::is_same_v<F, double> ||
      !left_range(sums, stride, span.channel_end - span.channel, elements, Direction::kSquares))
    return;
  std::fill_n(sums, 2 * stride, 0.0);
  direction.sum(span, columns, sums, true);
}

// Both sweeps of a span back to back: the second reads from the L2 cache.
template <class Direction>
void run_span(const Direction& direction, const Span& span, int64_t stride) {
  using F = typename Direction::Element;
  F coefficients[kBackwardCoefficients * kMostChannels];
  double sums[2 * kMostChannels];
  const Columns<F> columns = {span.channel, span.channel_end, coefficients, stride};
  direction.prepare(columns);
  if (direction.has_sums())
    sum_span(direction, span, columns, sums);
  else
    std::fill_n(sums, 2 * stride, 0.0);
  direction.finish(columns, sums);
  if (direction.applies()) direction.apply(span, columns);
}

// The first sweep of all spans, then the second.
template <class Direction>
void run_sweep_by_sweep(const Direction& direction, const Spans& spans, int64_t elements) {
  using F = typename Direction::Element;
  const int64_t stride = padded(spans.widest()), columns = spans.columns(), parts = spans.parts();
  const int64_t items = columns * parts;
  const bool has_sums = direction.has_sums();
  const std::unique_ptr<F[]> coefficients(new F[columns * Direction::kCoefficients * stride]);
  const std::unique_ptr<double[]> sums(new double[(has_sums ? items : 1) * 2 * stride]);
  const auto of_column = [&](int64_t column) {
    const Span span = spans(column, 0);
    return Columns<F>{span.channel, span.channel_end,
                      coefficients.get() + column * Direction::kCoefficients * stride, stride};
  };
  const auto slot = [&](int64_t item) { return sums.get() + item * 2 * stride; };

  for_each_item({columns, elements}, [&](int64_t column) { direction.prepare(of_column(column)); });
  if (has_sums) {
    for_each_item({items, elements, kLeastParallelElements}, [&](int64_t i) {
      sum_span(direction, spans(i % columns, i / columns), of_column(i % columns), slot(i));
    });
  } else {
    std::fill_n(sums.get(), 2 * stride, 0.0);
  }
  for_each_item({columns, elements}, [&](int64_t column) {
    double* total = slot(has_sums ? column : 0);
    for (int64_t part = 1; has_sums && part < parts; ++part) {
      const double* other = slot(part * columns + column);
      for (int64_t k = 0; k < 2 * stride; ++k) total[k] += other[k];
    }
    direction.finish(of_column(column), total);
  });
  if (!direction.applies()) return;
  for_each_item({items, elements, kLeastParallelElements, /*backwards=*/has_sums}, [&](int64_t i) {
    direction.apply(spans(i % columns, i / columns), of_column(i % columns));
  });
}

// Runs the calls in order. Spans of channels take all calls in one go; a split ghost batch waits
// for the one before, which has updated the running statistics.
template <class Direction, class Call>
void run(const Call* calls, int64_t count) {
  std::vector<Spans> spans;
  int64_t elements = 0;
  bool by_span = true;
  for (int64_t k = 0; k < count; ++k) elements += calls[k].shape.numel();
  for (int64_t k = 0; k < count; ++k) {
    const BatchNormShape& shape = calls[k].shape;
    spans.emplace_back(shape, Direction{calls[k]}.past_caches(elements));
    by_span = by_span && shape.inner > 1 && spans[k].parts() == 1;
  }
  if (by_span) {
    const int64_t stride = padded(spans[0].widest());
    const auto run_column = [&](int64_t column) {
      for (int64_t k = 0; k < count; ++k)
        run_span(Direction{calls[k]}, spans[k](column, 0), stride);
    };
    return for_each_item({spans[0].columns(), elements, kLeastParallelElements}, run_column);
  }
  for (int64_t k = 0; k < count; ++k) {
    Direction direction{calls[k]};
    direction.prepare_sweep_by_sweep();
    run_sweep_by_sweep(direction, spans[k], calls[k].shape.numel());
  }
}

}  // namespace

void batch_norm_forward(const BatchNormForward* calls, int64_t count) {
  if (calls->shape.dtype == DType::Double)
    run<Forward<double>>(calls, count);
  else
    run<Forward<float>>(calls, count);
}

void batch_norm_backward(const BatchNormBackward* calls, int64_t count) {
  if (calls->shape.dtype == DType::Double)
    run<Backward<double>>(calls, count);
  else
    run<Backward<float>>(calls, count);
}

}  // namespace gradfuse::cpu
