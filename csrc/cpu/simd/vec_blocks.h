// Blocks: the elements of a pair of vectors, for kernels that care which element is in which lane.
// Loads and stores of the first elements of a block, arithmetic of pairs, bits of a mask. Include
// after vec_io.h, in the same namespace.

template <class T>
using VecFor = typename Lanes<T>::Vec;
template <class T>
using ScalarFor = std::decay_t<decltype(VecFor<T>{}[0])>;

template <class T>
constexpr int64_t kBlock = 2 * Lanes<T>::count;

// Whether load_pair puts elements 0, 2, ... into the first vector and 1, 3, ... into the second;
// else the first half and the second.
template <class T>
constexpr bool kAlternates =
    std::is_same_v<T, BFloat16> || (std::is_same_v<T, Half> && GRADFUSE_VEC_BYTES == 16);

template <class V>
inline Pair<V> operator+(Pair<V> x, Pair<V> y) {
  return {x.a + y.a, x.b + y.b};
}
template <class V>
inline Pair<V> operator-(Pair<V> x, Pair<V> y) {
  return {x.a - y.a, x.b - y.b};
}
template <class V>
inline Pair<V> operator*(Pair<V> x, Pair<V> y) {
  return {x.a * y.a, x.b * y.b};
}
template <class V>
inline Pair<V> operator*(Pair<V> x, std::decay_t<decltype(V{}[0])> y) {
  return {x.a * y, x.b * y};
}
template <class I, class V>
inline Pair<V> select(Pair<I> lanes, Pair<V> x, Pair<V> y) {
  return {lanes.a ? x.a : y.a, lanes.b ? x.b : y.b};
}
template <class V, class F>
inline auto each_half(Pair<V> v, F f) {
  return Pair<decltype(f(v.a))>{f(v.a), f(v.b)};
}

// The element of a block in each lane.
template <class T>
inline auto element_numbers() {
  using U = typename IntsOf<VecFor<T>>::unsigned_type;
  const U lanes = lane_numbers<U>();
  if constexpr (kAlternates<T>)
    return Pair<U>{lanes * 2, lanes * 2 + 1};
  else
    return Pair<U>{lanes, lanes + Lanes<T>::count};
}
// Lane mask of the first n elements of a block.
template <class T>
inline auto first_elements(int64_t n) {
  using U = typename IntsOf<VecFor<T>>::unsigned_type;
  return each_half(element_numbers<T>(), [=](U number) {
    return number < (U{} + static_cast<std::decay_t<decltype(U{}[0])>>(n));
  });
}

// 0 < n < kBlock<T>. Touches no memory after the first n elements; the others are 0.
#if GRADFUSE_VEC_BYTES == 64
inline UIntVec load_words_first(const void* p, int64_t n) {
  return (UIntVec)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
}
inline void store_words_first(void* p, UIntVec words, int64_t n) {
  _mm512_mask_storeu_epi16(p, static_cast<__mmask32>((uint64_t{1} << n) - 1), (__m512i)words);
}
#elif GRADFUSE_VEC_BYTES == 32
inline UIntVec load_words_first(const void* p, int64_t n) {
  if (n <= 8) return (UIntVec)_mm256_zextsi128_si256(load_first_16(p, n));
  return (UIntVec)_mm256_inserti128_si256(_mm256_castsi128_si256(load_bytes<__m128i>(p)),
                                          load_first_16(static_cast<const char*>(p) + 16, n - 8),
                                          1);
}
inline void store_words_first(void* p, UIntVec words, int64_t n) {
  const __m128i low = _mm256_castsi256_si128((__m256i)words);
  if (n < 8) return store_first_16(p, low, n);
  std::memcpy(p, &low, 16);
  if (n > 8)
    store_first_16(static_cast<char*>(p) + 16, _mm256_extracti128_si256((__m256i)words, 1), n - 8);
}
#else
inline UIntVec load_words_first(const void* p, int64_t n) {
  uint16_t words[GRADFUSE_VEC_BYTES / 2] = {};
  for (int64_t i = 0; i < n; ++i) words[i] = static_cast<const uint16_t*>(p)[i];
  return load_bytes<UIntVec>(words);
}
inline void store_words_first(void* p, UIntVec words, int64_t n) {
  uint16_t elements[GRADFUSE_VEC_BYTES / 2];
  std::memcpy(elements, &words, sizeof(words));
  for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(p)[i] = elements[i];
}
#endif

template <class T>
inline Pair<VecFor<T>> load_pair_first(const T* p, int64_t n) {
  constexpr int64_t kLanes = Lanes<T>::count;
  if constexpr (sizeof(T) == 2) {
    const UIntVec words = load_words_first(p, n);
    return load_pair(reinterpret_cast<const T*>(&words));
  } else {
    Pair<VecFor<T>> v = {};
    if (n < kLanes) {
      v.a = load_first(p, n);
    } else {
      v.a = load(p);
      if (n > kLanes) v.b = load_first(p + kLanes, n - kLanes);
    }
    return v;
  }
}
template <class T>
inline void store_pair_first(T* p, Pair<VecFor<T>> v, int64_t n) {
  constexpr int64_t kLanes = Lanes<T>::count;
  if constexpr (sizeof(T) == 2) {
    UIntVec words;
    store_pair(reinterpret_cast<T*>(&words), v);
    store_words_first(p, words, n);
  } else if (n < kLanes) {
    store_first(p, v.a, n);
  } else {
    store(p, v.a);
    if (n > kLanes) store_first(p + kLanes, v.b, n - kLanes);
  }
}

// kBlock<T> consecutive numbers of the compute type, by the lanes of a block of T, and back.
#if defined(__clang__)
template <class V, size_t... I>
inline Pair<V> alternate(V low, V high, std::index_sequence<I...>) {
  return {__builtin_shufflevector(low, high, (2 * I)...),
          __builtin_shufflevector(low, high, (2 * I + 1)...)};
}
template <class V, size_t... I>
inline Pair<V> interleaved(V even, V odd, std::index_sequence<I...>) {
  constexpr size_t n = sizeof...(I);
  return {__builtin_shufflevector(even, odd, (I / 2 + I % 2 * n)...),
          __builtin_shufflevector(even, odd, (n / 2 + I / 2 + I % 2 * n)...)};
}
#else
template <class V, size_t... I>
inline Pair<V> alternate(V low, V high, std::index_sequence<I...>) {
  using Index = typename IntsOf<V>::type;
  return {__builtin_shuffle(low, high, Index{(2 * I)...}),
          __builtin_shuffle(low, high, Index{(2 * I + 1)...})};
}
template <class V, size_t... I>
inline Pair<V> interleaved(V even, V odd, std::index_sequence<I...>) {
  using Index = typename IntsOf<V>::type;
  constexpr size_t n = sizeof...(I);
  return {__builtin_shuffle(even, odd, Index{(I / 2 + I % 2 * n)...}),
          __builtin_shuffle(even, odd, Index{(n / 2 + I / 2 + I % 2 * n)...})};
}
#endif
template <class T>
inline Pair<VecFor<T>> in_lane_order(Pair<VecFor<T>> v) {
  if constexpr (kAlternates<T>)
    return alternate(v.a, v.b, std::make_index_sequence<Lanes<T>::count>());
  else
    return v;
}
template <class T>
inline Pair<VecFor<T>> load_floats_of_block(const ScalarFor<T>* p) {
  return in_lane_order<T>(load_pair(p));
}
template <class T>
inline Pair<VecFor<T>> in_memory_order(Pair<VecFor<T>> v) {
  if constexpr (kAlternates<T>)
    return interleaved(v.a, v.b, std::make_index_sequence<Lanes<T>::count>());
  else
    return v;
}
template <class T>
inline void in_element_order(double* p) {
  if constexpr (kAlternates<T>) {
    constexpr int64_t kLanes = Lanes<T>::count;
    double of_lanes[2 * kLanes];
    std::memcpy(of_lanes, p, sizeof(of_lanes));
    for (int64_t i = 0; i < kLanes; ++i)
      p[2 * i] = of_lanes[i], p[2 * i + 1] = of_lanes[kLanes + i];
  }
}

// A lane mask of a vector as the low bits of an integer.
template <class V>
inline uint32_t bits_of(typename IntsOf<V>::type lanes) {
#if GRADFUSE_VEC_BYTES == 64
  if constexpr (std::is_same_v<V, FloatVec>)
    return _mm512_movepi32_mask((__m512i)lanes);
  else
    return _mm512_movepi64_mask((__m512i)lanes);
#elif GRADFUSE_VEC_BYTES == 32
  if constexpr (std::is_same_v<V, FloatVec>)
    return _mm256_movemask_ps((__m256)lanes);
  else
    return _mm256_movemask_pd((__m256d)lanes);
#else
  uint32_t bits = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof(V{}[0]); ++i) bits |= (lanes[i] & 1u) << i;
  return bits;
#endif
}
// A lane mask of a block, bit i for element i, and back.
template <class T>
inline uint32_t bits_of_block(Pair<typename IntsOf<VecFor<T>>::type> lanes) {
  if constexpr (kAlternates<T>) {
    const UIntVec words = (bit_cast<UIntVec>(lanes.a) >> 16) | (bit_cast<UIntVec>(lanes.b) << 16);
#if GRADFUSE_VEC_BYTES == 64
    return _mm512_movepi16_mask((__m512i)words);
#elif GRADFUSE_VEC_BYTES == 32
    const uint32_t bits = static_cast<uint32_t>(
        _mm256_movemask_epi8(_mm256_packs_epi16((__m256i)words, _mm256_setzero_si256())));
    return (bits & 0xffu) | (bits >> 8);
#else
    uint32_t bits = 0;
    for (int i = 0; i < kFloats; ++i)
      bits |= (words[i] & 1u) << (2 * i) | (words[i] >> 31) << (2 * i + 1);
    return bits;
#endif
  } else {
    return bits_of<VecFor<T>>(lanes.a) | bits_of<VecFor<T>>(lanes.b) << Lanes<T>::count;
  }
}
template <class T>
inline auto lanes_of_block(uint32_t bits) {
  using U = typename IntsOf<VecFor<T>>::unsigned_type;
  return each_half(element_numbers<T>(),
                   [=](U number) { return ((U{} + bits) & ((U{} + 1) << number)) != 0; });
}
// A block with zeros in the lanes of elements whose bit is 0.
template <class T>
inline Pair<VecFor<T>> only_lanes(uint32_t bits, Pair<VecFor<T>> v) {
#if GRADFUSE_VEC_BYTES == 64
  if constexpr (std::is_same_v<T, double>) {
    return {(DoubleVec)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), (__m512d)v.a),
            (DoubleVec)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits >> 8), (__m512d)v.b)};
  } else if constexpr (!kAlternates<T>) {
    return {(FloatVec)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v.a),
            (FloatVec)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> 16), (__m512)v.b)};
  } else {
    const auto tested = [=](UIntVec number) {
      return _mm512_test_epi32_mask((__m512i)(UIntVec{} + bits),
                                    (__m512i)((UIntVec{} + 1) << number));
    };
    const auto numbers = element_numbers<T>();
    return {(FloatVec)_mm512_maskz_mov_ps(tested(numbers.a), (__m512)v.a),
            (FloatVec)_mm512_maskz_mov_ps(tested(numbers.b), (__m512)v.b)};
  }
#else
  return select(lanes_of_block<T>(bits), v, Pair<VecFor<T>>{});
#endif
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }  // std::min is a template
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// All blocks of a run but the last are whole; a type of their own spares them the element count.
template <class T>
struct Whole {
  static constexpr int64_t elements = kBlock<T>;
};
struct Some {
  int64_t elements;
};

template <class T>
inline Pair<VecFor<T>> load_block(const T* p, Whole<T>) {
  return load_pair(p);
}
template <class T>
inline Pair<VecFor<T>> load_block(const T* p, Some count) {
  return load_pair_first(p, count.elements);
}
template <class T>
inline void store_block(T* p, Pair<VecFor<T>> v, Whole<T>, bool past_caches) {
  if (past_caches)
    stream_pair(p, v);
  else
    store_pair(p, v);
}
template <class T>
inline void store_block(T* p, Pair<VecFor<T>> v, Some count, bool) {
  store_pair_first(p, v, count.elements);
}
// The block with zeros in the lanes beyond the count.
template <class T, class V>
inline Pair<V> only_elements(Pair<V> v, Whole<T>) {
  return v;
}
template <class T, class V>
inline Pair<V> only_elements(Pair<V> v, Some count) {
  return select(first_elements<T>(count.elements), v, Pair<V>{});
}
