// Vectors of consecutive elements, for kernels that care which element is in which lane: loads and
// stores in memory order, partial ones at the end of a run. Include after vec.h, in the same
// namespace.

typedef uint16_t ShortVec __attribute__((vector_size(GRADFUSE_VEC_BYTES / 2)));

inline FloatVec load(const float* p) { return load_bytes<FloatVec>(p); }
inline DoubleVec load(const double* p) { return load_bytes<DoubleVec>(p); }
inline void store(float* p, FloatVec v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, DoubleVec v) { std::memcpy(p, &v, sizeof(v)); }

// GCC 12 widens ShortVec by halves of a vector, with four instructions more.
inline UIntVec widen(ShortVec v) {
#if GRADFUSE_VEC_BYTES == 64
  return (UIntVec)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif GRADFUSE_VEC_BYTES == 32
  return (UIntVec)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, UIntVec);
#endif
}
inline FloatVec load(const BFloat16* p) {
  return bit_cast<FloatVec>(widen(load_bytes<ShortVec>(p)) << 16);
}
inline void store(BFloat16* p, FloatVec v) {
  const ShortVec bits = __builtin_convertvector(round_to_bfloat16(v) >> 16, ShortVec);
  std::memcpy(p, &bits, sizeof(bits));
}

#if GRADFUSE_VEC_BYTES == 64
inline FloatVec load(const Half* p) {
  return (FloatVec)_mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(p));
}
inline void store(Half* p, FloatVec v) {
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &bits, sizeof(bits));
}
#elif GRADFUSE_VEC_BYTES == 32
inline FloatVec load(const Half* p) { return (FloatVec)_mm256_cvtph_ps(load_bytes<__m128i>(p)); }
inline void store(Half* p, FloatVec v) {
  const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &bits, sizeof(bits));
}
#else
inline FloatVec load(const Half* p) { return half_to_float(widen(load_bytes<ShortVec>(p))); }
inline void store(Half* p, FloatVec v) {
  const ShortVec bits = __builtin_convertvector(float_to_half(v), ShortVec);
  std::memcpy(p, &bits, sizeof(bits));
}
#endif

// The value that a 16-bit T holds after v is stored in it.
template <class T>
inline FloatVec rounded_to(FloatVec v) {
  ShortVec bits;
  store(reinterpret_cast<T*>(&bits), v);
  return load(reinterpret_cast<const T*>(&bits));
}

#if GRADFUSE_VEC_BYTES == 32
// The first n lanes are -1, the others 0.
template <class I>
inline __m256i first_lanes(int64_t n) {
  alignas(32) static constexpr I kLanes[64 / sizeof(I)] = {-1,
                                                           -1,
                                                           -1,
                                                           -1,
                                                           sizeof(I) == 4 ? -1 : 0,
                                                           sizeof(I) == 4 ? -1 : 0,
                                                           sizeof(I) == 4 ? -1 : 0,
                                                           sizeof(I) == 4 ? -1 : 0};
  return load_bytes<__m256i>(kLanes + 32 / sizeof(I) - n);
}
// The first n of up to 8 16-bit elements, then zeros. Built in integer registers: a vector load
// from memory that was just written by narrower stores stalls.
inline __m128i load_first_16(const void* p, int64_t n) {
  const char* const at = static_cast<const char*>(p);
  const int64_t bytes = 2 * n;
  if (bytes >= 8) {
    const uint64_t low = load_bytes<uint64_t>(at), last = load_bytes<uint64_t>(at + bytes - 8);
    return _mm_set_epi64x(bytes == 8 ? 0 : static_cast<int64_t>(last >> (8 * (16 - bytes))),
                          static_cast<int64_t>(low));
  }
  uint64_t low = load_bytes<uint16_t>(at);
  if (bytes >= 4)
    low = load_bytes<uint32_t>(at) | static_cast<uint64_t>(load_bytes<uint32_t>(at + bytes - 4))
                                         << (8 * (bytes - 4));
  return _mm_cvtsi64_si128(static_cast<int64_t>(low));
}
// Writes the first n 16-bit elements of a vector in at most three stores.
inline void store_first_16(void* p, __m128i v, int64_t n) {
  char* at = static_cast<char*>(p);
  uint64_t rest = static_cast<uint64_t>(_mm_cvtsi128_si64(v));
  if (n & 4) {
    std::memcpy(at, &rest, 8);
    at += 8;
    rest = static_cast<uint64_t>(_mm_extract_epi64(v, 1));
  }
  if (n & 2) {
    std::memcpy(at, &rest, 4);
    at += 4;
    rest >>= 32;
  }
  if (n & 1) std::memcpy(at, &rest, 2);
}
#endif

// The first n elements, 0 < n < lanes; the other lanes are 0. Touches no memory after them.
template <class T>
inline auto load_first(const T* p, int64_t n) {
#if GRADFUSE_VEC_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    return (FloatVec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  } else if constexpr (std::is_same_v<T, double>) {
    return (DoubleVec)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
    return load(reinterpret_cast<const T*>(&bits));
  }
#elif GRADFUSE_VEC_BYTES == 32
  if constexpr (std::is_same_v<T, float>) {
    return (FloatVec)_mm256_maskload_ps(p, first_lanes<int32_t>(n));
  } else if constexpr (std::is_same_v<T, double>) {
    return (DoubleVec)_mm256_maskload_pd(p, first_lanes<int64_t>(n));
  } else {
    const __m128i bits = load_first_16(p, n);
    return load(reinterpret_cast<const T*>(&bits));
  }
#else
  alignas(GRADFUSE_VEC_BYTES) T padded[Lanes<T>::count] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
#endif
}
template <class T, class V>
inline void store_first(T* p, V v, int64_t n) {
#if GRADFUSE_VEC_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
  } else {
    __m256i bits;
    store(reinterpret_cast<T*>(&bits), v);
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bits);
  }
#elif GRADFUSE_VEC_BYTES == 32
  if constexpr (std::is_same_v<T, float>) {
    _mm256_maskstore_ps(p, first_lanes<int32_t>(n), (__m256)v);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm256_maskstore_pd(p, first_lanes<int64_t>(n), (__m256d)v);
  } else {
    __m128i bits;
    store(reinterpret_cast<T*>(&bits), v);
    store_first_16(p, bits, n);
  }
#else
  alignas(GRADFUSE_VEC_BYTES) T padded[Lanes<T>::count];
  store(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
#endif
}

template <class V>
struct IntsOf;
template <>
struct IntsOf<FloatVec> {
  using type = IntVec;
  using unsigned_type = UIntVec;
};
template <>
struct IntsOf<DoubleVec> {
  using type = LongVec;
  typedef uint64_t unsigned_type __attribute__((vector_size(GRADFUSE_VEC_BYTES)));
};

// 0, 1, 2, ... by lane.
template <class I, size_t... kLane>
inline I lane_numbers(std::index_sequence<kLane...>) {
  return I{static_cast<std::decay_t<decltype(I{}[0])>>(kLane)...};
}
template <class I>
inline I lane_numbers() {
  return lane_numbers<I>(std::make_index_sequence<sizeof(I) / sizeof(I{}[0])>());
}
