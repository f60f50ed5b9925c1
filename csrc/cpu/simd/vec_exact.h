// Sums of float64 without rounding: values are split among levels of 46 bits. Include after vec.h,
// in the same namespace.
//
// How: an accumulator begins at 1.5 * 2^52 units of its level. As long as it stays in [2^52, 2^53]
// units, its last place is one unit, so that t = acc + r rounds r to a multiple of it; t - acc is
// that multiple, and r - (t - acc) what is left for the level below, at most half a unit. All three
// are exact but the first, whose rounding is the split. The lowest unit divides every value, so
// nothing is left there. The bits of acc less those of its beginning are the sum in units.
//
// Why it stays there: a value is at most 2^46 units of the top level, and what is left there at
// most 2^45 units of the next. After 2^5 additions, which move the sum by at most 2^51 units, the
// accumulators are drained into integers.

// 2^exponent, for a normal result.
inline double power(int32_t exponent) {
  return bit_cast<double>(static_cast<int64_t>(exponent + 1023) << 52);
}

constexpr int32_t kLevelBits = 46;
constexpr int64_t kDrainAfter = 32;  // additions to an accumulator
constexpr int32_t kMostLevels = 16;

// Values that are multiples of 2^low and at most 2^high.
struct Span {
  int32_t low, high;
  int32_t levels() const { return (high - low + kLevelBits - 1) / kLevelBits; }
};

// Sums of values, of kLevels levels in kSets sets of lanes.
template <int kLevels, int kSets>
struct Accumulators {
  DoubleVec acc[kSets][kLevels];
  LongVec units[kLevels];  // drained
  int32_t low;  // exponent of the lowest unit

  // For values that are too small by 2^scale.
  Accumulators(Span span, int32_t scale) : low(span.low - scale) {
    for (int l = 0; l < kLevels; ++l) {
      units[l] = LongVec{};
      for (int s = 0; s < kSets; ++s) acc[s][l] = DoubleVec{} + beginning(l);
    }
  }
  double beginning(int level) const { return 1.5 * power(low + kLevelBits * level + 52); }

  inline void take(DoubleVec r, int set) {
#pragma GCC unroll 16
    for (int l = kLevels - 1; l > 0; --l) {
      const DoubleVec t = acc[set][l] + r;
      r -= t - acc[set][l];
      acc[set][l] = t;
    }
    acc[set][0] += r;
  }
  inline void drain() {
#pragma GCC unroll 16
    for (int l = 0; l < kLevels; ++l) {
      const DoubleVec first = DoubleVec{} + beginning(l);
#pragma GCC unroll 2
      for (int s = 0; s < kSets; ++s) {
        units[l] += bit_cast<LongVec>(acc[s][l]) - bit_cast<LongVec>(first);
        acc[s][l] = first;
      }
    }
  }
  // Adds what was drained to the words, and returns it rounded. `low` is that of the span.
  double flush(int64_t* words, LimbForm form, int32_t span_low) const {
    double sum = 0.0;
    for (int l = kLevels - 1; l >= 0; --l) {
      const int64_t part = lane_sum(units[l]);
      if (part == 0) continue;
      add_multiple(words, part, span_low + kLevelBits * l, form);
      sum += static_cast<double>(part) * power(low + kLevelBits * l);
    }
    return sum;
  }
};

// Calls f with the least of these counts of levels that is enough.
template <class F>
double with_levels(int32_t levels, F f) {
  if (levels <= 1) return f(std::integral_constant<int, 1>());
  if (levels <= 2) return f(std::integral_constant<int, 2>());
  if (levels <= 3) return f(std::integral_constant<int, 3>());
  if (levels <= 4) return f(std::integral_constant<int, 4>());
  if (levels <= 8) return f(std::integral_constant<int, 8>());
  return f(std::integral_constant<int, kMostLevels>());
}
