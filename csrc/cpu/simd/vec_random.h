// Random bits of many elements at once. Include after vec_blocks.h, in the same namespace.

typedef uint64_t ULongVec __attribute__((vector_size(GRADFUSE_VEC_BYTES)));

// The products of the lanes' lower halves.
inline ULongVec product_of_low_halves(ULongVec a, ULongVec b) {
#if GRADFUSE_VEC_BYTES == 64
  return (ULongVec)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif GRADFUSE_VEC_BYTES == 32
  return (ULongVec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (ULongVec)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Each lane's upper half, as its lower one.
inline ULongVec upper_halves(ULongVec v) {
#if GRADFUSE_VEC_BYTES == 64  // Zen 4 shuffles faster than it shifts
  return (ULongVec)_mm512_maskz_shuffle_epi32(0xffff, (__m512i)v, _MM_PERM_DDBB);
#else
  return v >> 32;
#endif
}

inline ULongVec exclusive_or(ULongVec a, ULongVec b, ULongVec c) {
#if GRADFUSE_VEC_BYTES == 64
  return (ULongVec)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The lower halves of two vectors' lanes side by side.
inline ULongVec low_halves(ULongVec a, ULongVec b) {
#if GRADFUSE_VEC_BYTES == 64
  return (ULongVec)_mm512_mask_shuffle_epi32((__m512i)a, 0xaaaa, (__m512i)b, _MM_PERM_CAAA);
#else
  return (a & 0xffffffffu) | (b << 32);
#endif
}

// Lanes 0, 2, ... of two vectors in turn; lanes 1, 3, ...
template <int kFrom, size_t... I>
inline ULongVec every_second(ULongVec a, ULongVec b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I % 2 * kDoubles + I / 2 * 2 + kFrom)...);
#else
  return __builtin_shuffle(a, b, LongVec{(I % 2 * kDoubles + I / 2 * 2 + kFrom)...});
#endif
}

// A lane mask of x >= limit for 16-bit numbers in memory order, as the low bits of an integer,
// those of `low` first; and of x == limit.
constexpr int kShorts = GRADFUSE_VEC_BYTES / 2;
struct Comparison {
  uint64_t reaches, equals;
};
inline Comparison compare_shorts(ULongVec low, ULongVec high, uint16_t limit) {
#if GRADFUSE_VEC_BYTES == 64
  const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(limit));
  const auto joined = [](uint64_t a, uint64_t b) { return a | b << kShorts; };
  return {
      joined(_mm512_cmpge_epu16_mask((__m512i)low, t), _mm512_cmpge_epu16_mask((__m512i)high, t)),
      joined(_mm512_cmpeq_epi16_mask((__m512i)low, t), _mm512_cmpeq_epi16_mask((__m512i)high, t))};
#elif GRADFUSE_VEC_BYTES == 32
  const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(limit)), zero = _mm256_setzero_si256();
  const auto joined = [](__m256i a, __m256i b) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
    return uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(bytes))};
  };
  return {joined(_mm256_cmpeq_epi16(_mm256_subs_epu16(t, (__m256i)low), zero),
                 _mm256_cmpeq_epi16(_mm256_subs_epu16(t, (__m256i)high), zero)),
          joined(_mm256_cmpeq_epi16((__m256i)low, t), _mm256_cmpeq_epi16((__m256i)high, t))};
#else
  uint16_t x[2 * kShorts];
  std::memcpy(x, &low, sizeof(low));
  std::memcpy(x + kShorts, &high, sizeof(high));
  Comparison c = {0, 0};
  for (int i = 0; i < 2 * kShorts; ++i) {
    c.reaches |= uint64_t{x[i] >= limit} << i;
    c.equals |= uint64_t{x[i] == limit} << i;
  }
  return c;
#endif
}

// Which elements stay in a dropout, for runs of a tensor's elements.
class KeptElements {
 public:
  // The dropout may have no seed, if the function is not called.
  explicit KeptElements(const Dropout& dropout) : threshold_(dropout.threshold) {
    if (!dropout.seed) return;
    stream_ = random_stream(dropout.seed);
    uint32_t low = static_cast<uint32_t>(stream_.key);
    uint32_t high = static_cast<uint32_t>(stream_.key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      keys_[round][0] = low, keys_[round][1] = high;
      low += kPhiloxLow, high += kPhiloxHigh;
    }
  }

  // Writes bit i % 8 of byte i / 8 for n elements from element `first` on, and up to kPadding bytes
  // behind.
  static constexpr int64_t kPadding = 64;
  void operator()(int64_t first, int64_t n, uint8_t* bits) const {
    const int before = static_cast<int>(first % kDropoutBlock);  // elements of the first block
    uint8_t* out = bits;
    const auto write = [&](auto groups, uint64_t block) {
      constexpr int kGroups = decltype(groups)::value;
      Group kept[kGroups];
      compute<kGroups>(block, kept);
      std::memcpy(out, kept, sizeof(kept));
      out += sizeof(kept);
    };
    int64_t block = first / kDropoutBlock;
    const int64_t end = (first + n + kDropoutBlock - 1) / kDropoutBlock;
    for (; block + 3 * kDoubles < end; block += 4 * kDoubles)
      write(std::integral_constant<int, 4>(), static_cast<uint64_t>(block));
    for (; block < end; block += 2 * kDoubles)
      write(std::integral_constant<int, 2>(), static_cast<uint64_t>(block));
    if (!before) return;
    for (uint8_t* p = bits; p < out; ++p)
      *p = static_cast<uint8_t>((p[0] | (p + 1 < out ? p[1] : 0) << 8) >> before);
  }

 private:
  // A group is the elements of the blocks that a vector of 64-bit lanes computes, each word in the
  // lower half of a lane. Several at once, because each round waits for the one before.
  static constexpr int kGroup = kDropoutBlock * kDoubles;
  using Group = std::conditional_t<kGroup == 64, uint64_t,
                                   std::conditional_t<kGroup == 32, uint32_t, uint16_t>>;

  template <int kGroups>
  inline void compute(uint64_t first, Group* kept) const {
    // Every second lane holds the blocks of the first half: so the words come out in order.
    const ULongVec lanes = lane_numbers<ULongVec>();
    const ULongVec numbers = (lanes & 1) * (kDoubles / 2) + (lanes >> 1);
    ULongVec c[kGroups][4];
    for (int g = 0; g < kGroups; ++g) {
      c[g][0] = numbers + (first + static_cast<uint64_t>(g) * kDoubles);
      c[g][1] = c[g][0] >> 32;
      c[g][2] = ULongVec{} + stream_.offset;
      c[g][3] = c[g][2] >> 32;
    }
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        const ULongVec a = product_of_low_halves(c[g][0], ULongVec{} + kPhiloxFirst);
        const ULongVec b = product_of_low_halves(c[g][2], ULongVec{} + kPhiloxSecond);
        c[g][0] = exclusive_or(upper_halves(b), c[g][1], ULongVec{} + keys_[round][0]);
        c[g][1] = b;
        c[g][2] = exclusive_or(upper_halves(a), c[g][3], ULongVec{} + keys_[round][1]);
        c[g][3] = a;
      }
    }
    constexpr std::make_index_sequence<kDoubles> pairs;
    for (int g = 0; g < kGroups; ++g) {
      const ULongVec words = low_halves(c[g][0], c[g][1]), others = low_halves(c[g][2], c[g][3]);
      const Comparison found =
          compare_shorts(every_second<0>(words, others, pairs),
                         every_second<1>(words, others, pairs), upper_half(threshold_));
      kept[g] = static_cast<Group>(found.reaches);
      if (found.equals && lower_half(threshold_))
        kept[g] = decided(kept[g], found.equals, first + static_cast<uint64_t>(g) * kDoubles);
    }
  }

  // One in 65,536 elements needs its lower half, too.
  __attribute__((noinline)) Group decided(Group kept, uint64_t undecided, uint64_t first) const {
    for (int i = 0; i < kGroup; ++i) {
      if (!(undecided >> i & 1)) continue;
      const bool stays = lower_half_of(stream_, first * kDropoutBlock + static_cast<uint64_t>(i)) >=
                         lower_half(threshold_);
      const Group bit = static_cast<Group>(Group{1} << i);
      kept = static_cast<Group>(stays ? kept | bit : kept & ~bit);
    }
    return kept;
  }

  uint32_t threshold_;
  RandomStream stream_ = {};
  uint64_t keys_[kPhiloxRounds][2];
};
