// Random bits of many elements at once. Include after vec_blocks.h, in the same namespace.

typedef uint64_t ULongVec __attribute__((vector_size(GRADFUSE_VEC_BYTES)));

// The products of the lower halves of the lanes.
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

// Lanes 0, 2, ... of two vectors alternately; lanes 1, 3, ...
template <int kFrom, size_t... I>
inline UIntVec every_second(ULongVec a, ULongVec b, std::index_sequence<I...>) {
#if defined(__clang__)
  return (UIntVec)__builtin_shufflevector(a, b, (I % 2 * kDoubles + I / 2 * 2 + kFrom)...);
#else
  return (UIntVec)__builtin_shuffle(a, b, LongVec{(I % 2 * kDoubles + I / 2 * 2 + kFrom)...});
#endif
}

// Elements of a group: a vector of 64-bit lanes computes as many of Philox's blocks at once, each
// word in the lower half of a lane.
constexpr int kRandomGroup = 4 * kDoubles;

// The blocks of the elements that begin with block `first`, for kGroups groups at once, because each
// round waits for the one before. Calls use(group, word i of each element in lane i, the others).
template <int kGroups, class Use>
inline void random_groups(RandomStream stream, uint64_t first, Use use) {
  // Every second lane holds the blocks of the first half: so the words come out in order.
  const ULongVec lanes = lane_numbers<ULongVec>();
  const ULongVec block = (lanes & 1) * (kDoubles / 2) + (lanes >> 1);
  ULongVec c[kGroups][4];
  for (int g = 0; g < kGroups; ++g) {
    c[g][0] = block + (first + static_cast<uint64_t>(g) * kDoubles);
    c[g][1] = c[g][0] >> 32;
    c[g][2] = ULongVec{} + stream.offset;
    c[g][3] = c[g][2] >> 32;
  }
  uint32_t low = static_cast<uint32_t>(stream.key), high = static_cast<uint32_t>(stream.key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int g = 0; g < kGroups; ++g) {
      const ULongVec a = product_of_low_halves(c[g][0], ULongVec{} + kPhiloxFirst);
      const ULongVec b = product_of_low_halves(c[g][2], ULongVec{} + kPhiloxSecond);
      c[g][0] = (b >> 32) ^ c[g][1] ^ (ULongVec{} + low);
      c[g][1] = b;
      c[g][2] = (a >> 32) ^ c[g][3] ^ (ULongVec{} + high);
      c[g][3] = a;
    }
    low += kPhiloxLow;
    high += kPhiloxHigh;
  }
  constexpr std::make_index_sequence<kDoubles> pairs;
  for (int g = 0; g < kGroups; ++g) {
    const ULongVec words = (c[g][0] & 0xffffffffu) | (c[g][1] << 32);
    const ULongVec others = (c[g][2] & 0xffffffffu) | (c[g][3] << 32);
    use(g, every_second<0>(words, others, pairs), every_second<1>(words, others, pairs));
  }
}

// Whether each of n elements from element `first` on stays, as bit i % 8 of byte i / 8. Writes up to
// kKeptPadding bytes more than n / 8.
constexpr int64_t kKeptPadding = 32;
inline void kept_elements(const Dropout& dropout, int64_t first, int64_t n, uint8_t* bits) {
  const RandomStream stream = random_stream(dropout.seed);
  const UIntVec threshold = UIntVec{} + dropout.threshold;
  constexpr int kGroups = 4;
  using Group = std::conditional_t<kRandomGroup == 32, uint32_t,
                                   std::conditional_t<kRandomGroup == 16, uint16_t, uint8_t>>;
  const int shift = static_cast<int>(first % 4);
  Group groups[kGroups];
  uint8_t* out = bits;
  for (int64_t at = first / 4 * 4, end = first + n; at < end; at += kGroups * kRandomGroup) {
    random_groups<kGroups>(stream, static_cast<uint64_t>(at / 4),
                           [&](int g, UIntVec low, UIntVec high) {
                             groups[g] = static_cast<Group>(
                                 bits_of<FloatVec>((IntVec)(low >= threshold)) |
                                 bits_of<FloatVec>((IntVec)(high >= threshold)) << kFloats);
                           });
    std::memcpy(out, groups, sizeof(groups));
    out += sizeof(groups);
  }
  if (!shift) return;
  // The bits of the elements before the first are shifted out.
  for (uint8_t* p = bits; p < out; ++p) {
    const unsigned next = p + 1 < out ? p[1] : 0u;
    *p = static_cast<uint8_t>((*p | next << 8) >> shift);
  }
}
