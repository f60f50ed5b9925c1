// Traversal of a span, block by block, for the batch normalisation kernels of one instruction set.
// Include inside the anonymous namespace of that set's file, after simd/vec_blocks.h.
//
// A block is what a pair of vectors holds. Positions contiguous: a run belongs to one channel,
// whose coefficients are broadcast to all lanes. Channels contiguous: each lane has its own
// channel. Elements are computed in float32 (float64 for Double).
//
// The first sweep, which only reads, takes a channel's runs of some samples, or a block of columns
// of many rows, one after another: coefficients and sums stay in registers. The second sweep goes
// in the order of memory: two rows at a time took twice as long as one, for the stores.

// The hardware's prefetchers see a stream only after some lines of it, and a channel's run or a row
// ends soon, so each block prefetches the one that comes this many bytes later. Into the L2 cache:
// rows and samples that lie a power of two apart would evict each other from the L1.
constexpr int64_t kAheadBytes = 1024;

// Where a block lies.
template <class T, class Count>
struct Place {
  int64_t at;  // index of its first element in the tensor
  int64_t byte;  // index of the mask byte that holds its first bit
  int shift;  // position of that bit in the byte
  int64_t ahead;  // elements from this block to one that will soon be read
  int64_t outer;  // index of its sample, or of its row of positions
  Count count;

  uint32_t load_bits(const uint8_t* mask) const {
    const uint8_t* p = mask + byte;
    uint32_t bits = 0;
    if constexpr (kBlock<T> <= 8) {
      bits = *p >> shift;
    } else if constexpr (std::is_same_v<Count, Whole<T>>) {
      std::memcpy(&bits, p, kBlock<T> / 8);
    } else {
      for (int64_t i = 0; 8 * i < count.elements; ++i) bits |= uint32_t{p[i]} << (8 * i);
    }
    return bits;
  }
  void store_bits(uint8_t* mask, uint32_t bits) const {
    uint8_t* p = mask + byte;
    if constexpr (!std::is_same_v<Count, Whole<T>>)
      bits &= static_cast<uint32_t>((uint64_t{1} << count.elements) - 1);
    if constexpr (kBlock<T> <= 8) {
      *p = static_cast<uint8_t>(shift ? *p | bits << shift : bits);
    } else if constexpr (std::is_same_v<Count, Whole<T>>) {
      std::memcpy(p, &bits, kBlock<T> / 8);
    } else {
      for (int64_t i = 0; 8 * i < count.elements; ++i) p[i] = static_cast<uint8_t>(bits >> (8 * i));
    }
  }
  // Prefetches the lines of a block like this one. They may lie behind the tensor: a prefetch
  // touches nothing.
  void prefetch(const T* tensor) const {
    const char* p = reinterpret_cast<const char*>(tensor + at + ahead);
    for (size_t i = 0; i < kBlock<T> * sizeof(T); i += 64) prefetch_line_into_l2(p + i);
  }
};

// Of a channel, for all lanes.
template <class T>
struct RunCoefficients {
  VecFor<T> v[kBackwardCoefficients];
  Pair<VecFor<T>> operator()(int k) const { return {v[k], v[k]}; }
};
// Of a block of columns.
template <class T>
struct ColumnCoefficients {
  Pair<VecFor<T>> v[kBackwardCoefficients];
  Pair<VecFor<T>> operator()(int k) const { return v[k]; }
};

// Blocks of a run that is long enough to be worth setting up its channel.
constexpr int64_t kLongRun = 8;

// Calls body(place, coefficients, state) for each block of the span's channels, and
// done(channel counted from the span's first, state) for each channel after some of its runs: up to
// kSamples if they are short.
template <class T, int kCount, int64_t kSamples, class State, class Body, class Done>
inline void traverse_runs(const BatchNormShape& shape, const Span& span,
                          const ScalarFor<T>* coefficients, int64_t stride, Body body, Done done) {
  constexpr int64_t kElements = kBlock<T>;
  const int64_t inner = shape.inner, all = shape.channels, begin = span.inner, end = span.inner_end;
  const int64_t mask_row = shape.mask_bytes_per_row();
  const int64_t channels = span.channel_end - span.channel;
  const int64_t at_once = end - begin < kLongRun * kElements ? kSamples : 1;
  constexpr int64_t kAhead = kAheadBytes / static_cast<int64_t>(sizeof(T));
  for (int64_t first = span.outer; first < span.outer_end; first += at_once) {
    const int64_t last = least(first + at_once, span.outer_end);
    for (int64_t j = 0; j < channels; ++j) {
      RunCoefficients<T> c;
      for (int k = 0; k < kCount; ++k) c.v[k] = VecFor<T>{} + coefficients[k * stride + j];
      State state;
      for (int64_t n = first; n < last; ++n) {
        const int64_t row = n * all + span.channel + j;
        const int64_t at = row * inner, byte = row * mask_row;
        int64_t i = begin;
        for (; i + kElements <= end; i += kElements)
          body(Place<T, Whole<T>>{at + i, byte + i / 8, static_cast<int>(i % 8), kAhead, n, {}}, c,
               state);
        if (i < end)
          body(Place<T, Some>{at + i, byte + i / 8, static_cast<int>(i % 8), kAhead, n, {end - i}},
               c, state);
      }
      state.fold();
      done(j, state);
    }
  }
}

// Calls use(coefficients, stride) with those of the span's columns in the order of a block's lanes.
template <class T, int kCount, class Use>
inline void with_lane_order(const ScalarFor<T>* coefficients, int64_t stride, int64_t channels,
                            Use use) {
  if constexpr (kAlternates<T>) {
    ScalarFor<T> ordered[kCount * kMostColumns];
    for (int k = 0; k < kCount; ++k)
      for (int64_t j = 0; j < channels; j += kBlock<T>)
        store_pair(ordered + k * kMostColumns + j,
                   load_floats_of_block<T>(coefficients + k * stride + j));
    use(ordered, kMostColumns);
  } else {
    use(coefficients, stride);
  }
}

// Calls body(place, coefficients, state) for each block of the span, and done(first column counted
// from the span's first, state) for each block of columns after `rows` of its rows.
template <class T, int kCount, class State, class Body, class Done>
inline void traverse_columns(const BatchNormShape& shape, const Span& span,
                             const ScalarFor<T>* coefficients, int64_t stride, int64_t rows,
                             Body body, Done done) {
  constexpr int64_t kElements = kBlock<T>;
  const int64_t all = shape.channels, mask_row = shape.mask_bytes_per_row();
  const int64_t channels = span.channel_end - span.channel;
  const int64_t ahead = most(rows * all, kAheadBytes / static_cast<int64_t>(sizeof(T)));
  for (int64_t first = span.outer; first < span.outer_end; first += rows) {
    const int64_t last = least(first + rows, span.outer_end);
    const auto columns = [&](int64_t j, auto count) {
      ColumnCoefficients<T> c;
      for (int k = 0; k < kCount; ++k) c.v[k] = load_pair(coefficients + k * stride + j);
      State state;
      const int64_t column = span.channel + j;
      for (int64_t row = first; row < last; ++row)
        body(Place<T, decltype(count)>{row * all + column, row * mask_row + column / 8,
                                       static_cast<int>(column % 8), ahead, row, count},
             c, state);
      state.fold();
      done(j, state);
    };
    int64_t j = 0;
    for (; j + kElements <= channels; j += kElements) columns(j, Whole<T>());
    if (j < channels) columns(j, Some{channels - j});
  }
}

// Mask bits by lane, from z before rounding.
template <Activation kActivation, class V, class S>
inline typename IntsOf<V>::type passes(V z, S above, S below) {
  if constexpr (kActivation == Activation::Relu) return ~(z <= above);
  if constexpr (kActivation == Activation::Relu6) return (z > above) & (z < below);
  return z > above;
}

struct NoState {
  void fold() {}
};

// The second sweep of a span.
template <class T, int kCount, class Body>
inline void sweep(const BatchNormShape& shape, const Span& span, const void* coefficients,
                  int64_t stride, Body body) {
  const ScalarFor<T>* p = static_cast<const ScalarFor<T>*>(coefficients);
  const auto done = [](int64_t, NoState) {};
  if (shape.inner == 1)
    with_lane_order<T, kCount>(p, stride, span.channel_end - span.channel, [&](auto q, int64_t s) {
      traverse_columns<T, kCount, NoState>(shape, span, q, s, 1, body, done);
    });
  else
    traverse_runs<T, kCount, 1, NoState>(shape, span, p, stride, body, done);
}

// (x - mean) * kShrink; kMean holds mean * kShrink.
template <class T, class C>
inline Pair<VecFor<T>> difference(Pair<VecFor<T>> x, const C& c) {
  return x * static_cast<ScalarFor<T>>(kShrink) - c(kMean);
}

// A block of the branch that joins the residual, or of its gradient, times what its sample has.
template <class T, class Count>
inline Pair<VecFor<T>> scaled(BranchScale scale, Pair<VecFor<T>> v, const Place<T, Count>& place) {
  if (!scale.data) return v;
  const ScalarFor<T> factor = static_cast<const ScalarFor<T>*>(scale.data)[place.outer];
  return factor == ScalarFor<T>(0) ? Pair<VecFor<T>>{} : v * factor;
}

template <class T, class C, class Count>
inline Pair<VecFor<T>> normalised(const C& c, const T* x, const T* residual, BranchScale scale,
                                  const Place<T, Count>& place) {
  const Pair<VecFor<T>> d = difference<T>(load_block(x + place.at, place.count), c);
  Pair<VecFor<T>> z = scaled<T>(scale, d * c(kScale) + c(kShift), place);
  if (residual) z = z + load_block(residual + place.at, place.count);
  return z;
}
