// Traversal of a span, vector by vector, for the batch normalisation kernels of one instruction
// set. Include inside the anonymous namespace of that set's file, after simd/vec_io.h.
//
// Positions contiguous: a run belongs to one channel, whose coefficients are broadcast to all
// lanes. Channels contiguous: each lane has its own channel, and a vector of coefficients is reused
// for several rows. Elements are computed in float32 (float64 for Double); sums are kept in float64
// lanes.

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }  // std::min is a template

template <class T>
using VecFor = typename Lanes<T>::Vec;
template <class T>
using ScalarFor = std::decay_t<decltype(VecFor<T>{}[0])>;

// All vectors of a run but the last are whole; a type of their own spares them the lane count.
template <class T>
struct Whole {
  static constexpr int64_t lanes = Lanes<T>::count;
};
struct Some {
  int64_t lanes;
};

template <class T>
inline VecFor<T> load_lanes(const T* p, Whole<T>) {
  return load(p);
}
template <class T>
inline VecFor<T> load_lanes(const T* p, Some count) {
  return load_first(p, count.lanes);
}
template <class T>
inline void store_lanes(T* p, VecFor<T> v, Whole<T>) {
  store(p, v);
}
template <class T>
inline void store_lanes(T* p, VecFor<T> v, Some count) {
  store_first(p, v, count.lanes);
}
// The vector with zeros in the lanes beyond the count.
template <class T, class V>
inline V only_lanes(V v, Whole<T>) {
  return v;
}
template <class V>
inline V only_lanes(V v, Some count) {
  using I = typename IntsOf<V>::type;
  using Lane = std::decay_t<decltype(I{}[0])>;
  return (lane_numbers<I>() < (I{} + static_cast<Lane>(count.lanes))) ? v : V{};
}

// One vector of a span.
template <class T, class Count>
struct Piece {
  int64_t at;  // index of its first element in the tensor
  int64_t byte;  // index of the mask byte that holds its first bit
  int shift;  // position of that bit in the byte
  Count count;

  Piece(const BatchNormShape& shape, int64_t row, int64_t i, Count n)
      : at(row * (shape.inner == 1 ? shape.channels : shape.inner) + i),
        byte(row * shape.mask_bytes_per_row() + i / 8),
        shift(Lanes<T>::count < 8 ? i % 8 : 0),
        count(n) {}

  uint32_t load_bits(const uint8_t* mask) const {
    const uint8_t* p = mask + byte;
    if (count.lanes <= 8) return *p >> shift;
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return bits;
  }
  void store_bits(uint8_t* mask, uint32_t bits) const {
    uint8_t* p = mask + byte;
    if (count.lanes < Lanes<T>::count) bits &= (1u << count.lanes) - 1;
    if (count.lanes <= 8) {
      *p = static_cast<uint8_t>(shift ? *p | bits << shift : bits);
    } else {
      const uint16_t two = static_cast<uint16_t>(bits);
      std::memcpy(p, &two, 2);
    }
  }
};

template <class T>
struct Coefficients {
  VecFor<T> v[kBackwardCoefficients];
};

constexpr int kFold = 8;

// Traverses a span. Calls body(piece, coefficients, state) for each vector, state.fold() after at
// most kFold of them, and done(j, state) after each run or, if channels are contiguous, after kRows
// rows of a vector of columns. j is the (first) channel, counted from the span's first.
template <class T, int kCount, int kRows, class State, class Body, class Done>
inline void traverse(const BatchNormShape& shape, const Span& span, const void* coefficients,
                     int64_t stride, Body body, Done done) {
  constexpr int64_t kLanes = Lanes<T>::count;
  const ScalarFor<T>* p = static_cast<const ScalarFor<T>*>(coefficients);
  const int64_t channels = span.channel_end - span.channel;
  if (shape.inner == 1) {
    for (int64_t n = span.outer; n < span.outer_end; n += kRows) {
      const int64_t end = least(n + kRows, span.outer_end);
      const auto columns = [&](int64_t j, auto count) {
        Coefficients<T> c;
        for (int k = 0; k < kCount; ++k) c.v[k] = load(p + k * stride + j);
        State state;
        for (int64_t row = n; row < end; ++row)
          body(Piece<T, decltype(count)>(shape, row, span.channel + j, count), c, state);
        state.fold();
        done(j, state);
      };
      int64_t j = 0;
      for (; j + kLanes <= channels; j += kLanes) columns(j, Whole<T>());
      if (j < channels) columns(j, Some{channels - j});
    }
    return;
  }
  for (int64_t n = span.outer; n < span.outer_end; ++n) {
    for (int64_t j = 0; j < channels; ++j) {
      Coefficients<T> c;
      for (int k = 0; k < kCount; ++k) c.v[k] = VecFor<T>{} + p[k * stride + j];
      State state;
      const int64_t row = n * shape.channels + span.channel + j;
      int64_t i = span.inner;
      for (; i + kFold * kLanes <= span.inner_end; i += kFold * kLanes) {
        for (int k = 0; k < kFold; ++k)
          body(Piece<T, Whole<T>>(shape, row, i + k * kLanes, Whole<T>()), c, state);
        state.fold();
      }
      for (; i + kLanes <= span.inner_end; i += kLanes)
        body(Piece<T, Whole<T>>(shape, row, i, Whole<T>()), c, state);
      if (i < span.inner_end)
        body(Piece<T, Some>(shape, row, i, Some{span.inner_end - i}), c, state);
      state.fold();
      done(j, state);
    }
  }
}

// Two sums in float64 lanes, of a run or of a vector of columns. Up to kFold float32 terms are
// summed in float32 first; not if kWide, so that no product overflows or underflows.
template <class T, bool kWide>
struct TwoSums {
  using V = VecFor<T>;
  V a = {}, b = {};
  Pair<DoubleVec> first = {}, second = {};

  void add(V x, V y, V z) {  // x to the first, y * z to the second
    if constexpr (kWide) {
      add_wide(widen(x), widen(y), widen(z));
    } else {
      a += x;
      b += y * z;
    }
  }
  void add_wide(Pair<DoubleVec> x, Pair<DoubleVec> y, Pair<DoubleVec> z) {
    first.a += x.a, first.b += x.b;
    second.a += y.a * z.a, second.b += y.b * z.b;
  }
  void fold() {
    if constexpr (std::is_same_v<T, double>) {
      first.a = a, second.a = b;
    } else if constexpr (!kWide) {
      const Pair<DoubleVec> wa = widen(a), wb = widen(b);
      first.a += wa.a, first.b += wa.b;
      second.a += wb.a, second.b += wb.b;
      a = b = V{};
    }
  }
};

inline void add_to(double* p, DoubleVec v) { store(p, load(p) + v); }

// Accumulates terms(piece, coefficients, sums) into the sums [2][stride] of the span's channels.
template <class T, int kCount, bool kWide, class Terms>
inline void sum_span(const BatchNormShape& shape, const Span& span, const void* coefficients,
                     double* sums, int64_t stride, Terms terms) {
  constexpr int kRows = kFold;
  using State = TwoSums<T, kWide>;
  if (shape.inner == 1) {
    traverse<T, kCount, kRows, State>(shape, span, coefficients, stride, terms,
                                      [&](int64_t j, const State& s) {
                                        add_to(sums + j, s.first.a);
                                        add_to(sums + stride + j, s.second.a);
                                        if (Lanes<T>::count == kDoubles) return;
                                        add_to(sums + j + kDoubles, s.first.b);
                                        add_to(sums + stride + j + kDoubles, s.second.b);
                                      });
    return;
  }
  // Lanes are summed once per span, not per run: runs may be short.
  DoubleVec first[kMostChannels], second[kMostChannels];
  const int64_t channels = span.channel_end - span.channel;
  for (int64_t j = 0; j < channels; ++j) first[j] = second[j] = DoubleVec{};
  traverse<T, kCount, kRows, State>(shape, span, coefficients, stride, terms,
                                    [&](int64_t j, const State& s) {
                                      first[j] += s.first.a + s.first.b;
                                      second[j] += s.second.a + s.second.b;
                                    });
  for (int64_t j = 0; j < channels; ++j) {
    sums[j] += lane_sum(first[j]);
    sums[stride + j] += lane_sum(second[j]);
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

// (x - mean) * kShrink; kMean holds mean * kShrink.
template <class T>
inline VecFor<T> difference(VecFor<T> x, const Coefficients<T>& c) {
  return x * static_cast<ScalarFor<T>>(kShrink) - c.v[kMean];
}

template <class T, class Count>
inline VecFor<T> normalised(const Coefficients<T>& c, const T* x, const T* residual,
                            const Piece<T, Count>& piece) {
  const VecFor<T> d = difference<T>(load_lanes(x + piece.at, piece.count), c);
  VecFor<T> z = d * c.v[kScale] + c.v[kShift];
  if (residual) z += load_lanes(residual + piece.at, piece.count);
  return z;
}
