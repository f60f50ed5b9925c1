// The first sweep of a span: two sums for each channel. Include after batch_norm_traversal.h.
//
// Sums are kept in float64 lanes. Up to kFold float32 terms of a lane are summed in float32 first;
// not if kWide, so that no product overflows or underflows.

constexpr int kFold = 8;

// kParts: float64 vectors for each vector of float32. With one, as for a channel whose lanes are
// added in the end, the halves of a vector are added. With two, as for a block of columns, each
// lane keeps its own channel.
template <class T, bool kWide, int kParts>
struct Sums {
  using V = VecFor<T>;
  Pair<V> a = {}, b = {};
  Pair<DoubleVec> first[kParts] = {}, second[kParts] = {};
  int terms = 0;

  void add(Pair<V> x, Pair<V> y, Pair<V> z) {  // x to the first, y * z to the second
    if constexpr (kWide) {
      add_wide(0, widen(x.a), widen(y.a), widen(z.a));
      add_wide(1, widen(x.b), widen(y.b), widen(z.b));
    } else {
      a = a + x;
      b = b + y * z;
      if constexpr (!std::is_same_v<T, double>)
        if (++terms == kFold) fold();
    }
  }
  void add_wide(int half, Pair<DoubleVec> x, Pair<DoubleVec> y, Pair<DoubleVec> z) {
    const int part = half % kParts;
    first[part] = first[part] + x;
    second[part] = second[part] + y * z;
  }
  void fold() {
    if constexpr (std::is_same_v<T, double>) {
      first[0] = a, second[0] = b;
    } else if constexpr (!kWide) {
      fold(first, a);
      fold(second, b);
      a = b = Pair<V>{};
      terms = 0;
    }
  }
  static void fold(Pair<DoubleVec>* sum, Pair<V> terms) {
    if constexpr (kParts == 1) {
      sum[0] = sum[0] + widen(terms.a + terms.b);
    } else {
      sum[0] = sum[0] + widen(terms.a);
      sum[1] = sum[1] + widen(terms.b);
    }
  }
  // Adds a sum to the doubles at p, in the order of the lanes.
  static void add_to(double* p, const Pair<DoubleVec>* sum) {
    for (int i = 0; i < kParts; ++i) {
      store(p, load(p) + sum[i].a), p += kDoubles;
      store(p, load(p) + sum[i].b), p += kDoubles;
    }
  }
};

// Adds terms(place, coefficients, sums) to the sums [2][stride] of the span's channels, which are
// 0 before. kSamples: runs of one channel at a time, if they are short. Samples may lie a power of
// two apart, so that the lines of more than 8, of all tensors together, evict each other.
template <class T, int kCount, bool kWide, int64_t kSamples, class Terms>
inline void sum_span(const BatchNormShape& shape, const Span& span, const void* coefficients,
                     double* sums, int64_t stride, Terms terms) {
  const ScalarFor<T>* p = static_cast<const ScalarFor<T>*>(coefficients);
  const int64_t channels = span.channel_end - span.channel;
  if (shape.inner == 1) {
    using State = Sums<T, kWide, std::is_same_v<T, double> ? 1 : 2>;
    // A block of rows fits the L1 cache.
    const int64_t row_bytes = channels * static_cast<int64_t>(sizeof(T));
    const int64_t rows = least(most(16384 / row_bytes, kFold), 8 * kFold);
    const auto done = [&](int64_t j, const State& s) {
      State::add_to(sums + j, s.first);
      State::add_to(sums + stride + j, s.second);
    };
    with_lane_order<T, kCount>(p, stride, channels, [&](auto q, int64_t s) {
      traverse_columns<T, kCount, State>(shape, span, q, s, rows, terms, done);
    });
    for (int64_t j = 0; j < channels; j += kBlock<T>) {
      in_element_order<T>(sums + j);
      in_element_order<T>(sums + stride + j);
    }
    return;
  }
  // Lanes are summed once per span, not per run: runs may be short.
  using State = Sums<T, kWide, 1>;
  DoubleVec first[kMostChannels], second[kMostChannels];
  for (int64_t j = 0; j < channels; ++j) first[j] = second[j] = DoubleVec{};
  traverse_runs<T, kCount, kSamples, State>(shape, span, p, stride, terms,
                                            [&](int64_t j, const State& s) {
                                              first[j] += s.first[0].a + s.first[0].b;
                                              second[j] += s.second[0].a + s.second[0].b;
                                            });
  for (int64_t j = 0; j < channels; ++j) {
    sums[j] = lane_sum(first[j]);
    sums[stride + j] = lane_sum(second[j]);
  }
}
