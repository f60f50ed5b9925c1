// Rows of layer norm and RMS norm, block by block: the sum that is normalised, sums over a row.
// Include after simd/vec_random.h, in the same namespace.

// Blocks whose terms are summed in the compute type before they join a float64 sum.
constexpr int64_t kFold = 8;

// Calls body(first element, count) for each block of elements [begin, end) of a row, and fold()
// after each kFold of them.
template <class T, class Body, class Fold>
inline void for_each_block(int64_t begin, int64_t end, Body body, Fold fold) {
  constexpr int64_t kElements = kBlock<T>;
  int64_t i = begin;
  for (; i + kFold * kElements <= end; fold())
    for (int64_t last = i + kFold * kElements; i < last; i += kElements) body(i, Whole<T>());
  for (; i + kElements <= end; i += kElements) body(i, Whole<T>());
  if (i < end) body(i, Some{end - i});
}
template <class T, class Body>
inline void for_each_block(int64_t begin, int64_t end, Body body) {
  for_each_block<T>(begin, end, body, [] {});
}
// Calls body(begin, end) for each strip of a row.
template <class Body>
inline void for_each_strip(int64_t width, Body body) {
  for (int64_t i = 0; i < width; i += kStrip) body(i, least(i + kStrip, width));
}

template <class T>
struct LaneSum {
  Pair<VecFor<T>> terms = {};
  Pair<DoubleVec> total = {};

  void add(Pair<VecFor<T>> x) { terms = terms + x; }
  void fold() {
    if constexpr (!std::is_same_v<T, double>) {
      total = total + widen(terms.a + terms.b);
      terms = Pair<VecFor<T>>{};
    }
  }
  double result() {
    if constexpr (std::is_same_v<T, double>) return lane_sum(terms.a + terms.b);
    fold();
    return lane_sum(total.a + total.b);
  }
};

struct RowMoments {
  double sum, squares;  // or another product
};

// Sums of v * scale - shift and its square.
template <class T>
inline RowMoments moments_about(const ScalarFor<T>* v, int64_t width, ScalarFor<T> scale,
                                ScalarFor<T> shift) {
  LaneSum<T> sum, squares;
  const Pair<VecFor<T>> shifts = {VecFor<T>{} + shift, VecFor<T>{} + shift};
  for_each_block<T>(
      0, width,
      [&](int64_t i, auto count) {
        const auto d = only_elements<T>(load_pair(v + i) * scale - shifts, count);
        sum.add(d);
        squares.add(d * d);
      },
      [&] {
        sum.fold();
        squares.fold();
      });
  return {sum.result(), squares.result()};
}

// The largest magnitude; NaN does not count.
template <class T>
inline double largest_of(const ScalarFor<T>* v, int64_t width) {
  VecFor<T> most = {};
  for_each_block<T>(0, width, [&](int64_t i, auto) {
    const Pair<VecFor<T>> x = load_pair(v + i);
    for (VecFor<T> part : {x.a, x.b}) {
      part = part < 0 ? -part : part;
      most = part > most ? part : most;
    }
  });
  return reduce_lanes(most, [](auto a, auto b) { return a > b ? a : b; });
}

// A row's normalisation in all lanes. Sweeps make their own: stores could alias a reference.
template <class V>
struct LaneNormalisation {
  V scale, mean, inverse, offset;

  template <class F>
  explicit LaneNormalisation(const RowNormalisation<F>& n)
      : scale(V{} + n.scale),
        mean(V{} + n.mean),
        inverse(V{} + n.inverse),
        offset(V{} + n.offset) {}
};
template <bool kCentred, class V>
inline V normalised(V v, const LaneNormalisation<V>& n) {
  if constexpr (!kCentred) return (v * n.scale) * n.inverse;
  return (v * n.scale - n.mean) * n.inverse + n.offset;
}
template <bool kCentred, class V>
inline Pair<V> normalised(Pair<V> v, const LaneNormalisation<V>& n) {
  return {normalised<kCentred>(v.a, n), normalised<kCentred>(v.b, n)};
}

// A block of A, which is T or the type that T is computed in, in the order of T's lanes.
template <class T, class A, class Count>
inline Pair<VecFor<T>> load_as(const A* p, Count count) {
  if constexpr (std::is_same_v<A, T>) {
    return load_block(p, count);
  } else {
    Pair<VecFor<T>> v;
    if constexpr (std::is_same_v<Count, Some>)
      v = load_pair_first(p, count.elements);
    else
      v = load_pair(p);
    return in_lane_order<T>(v);
  }
}
template <class T, class A, class Count>
inline void store_as(A* p, Pair<VecFor<T>> v, Count count, bool past_caches) {
  if constexpr (std::is_same_v<A, T>) {
    store_block(p, v, count, past_caches);
  } else {
    v = in_memory_order<T>(v);
    if constexpr (std::is_same_v<Count, Some>)
      store_pair_first(p, v, count.elements);
    else
      store_block(p, v, Whole<A>(), past_caches);
  }
}

// Stores a block as S, unless `sum` is null, and returns what an S can hold of it.
template <class T, class S, class Count>
inline Pair<VecFor<T>> store_rounded(S* sum, Pair<VecFor<T>> v, Count count, bool past_caches) {
  if constexpr (sizeof(S) > 2) {
    if (sum) store_as<T>(sum, v, count, past_caches);
    return v;
  } else {
    const UIntVec words = words_of(static_cast<const S*>(nullptr), v);
    if (!sum)
      ;
    else if constexpr (std::is_same_v<Count, Some>)
      store_words_first(sum, words, count.elements);
    else if (past_caches)
      stream_words(sum, words);
    else
      std::memcpy(sum, &words, sizeof(words));
    return load_pair(reinterpret_cast<const S*>(&words));
  }
}

// What the input of a row is multiplied by; 0 if its sample is left out.
template <class F>
inline F factor_of(const RowSum& addends, int64_t row) {
  double factor = addends.sample_scale ? addends.sample_scale[row / addends.rows_per_sample] : 1.0;
  if (addends.dropout.seed) factor *= addends.dropout.scale;
  return static_cast<F>(factor);
}

// A block with zeros in the place of elements that do not stay. It begins with element i of those
// that the bits are of.
template <class T>
inline Pair<VecFor<T>> only_kept(const uint8_t* kept, int64_t i, Pair<VecFor<T>> v) {
  uint32_t bits = 0;
  std::memcpy(&bits, kept + i / 8, (kBlock<T> + 7) / 8);
  if constexpr (kBlock<T> < 8) bits >>= i % 8;
  return only_lanes<T>(bits, v);
}

template <class T, class A>
inline void prefetch_block(const A* p) {
  for (size_t b = 0; b < kBlock<T> * sizeof(A); b += 64)
    prefetch_line_into_l2(reinterpret_cast<const char*>(p) + b);
}

// Calls f(Type<T>, Type<R>, Type<S>) with the types of input, residual and sum.
template <class F>
inline void with_row_types(const RowNormShape& shape, F f) {
  with_type<Half, BFloat16>(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      const auto with_residual = [&](auto residual_type) {
        if (shape.sum_dtype == DType::Float)
          f(type, residual_type, Type<float>());
        else
          f(type, residual_type, type);
      };
      if (shape.residual_dtype == DType::Float)
        with_residual(Type<float>());
      else
        with_residual(type);
    } else {
      f(type, type, type);
    }
  });
}

// residual + factor * dropout(input) of a row, rounded to S: into `values`, in the order of T's
// lanes with zeros behind them, into `sum` unless it is null, and into take(block).
template <class T, class R, class S, class Take, class Fold>
inline void gather(const RowNormShape& shape, const RowSum& addends, int64_t row,
                   const KeptElements& keep, uint8_t* kept, S* sum, bool past_caches,
                   ScalarFor<T>* values, Take take, Fold fold) {
  using V = VecFor<T>;
  const int64_t width = shape.width, at = row * width;
  const auto factor = factor_of<ScalarFor<T>>(addends, row);
  const T* const input = factor == 0 ? nullptr : static_cast<const T*>(addends.input) + at;
  const R* const residual =
      addends.residual ? static_cast<const R*>(addends.residual) + at : nullptr;
  const bool drops = addends.dropout.seed && input;
  for_each_strip(width, [&](int64_t begin, int64_t end) {
    if (drops) keep(at + begin, end - begin, kept);
    for_each_block<T>(
        begin, end,
        [&](int64_t i, auto count) {
          Pair<V> v = {};
          if (residual) v = load_as<T>(residual + i, count);
          if (input) {
            const Pair<V> x = load_block(input + i, count);
            if (drops)
              v = v + only_kept<T>(kept, i - begin, x * factor);
            else
              v = v + x * factor;
          }
          v = store_rounded<T>(sum ? sum + i : nullptr, v, count, past_caches);
          store_pair(values + i, v);
          take(v);
        },
        fold);
  });
}

// Prefetches the addends of a later row, block by block, while one is swept in the caches.
template <class T, class R>
struct LaterRow {
  RowSum addends;
  int64_t at;  // of its first element; negative if there is none

  void prefetch(int64_t i) const {
    if (at < 0) return;
    prefetch_block<T>(static_cast<const T*>(addends.input) + at + i);
    if (addends.residual) prefetch_block<T>(static_cast<const R*>(addends.residual) + at + i);
  }
};
