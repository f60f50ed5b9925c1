// Vectors of one instruction set, through the compilers' vector extensions: the same source for
// AVX-512, AVX2 and the baseline. Include after setting GRADFUSE_VEC_BYTES, inside the anonymous
// namespace of that instruction set's file; every function here is compiled for that set.

constexpr int kFloats = GRADFUSE_VEC_BYTES / 4;
constexpr int kDoubles = GRADFUSE_VEC_BYTES / 8;

typedef float FloatVec __attribute__((vector_size(GRADFUSE_VEC_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(GRADFUSE_VEC_BYTES)));
typedef uint32_t UIntVec __attribute__((vector_size(GRADFUSE_VEC_BYTES)));
typedef double DoubleVec __attribute__((vector_size(GRADFUSE_VEC_BYTES)));
typedef int64_t LongVec __attribute__((vector_size(GRADFUSE_VEC_BYTES)));
typedef float HalfWidthFloats __attribute__((vector_size(GRADFUSE_VEC_BYTES / 2)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class V>
inline V load_bytes(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Kernels work on pairs of vectors: load_pair reads 2 * Lanes<T>::count elements, in any fixed
// order, and store_pair puts them back in the same order. So a 32-bit word of two 16-bit values
// splits into its low and its high half without a shuffle.
template <class V>
struct Pair {
  V a, b;
};

inline Pair<FloatVec> load_pair(const float* p) {
  return {load_bytes<FloatVec>(p), load_bytes<FloatVec>(p + kFloats)};
}
inline Pair<DoubleVec> load_pair(const double* p) {
  return {load_bytes<DoubleVec>(p), load_bytes<DoubleVec>(p + kDoubles)};
}
// A vector at a time: GCC copies the pair in pieces of 8 and 16 bytes, through memory.
inline void store_pair(float* p, Pair<FloatVec> v) {
  std::memcpy(p, &v.a, sizeof(v.a));
  std::memcpy(p + kFloats, &v.b, sizeof(v.b));
}
inline void store_pair(double* p, Pair<DoubleVec> v) {
  std::memcpy(p, &v.a, sizeof(v.a));
  std::memcpy(p + kDoubles, &v.b, sizeof(v.b));
}

inline Pair<FloatVec> load_pair(const BFloat16* p) {
  const UIntVec words = load_bytes<UIntVec>(p);
  return {bit_cast<FloatVec>(words << 16), bit_cast<FloatVec>(words & 0xffff0000u)};
}
// binary32 -> bfloat16 in the high half of each word, to nearest even; every NaN becomes the quiet
// 0x7fc0, as in torch.
inline UIntVec round_to_bfloat16(FloatVec v) {
  const UIntVec bits = bit_cast<UIntVec>(v);
  const UIntVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const UIntVec nan = UIntVec{} + 0x7fc00000u;
  return (v != v) ? nan : rounded;
}
inline UIntVec words_of(const BFloat16*, Pair<FloatVec> v) {
  return (round_to_bfloat16(v.a) >> 16) | (round_to_bfloat16(v.b) & 0xffff0000u);
}

#if GRADFUSE_VEC_BYTES == 64
inline Pair<FloatVec> load_pair(const Half* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {(FloatVec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(q)),
          (FloatVec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(q + 1))};
}
inline UIntVec words_of(const Half*, Pair<FloatVec> v) {
  const __m256i a = _mm512_maskz_cvtps_ph(0xffff, (__m512)v.a, _MM_FROUND_TO_NEAREST_INT);
  const __m256i b = _mm512_maskz_cvtps_ph(0xffff, (__m512)v.b, _MM_FROUND_TO_NEAREST_INT);
  return (UIntVec)_mm512_maskz_inserti64x4(
      0xff, _mm512_maskz_inserti64x4(0xff, (__m512i)UIntVec{}, a, 0), b, 1);
}
#elif GRADFUSE_VEC_BYTES == 32
inline Pair<FloatVec> load_pair(const Half* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {(FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(q)),
          (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline UIntVec words_of(const Half*, Pair<FloatVec> v) {
  return (UIntVec)_mm256_set_m128i(_mm256_cvtps_ph((__m256)v.b, _MM_FROUND_TO_NEAREST_INT),
                                   _mm256_cvtps_ph((__m256)v.a, _MM_FROUND_TO_NEAREST_INT));
}
#else
// binary16 -> binary32: shift the fields into place and let one multiplication rebias the
// exponent, which also normalises subnormals; an all-ones exponent is set by hand.
inline FloatVec half_to_float(UIntVec h) {
  const UIntVec magnitude = (h & 0x7fffu) << 13;
  const FloatVec scaled = bit_cast<FloatVec>(magnitude) * 0x1p112f;
  const UIntVec special = magnitude | 0x7f800000u;
  const UIntVec bits = (magnitude >= (0x7c00u << 13)) ? special : bit_cast<UIntVec>(scaled);
  return bit_cast<FloatVec>(bits | ((h & 0x8000u) << 16));
}
// binary32 -> binary16, to nearest even. A normal result is rounded on its bits; a subnormal one by
// adding 0.5, whose last place is binary16's smallest subnormal.
inline UIntVec float_to_half(FloatVec v) {
  const UIntVec bits = bit_cast<UIntVec>(v);
  const UIntVec sign = bits & 0x80000000u;
  const UIntVec magnitude = bits ^ sign;
  const UIntVec odd = (magnitude >> 13) & 1u;
  const UIntVec normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  const UIntVec half = UIntVec{} + 0x3f000000u;
  const UIntVec subnormal =
      bit_cast<UIntVec>(bit_cast<FloatVec>(magnitude) + bit_cast<FloatVec>(half)) - half;
  const UIntVec infinity = UIntVec{} + 0x7c00u;
  const UIntVec nan = UIntVec{} + 0x7e00u;
  UIntVec h = (magnitude < (113u << 23)) ? subnormal : normal;
  h = (magnitude >= 0x477ff000u) ? infinity : h;
  h = (magnitude > 0x7f800000u) ? nan : h;
  return h | (sign >> 16);
}
inline Pair<FloatVec> load_pair(const Half* p) {
  const UIntVec words = load_bytes<UIntVec>(p);
  return {half_to_float(words & 0xffffu), half_to_float(words >> 16)};
}
inline UIntVec words_of(const Half*, Pair<FloatVec> v) {
  return float_to_half(v.a) | (float_to_half(v.b) << 16);
}
#endif

template <class T>
inline void store_pair(T* p, Pair<FloatVec> v) {
  const UIntVec words = words_of(p, v);
  std::memcpy(p, &words, sizeof(words));
}

// Stores past the caches: no line is read first, and none is evicted. p is aligned to a vector.
inline void stream_words(void* p, UIntVec v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, static_cast<UIntVec*>(p));
#elif GRADFUSE_VEC_BYTES == 64
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif GRADFUSE_VEC_BYTES == 32
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  std::memcpy(p, &v, sizeof(v));
#endif
}
// Other threads see what was streamed before this.
inline void wait_for_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
template <class T, class V>
inline void stream_pair(T* p, Pair<V> v) {
  if constexpr (sizeof(T) == 2) {
    stream_words(p, words_of(p, v));
  } else {
    stream_words(p, bit_cast<UIntVec>(v.a));
    stream_words(p + sizeof(V) / sizeof(T), bit_cast<UIntVec>(v.b));
  }
}

template <class E, size_t kBytes>
struct VecOf {
  typedef E type __attribute__((vector_size(kBytes)));
};
template <class V>
using HalfOf = typename VecOf<std::decay_t<decltype(V{}[0])>, sizeof(V) / 2>::type;

// Halves of a vector and their concatenation, as register shuffles. GCC 11 has only the way through
// memory, which stalls on store forwarding.
template <class V, size_t... I>
inline auto low_half(V v, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, static_cast<int>(I)...);
#else
  return load_bytes<HalfOf<V> >(&v);
#endif
}
template <class V, size_t... I>
inline auto high_half(V v, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, static_cast<int>(I + sizeof...(I))...);
#else
  return load_bytes<HalfOf<V> >(reinterpret_cast<const char*>(&v) + sizeof(V) / 2);
#endif
}
template <size_t... I>
inline FloatVec concat(HalfWidthFloats low, HalfWidthFloats high, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(low, high, static_cast<int>(I)...);
#else
  const HalfWidthFloats halves[2] = {low, high};
  return load_bytes<FloatVec>(halves);
#endif
}

inline Pair<DoubleVec> widen(FloatVec v) {
  constexpr std::make_index_sequence<kDoubles> half;
#if GRADFUSE_VEC_BYTES == 64  // GCC 12 converts a quarter at a time
  return {(DoubleVec)_mm512_maskz_cvtps_pd(0xff, (__m256)low_half(v, half)),
          (DoubleVec)_mm512_maskz_cvtps_pd(0xff, (__m256)high_half(v, half))};
#else
  return {__builtin_convertvector(low_half(v, half), DoubleVec),
          __builtin_convertvector(high_half(v, half), DoubleVec)};
#endif
}
inline FloatVec narrow(Pair<DoubleVec> v) {
  return concat(__builtin_convertvector(v.a, HalfWidthFloats),
                __builtin_convertvector(v.b, HalfWidthFloats), std::make_index_sequence<kFloats>());
}

// Reduces a vector in a fixed order: op applied to its halves until two lanes are left.
template <class V, class Op>
inline auto reduce_lanes(V v, Op op) {
  constexpr size_t lanes = sizeof(V) / sizeof(v[0]);
  if constexpr (lanes == 2) {
    return op(v[0], v[1]);
  } else {
    constexpr std::make_index_sequence<lanes / 2> half;
    return reduce_lanes(op(low_half(v, half), high_half(v, half)), op);
  }
}

inline double lane_sum(DoubleVec v) {
  return reduce_lanes(v, [](auto a, auto b) { return a + b; });
}
inline double lane_sum(FloatVec v) {
  const Pair<DoubleVec> wide = widen(v);
  return lane_sum(wide.a + wide.b);
}
inline int64_t lane_sum(IntVec v) {
  return reduce_lanes(v, [](auto a, auto b) { return a + b; });
}
inline int64_t lane_sum(LongVec v) {
  return reduce_lanes(v, [](auto a, auto b) { return a + b; });
}
inline int32_t lane_max(IntVec v) {
  return reduce_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}
inline int64_t lane_max(LongVec v) {
  return reduce_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

// What T is computed in: the vector, the integer vector of that width, the lane count.
template <class T>
struct Lanes {
  using Vec = FloatVec;
  using Bits = IntVec;
  static constexpr int count = kFloats;
  static constexpr int32_t magnitude = 0x7fffffff;
  static constexpr int32_t infinity = 0x7f800000;
};
template <>
struct Lanes<double> {
  using Vec = DoubleVec;
  using Bits = LongVec;
  static constexpr int count = kDoubles;
  static constexpr int64_t magnitude = 0x7fffffffffffffff;
  static constexpr int64_t infinity = 0x7ff0000000000000;
};
