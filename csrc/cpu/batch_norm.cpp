// The traversal of batch normalisation on the CPU: which spans of the tensor are summed and swept,
// in which order, by whom. A span's extent depends on sizes alone, and sums of spans are added in
// their order, so that the bits do not depend on the threads.
//
// Positions contiguous (inner > 1): a span is a few channels of all samples. Its second sweep
// follows the first at once, and finds what fits the second-level cache there. Where channels are
// too few to go round, a channel's samples and positions are split as well, as below.
//
// Channels contiguous (inner == 1): a span is some rows of some columns. All spans are summed, then
// all are swept, the last ones first, for they are still in the cache.

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "../math/batch_norm.h"
#include "../ops.h"
#include "kernels.h"
#include "parallel.h"

namespace gradfuse::cpu {
namespace {

constexpr int64_t kSpanElements = 65536;
constexpr int64_t kRunElements = 1024;  // least elements side by side in a span
constexpr int64_t kColumns = 1024;
constexpr int64_t kLeastRows = 128;  // of a span, so that the sums are small beside the data
constexpr int64_t kMostRowSpans = 512;
constexpr int64_t kEnoughChannelSpans = 48;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a tensor falls into spans: `columns` groups of channels, each of `parts` spans.
class Spans {
 public:
  explicit Spans(const BatchNormShape& s) : shape_(s) {
    samples_ = s.outer, positions_ = s.inner;
    if (s.inner == 1) {
      channels_ = std::min(s.channels, kColumns);
      samples_ = std::min(s.outer, std::max(kLeastRows, divided_up(s.outer, kMostRowSpans)));
    } else {
      channels_ = std::min(s.channels, std::min(kMostChannels, divided_up(kRunElements, s.inner)));
      if (s.numel() >= kLeastParallel && divided_up(s.channels, channels_) < kEnoughChannelSpans) {
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
    return {n, std::min(n + samples_, shape_.outer),  c, std::min(c + channels_, shape_.channels),
            p, std::min(p + positions_, shape_.inner)};
  }

 private:
  BatchNormShape shape_;
  int64_t channels_, samples_, positions_;
  int64_t columns_, sample_parts_, position_parts_;
};

int64_t padded(int64_t channels) { return divided_up(channels, kChannelPadding) * kChannelPadding; }

// Calls f with a value of the C++ type that dtype names.
template <class F>
auto with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::Half: return f(c10::Half());
    case DType::BFloat16: return f(c10::BFloat16());
    case DType::Float: return f(float());
    default: return f(double());
  }
}

double read(const void* data, DType dtype, int64_t i) {
  return with_type(
      dtype, [&](auto t) { return static_cast<double>(static_cast<const decltype(t)*>(data)[i]); });
}
double read(ChannelRef v, int64_t c, double otherwise) {
  return v.data ? read(v.data, v.dtype, c) : otherwise;
}
void write(ChannelRef v, int64_t c, double value) {
  if (!v.data) return;
  with_type(v.dtype, [&](auto t) {
    static_cast<decltype(t)*>(v.data)[c] = static_cast<decltype(t)>(value);
    return 0;
  });
}

// The stages of a call. Each takes a span's or column's first channel and its coefficients
// F [count][stride]; sums are double [2][stride].
//   prepare(channel, channel_end, coefficients, stride)
//   sum(span, coefficients, sums, stride, wide)
//   finish(channel, channel_end, coefficients, sums, stride)
//   apply(span, coefficients, stride)
struct Stages {
  bool sums;  // whether sum() is needed
  bool squares;  // whether its second sum is that of the first's squares
  bool applies;  // whether apply() is needed
  int coefficients;
};

// Whether float32 terms of these sums may have overflowed or vanished, or their squares are to
// cancel: the element that they are shifted by lies more than 8 deviations from the mean.
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

template <class F, class Prepare, class Sum, class Finish, class Apply>
void run(const BatchNormShape& shape, Stages stages, Prepare prepare, Sum sum, Finish finish,
         Apply apply) {
  const Spans spans(shape);
  const auto sum_of = [&](const Span& span, const F* coefficients, double* sums, int64_t stride) {
    std::fill_n(sums, 2 * stride, 0.0);
    sum(span, coefficients, sums, stride, false);
    const double elements =
        static_cast<double>((span.outer_end - span.outer) * (span.inner_end - span.inner));
    if (std::is_same_v<F, double> ||
        !left_range(sums, stride, span.channel_end - span.channel, elements, stages.squares))
      return;
    std::fill_n(sums, 2 * stride, 0.0);
    sum(span, coefficients, sums, stride, true);
  };
  const int64_t stride = padded(spans.widest());
  const int64_t columns = spans.columns(), parts = spans.parts(), items = columns * parts;
  if (shape.inner > 1 && parts == 1) {
    for_each_item(columns, shape.numel(), [&](int64_t column) {
      const Span span = spans(column, 0);
      F coefficients[kBackwardCoefficients * kMostChannels];
      double sums[2 * kMostChannels];
      prepare(span.channel, span.channel_end, coefficients, stride);
      if (stages.sums)
        sum_of(span, coefficients, sums, stride);
      else
        std::fill_n(sums, 2 * stride, 0.0);
      finish(span.channel, span.channel_end, coefficients, sums, stride);
      if (stages.applies) apply(span, coefficients, stride);
    });
    return;
  }
  const std::unique_ptr<F[]> coefficients(new F[columns * stages.coefficients * stride]);
  const std::unique_ptr<double[]> sums(new double[(stages.sums ? items : 1) * 2 * stride]);
  const auto of_column = [&](int64_t column) {
    return coefficients.get() + column * stages.coefficients * stride;
  };
  for_each_item(columns, shape.numel(), [&](int64_t column) {
    const Span span = spans(column, 0);
    prepare(span.channel, span.channel_end, of_column(column), stride);
  });
  if (stages.sums) {
    for_each_item(items, shape.numel(), [&](int64_t i) {
      sum_of(spans(i % columns, i / columns), of_column(i % columns), sums.get() + i * 2 * stride,
             stride);
    });
  } else {
    std::fill_n(sums.get(), 2 * stride, 0.0);
  }
  for_each_item(columns, shape.numel(), [&](int64_t column) {
    const Span span = spans(column, 0);
    double* total = sums.get() + (stages.sums ? column * 2 * stride : 0);
    for (int64_t part = 1; stages.sums && part < parts; ++part) {
      const double* slot = sums.get() + (part * columns + column) * 2 * stride;
      for (int64_t k = 0; k < 2 * stride; ++k) total[k] += slot[k];
    }
    finish(span.channel, span.channel_end, of_column(column), total, stride);
  });
  if (!stages.applies) return;
  for_each_item_backwards(items, shape.numel(), [&](int64_t i) {
    apply(spans(i % columns, i / columns), of_column(i % columns), stride);
  });
}

template <class F>
void forward(const BatchNormForward& call) {
  const BatchNormKernels& kernels = batch_norm_kernels();
  const double count = static_cast<double>(call.shape.count());
  const int64_t channels = call.shape.channels;
  const double momentum = call.momentum_value ? *call.momentum_value : call.momentum;
  const auto finish = [&](int64_t channel, int64_t end, F* p, const double* sums, int64_t stride) {
    for (int64_t c = channel; c < end; ++c) {
      const int64_t i = c - channel;
      double mean, variance, third;
      if (call.training) {
        const double shift = p[kMean * stride + i];
        const Moments m = moments({sums[i], sums[stride + i]}, shift, count);
        mean = m.mean, variance = m.variance;
        third = unbiased(variance, count);
        write(call.running_mean, c,
              running_average(read(call.running_mean, c, 0.0), mean, momentum));
        write(call.running_var, c,
              running_average(read(call.running_var, c, 0.0), third, momentum));
      } else {
        mean = read(call.running_mean, c, 0.0);
        third = variance = read(call.running_var, c, 1.0);
      }
      const double invstd = inverse_deviation(variance, call.eps);
      call.stats[c] = mean;
      call.stats[channels + c] = invstd;
      call.stats[2 * channels + c] = third;
      const auto n =
          normalisation<F>(mean, invstd, read(call.weight, c, 1.0), read(call.bias, c, 0.0));
      p[kMean * stride + i] = n.mean;
      p[kScale * stride + i] = n.scale;
      p[kShift * stride + i] = n.shift;
    }
  };
  run<F>(
      call.shape, {call.training, true, true, kForwardCoefficients},
      [&](int64_t channel, int64_t end, F* p, int64_t stride) {  // what the sums are shifted by
        for (int64_t c = channel; c < end; ++c)
          p[kMean * stride + c - channel] =
              static_cast<F>(read(call.input, call.shape.dtype, c * call.shape.inner));
      },
      [&](const Span& span, const F* p, double* sums, int64_t stride, bool wide) {
        kernels.forward_sums(call, span, p, sums, stride, wide);
      },
      finish,
      [&](const Span& span, const F* p, int64_t stride) {
        kernels.forward_apply(call, span, p, stride);
      });
}

template <class F>
void backward(const BatchNormBackward& call) {
  const BatchNormKernels& kernels = batch_norm_kernels();
  const double count = static_cast<double>(call.shape.count());
  const double* means = call.stats;
  const double* invstds = call.stats + call.shape.channels;
  const auto prepare = [&](int64_t channel, int64_t end, F* p, int64_t stride) {
    for (int64_t c = channel; c < end; ++c) {
      const int64_t i = c - channel;
      const auto n = normalisation<F>(means[c], invstds[c], read(call.weight, c, 1.0),
                                      read(call.bias, c, 0.0));
      p[kMean * stride + i] = n.mean;
      p[kScale * stride + i] = n.scale;
      p[kShift * stride + i] = n.shift;
      p[kInvstd * stride + i] = scale_of_shrunk<F>(invstds[c]);
    }
  };
  const auto finish = [&](int64_t channel, int64_t end, F* p, const double* sums, int64_t stride) {
    for (int64_t c = channel; c < end; ++c) {
      const int64_t i = c - channel;
      const GradientSums s = {sums[i], sums[stride + i]};
      const auto g = input_gradient<F>(means[c], invstds[c], read(call.weight, c, 1.0), s, count,
                                       call.training);
      p[kDirect * stride + i] = g.direct;
      p[kSlope * stride + i] = g.slope;
      p[kOffset * stride + i] = g.shift;
      const double offset = normalisation_offset(static_cast<double>(g.mean), means[c], invstds[c]);
      write(call.grad_weight, c, weight_gradient(s, offset));
      write(call.grad_bias, c, s.sum);
    }
  };
  const bool sums =
      call.grad_weight.data || call.grad_bias.data || (call.training && call.grad_input);
  run<F>(
      call.shape, {sums, false, call.grad_input || call.grad_residual, kBackwardCoefficients},
      prepare,
      [&](const Span& span, const F* p, double* s, int64_t stride, bool wide) {
        kernels.backward_sums(call, span, p, s, stride, wide);
      },
      finish,
      [&](const Span& span, const F* p, int64_t stride) {
        kernels.backward_apply(call, span, p, stride);
      });
}

}  // namespace

void batch_norm_forward(const BatchNormForward& call) {
  if (call.shape.dtype == DType::Double)
    forward<double>(call);
  else
    forward<float>(call);
}

void batch_norm_backward(const BatchNormBackward& call) {
  if (call.shape.dtype == DType::Double)
    backward<double>(call);
  else
    backward<float>(call);
}

}  // namespace gradfuse::cpu
