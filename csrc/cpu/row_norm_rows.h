// Rows of layer norm and RMS norm, block by block: the sum that is normalised, sums over a row.
// Include after simd/vec_random.h, in the same namespace.

// Blocks whose terms are summed in the compute type before they join a float64 sum.
constexpr int64_t kFold = 8;

// Calls body(first element, count) for each block of a row, and fold() after each kFold of them.
template <class T, class Body, class Fold>
inline void for_each_block(int64_t width, Body body, Fold fold) {
  constexpr int64_t kElements = kBlock<T>;
  int64_t i = 0;
  for (; i + kFold * kElements <= width; fold())
    for (int64_t end = i + kFold * kElements; i < end; i += kElements) body(i, Whole<T>());
  for (; i + kElements <= width; i += kElements) body(i, Whole<T>());
  if (i < width) body(i, Some{width - i});
}
template <class T, class Body>
inline void for_each_block(int64_t width, Body body) {
  for_each_block<T>(width, body, [] {});
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
      width,
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
  for_each_block<T>(width, [&](int64_t i, auto) {
    const Pair<VecFor<T>> x = load_pair(v + i);
    for (VecFor<T> part : {x.a, x.b}) {
      part = part < 0 ? -part : part;
      most = part > most ? part : most;
    }
  });
  return reduce_lanes(most, [](auto a, auto b) { return a > b ? a : b; });
}

// Sums of g and of g * h in float64, where those in float32 overflow.
template <class T, bool kCentred>
inline RowMoments wide_gradient_sums(const ScalarFor<T>* h, const ScalarFor<T>* g, int64_t width) {
  RowMoments s = {0.0, 0.0};
  for (int64_t i = 0; i < (width + kBlock<T> - 1) / kBlock<T> * kBlock<T>; ++i) {
    if (kCentred) s.sum += static_cast<double>(g[i]);
    s.squares += static_cast<double>(g[i]) * static_cast<double>(h[i]);
  }
  return s;
}

template <bool kCentred, class V, class F>
inline Pair<V> normalised(Pair<V> v, const RowNormalisation<F>& n) {
  if constexpr (!kCentred) return (v * n.scale) * n.inverse;
  const V mean = V{} + n.mean, offset = V{} + n.offset;
  const Pair<V> d = v * n.scale - Pair<V>{mean, mean};
  return d * n.inverse + Pair<V>{offset, offset};
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

// The value that an A holds after v is stored in it.
template <class A, class V>
inline Pair<V> rounded(Pair<V> v) {
  if constexpr (sizeof(A) > 2) {
    return v;
  } else {
    const UIntVec words = words_of(static_cast<const A*>(nullptr), v);
    return load_pair(reinterpret_cast<const A*>(&words));
  }
}

// What the input of a row is multiplied by; 0 if its sample is left out.
template <class F>
inline F factor_of(const RowSum& addends, int64_t row) {
  double factor = addends.sample_scale ? addends.sample_scale[row / addends.rows_per_sample] : 1.0;
  if (addends.dropout.seed) factor *= addends.dropout.scale;
  return static_cast<F>(factor);
}

// Bits of a block that begins with element i, from those of its row.
template <class T>
inline uint32_t kept_of_block(const uint8_t* kept, int64_t i) {
  uint32_t bits = 0;
  std::memcpy(&bits, kept + i / 8, (kBlock<T> + 7) / 8);
  return bits >> (i % 8);
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
inline void gather(const RowNormShape& shape, const RowSum& addends, int64_t row, uint8_t* kept,
                   S* sum, bool past_caches, ScalarFor<T>* values, Take take, Fold fold) {
  using V = VecFor<T>;
  const int64_t width = shape.width, at = row * width;
  const auto factor = factor_of<ScalarFor<T>>(addends, row);
  const T* const input = factor == 0 ? nullptr : static_cast<const T*>(addends.input) + at;
  const R* const residual =
      addends.residual ? static_cast<const R*>(addends.residual) + at : nullptr;
  const bool drops = addends.dropout.seed && input;
  if (drops) kept_elements(addends.dropout, at, width, kept);
  for_each_block<T>(
      width,
      [&](int64_t i, auto count) {
        Pair<V> v = {};
        if (residual) v = load_as<T>(residual + i, count);
        if (input) {
          Pair<V> x = load_block(input + i, count);
          if (drops) {
            x = select(lanes_of_block<T>(kept_of_block<T>(kept, i)), x * factor, Pair<V>{});
            v = v + x;
          } else {
            v = v + x * factor;
          }
        }
        v = rounded<S>(v);
        if (sum) store_as<T>(sum + i, v, count, past_caches);
        store_pair(values + i, v);
        take(v);
      },
      fold);
}

// Prefetches the addends of the next row, block by block, while this one is swept in the caches.
template <class T, class R>
struct NextRow {
  RowSum addends;
  int64_t at;  // of its first element; negative if there is none

  void prefetch(int64_t i) const {
    if (at < 0) return;
    prefetch_block(static_cast<const T*>(addends.input) + at + i);
    if (addends.residual) prefetch_block(static_cast<const R*>(addends.residual) + at + i);
  }
  template <class A>
  static void prefetch_block(const A* p) {
    for (size_t b = 0; b < kBlock<T> * sizeof(A); b += 64)
      prefetch_line_into_l2(reinterpret_cast<const char*>(p) + b);
  }
};
