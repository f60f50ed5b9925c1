// Exact sums of squares of one contiguous run of gradients, for one instruction set.
//
// A block of kExactBlock bytes is read from memory once. A first sweep over it, by integers, finds
// the range of its magnitudes, and so the limbs that its squares touch: few, mostly two or three. A
// second one splits each square among these levels and adds the parts without rounding, in lanes of
// float64 (after Rump, Ogita, Oishi 2008, "Accurate floating-point summation, part I", section 3;
// Demmel, Nguyen 2013, "Fast reproducible floating-point summation").
//
// How: an accumulator of level l begins at 1.5 * 2^52 * unit, unit = 2^(lowest + 40 l). As long as
// it stays in [2^52, 2^53] * unit, its last place is the unit, so that t = acc + r rounds r to a
// multiple of it; t - acc is that multiple, and r - (t - acc) what is left, at most half a unit.
// All three are exact but the first, whose rounding is the split. The lowest unit divides every
// square, so nothing is left there. At the end of a block the difference of the bits of acc and its
// beginning is the sum in units.
//
// Why it stays there: the top level has a square below or at 2^40 units, and each level below it at
// most half a unit above, 2^39. A lane takes at most 1024 squares of a block (4096 float32 in two
// sets of two lanes; 2048 float64 in two lanes), so the sum moves by at most 2^50 units of the 2^51
// that there are on either side.
//
// Every product here is exact, so a compiler that fuses it with an addition changes no bit.
#ifndef GRADFUSE_CPU_EXACT_KERNELS_H
#define GRADFUSE_CPU_EXACT_KERNELS_H

#include "../math/limbs.h"
#include "isa.h"

namespace gradfuse::cpu {

struct ExactKernels {
  // Adds the squares of x[0..n) to the words of a sum. Returns stats, whose sum of squares is
  // rounded. One read. n <= kCarryAfter, and a carry is due when that many were added.
  Stats (*add_squares)(const void* x, DType dtype, int64_t n, int64_t* words, LimbForm form);
};
GRADFUSE_KERNEL_TABLE(ExactKernels, exact_kernels)

}  // namespace gradfuse::cpu

#endif

#ifdef GRADFUSE_IN_UNIT
namespace {

#include "simd/vec.h"

constexpr int64_t kExactBlock = 16384;  // bytes as computed: 4096 float32 or 2048 float64

// Significant bits of a type, of those that come as float32 too.
template <class T>
constexpr int32_t kBits = sizeof(T) == 8 ? 53 : 24;
template <>
constexpr int32_t kBits<Half> = 11;
template <>
constexpr int32_t kBits<BFloat16> = 8;

// What the first sweep finds.
template <class T>
struct Range {
  using Bits = typename Lanes<T>::Bits;
  using Integer = std::decay_t<decltype(Bits{}[0])>;
  Integer largest = 0;  // |x| as bits; integer order is magnitude order, NaN above all
  Integer least = 0;  // of those that are not 0
  int64_t zeros = 0;

  static constexpr int32_t kField = sizeof(T) == 8 ? 52 : 23;  // place of the exponent
  static constexpr int32_t kBias = sizeof(T) == 8 ? 1023 : 127;
  static constexpr int32_t exponent(Integer bits) {
    const int32_t field = static_cast<int32_t>(bits >> kField);
    return (field == 0 ? 1 : field) - kBias;
  }
  // |x| < 2^(top() + 1), and x is a multiple of 2^(bottom() - kBits + 1).
  int32_t top() const { return exponent(largest); }
  int32_t bottom() const {
    // float64 is scaled, and so split where a subnormal number would have its leading bit.
    if (sizeof(T) == 8 && (least >> kField) == 0) return -1074;
    return exponent(least);
  }
};

// step = 2 vectors; n is a multiple of it.
template <class T>
void widen_range(const T* x, int64_t n, typename Lanes<T>::Bits (&largest)[2],
                 typename Lanes<T>::Bits (&least)[2], typename Lanes<T>::Bits (&zeros)[2]) {
  using L = Lanes<T>;
  using Bits = typename L::Bits;
  const auto take = [&](typename L::Vec v, int u) {
    const Bits bits = bit_cast<Bits>(v) & L::magnitude;
    const Bits below = (bits - 1) & L::magnitude;  // 0 becomes the largest
    largest[u] = bits > largest[u] ? bits : largest[u];
    least[u] = below < least[u] ? below : least[u];
    zeros[u] += (bits == 0);
  };
  for (int64_t i = 0; i < n; i += 2 * L::count) {
    const auto v = load_pair(x + i);
    take(v.a, 0);
    take(v.b, 1);
  }
}

// A block as whole steps, and what is left as one more, padded with zeros.
template <class T>
struct Steps {
  static constexpr int64_t kStep = 2 * Lanes<T>::count;
  const T* x;
  int64_t whole, padding;
  T tail[kStep];

  Steps(const T* data, int64_t n) : x(data), whole(n / kStep * kStep), padding(0) {
    const int64_t rest = n - whole;
    if (rest == 0) return;
    padding = kStep - rest;
    std::memcpy(tail, x + whole, rest * sizeof(T));
    std::memset(static_cast<void*>(tail + rest), 0, padding * sizeof(T));
  }
  // f(x, n) for all of them, n a multiple of a step.
  template <class F>
  void each(F f) const {
    f(x, whole);
    if (padding) f(tail, kStep);
  }
};

template <class T>
Range<T> range_of(const Steps<T>& steps) {
  using Bits = typename Lanes<T>::Bits;
  const Bits most = Bits{} + Lanes<T>::magnitude;
  Bits largest[2] = {}, least[2] = {most, most}, zeros[2] = {};
  steps.each([&](const T* x, int64_t n) { widen_range(x, n, largest, least, zeros); });
  Range<T> r;
  r.largest = lane_max(largest[0] > largest[1] ? largest[0] : largest[1]);
  // least is that of |x| - 1 and not negative: its complement is largest where it is least.
  r.least = ~lane_max(~(least[0] < least[1] ? least[0] : least[1])) + 1;
  r.zeros = -lane_sum(zeros[0] + zeros[1]) - steps.padding;
  return r;
}

// 2^exponent, for a normal result.
inline double power(int32_t exponent) {
  return bit_cast<double>(static_cast<int64_t>(exponent + 1023) << 52);
}

// The limbs that values touch: multiples of 2^low that are at most 2^high.
struct Span {
  int32_t bottom, top;
  Span(int32_t low, int32_t high, LimbForm form)
      : bottom((low - form.lowest) / kLimbBits), top((high - form.lowest - 1) / kLimbBits) {}
  int32_t levels() const { return top - bottom + 1; }
};

// Accumulators of kLevels limbs, in kSets sets.
template <int kLevels, int kSets>
struct Accumulators {
  DoubleVec acc[kSets][kLevels];
  int32_t lowest;  // exponent of the lowest unit
  int32_t limb;  // that it is

  // For values that were scaled by 2^-scale before they were squared.
  Accumulators(Span span, int32_t scale, LimbForm form) {
    limb = span.top - kLevels + 1 < 0 ? 0 : span.top - kLevels + 1;
    lowest = form.lowest + kLimbBits * limb - 2 * scale;
    for (int s = 0; s < kSets; ++s)
      for (int l = 0; l < kLevels; ++l) acc[s][l] = DoubleVec{} + beginning(l);
  }
  double beginning(int level) const { return 1.5 * power(lowest + kLimbBits * level + 52); }

  inline void take(DoubleVec r, int set) {
#pragma GCC unroll 16
    for (int l = kLevels - 1; l > 0; --l) {
      const DoubleVec t = acc[set][l] + r;
      r -= t - acc[set][l];
      acc[set][l] = t;
    }
    acc[set][0] += r;
  }
  // Adds the sum to the words, and returns it rounded, in units of the scaled squares.
  double flush(int64_t* words) const {
    double sum = 0.0;
    for (int l = kLevels - 1; l >= 0; --l) {
      LongVec units = {};
      for (int s = 0; s < kSets; ++s)
        units += bit_cast<LongVec>(acc[s][l]) - bit_cast<int64_t>(beginning(l));
      const int64_t part = lane_sum(units);
      words[limb + l] += part;
      sum += static_cast<double>(part) * power(lowest + kLimbBits * l);
    }
    return sum;
  }
};

// Calls f with the least of these counts of levels that is enough.
template <class F>
double with_levels(int32_t levels, F f) {
  if (levels <= 2) return f(std::integral_constant<int, 2>());
  if (levels <= 3) return f(std::integral_constant<int, 3>());
  if (levels <= 4) return f(std::integral_constant<int, 4>());
  if (levels <= 8) return f(std::integral_constant<int, 8>());
  return f(std::integral_constant<int, 16>());
}
constexpr int32_t kMostLevels = 16;  // all of the narrow form

// Squares of float32 have 48 bits: float64 holds them.
template <class T>
ScaledSum add_finite(const Steps<T>& steps, const Range<T>& range, int64_t* words, LimbForm form) {
  const Span span(2 * (range.bottom() - kBits<T> + 1), 2 * (range.top() + 1), form);
  const double sum = with_levels(span.levels(), [&](auto levels) {
    Accumulators<levels(), 2> sums(span, 0, form);
    steps.each([&](const T* x, int64_t n) {
      for (int64_t i = 0; i < n; i += Steps<T>::kStep) {
        const Pair<FloatVec> v = load_pair(x + i);
        const Pair<DoubleVec> a = widen(v.a), b = widen(v.b);
        sums.take(a.a * a.a, 0);
        sums.take(a.b * a.b, 1);
        sums.take(b.a * b.a, 0);
        sums.take(b.b * b.b, 1);
      }
    });
    return sums.flush(words);
  });
  return {sum, 0.0};
}

// Squares one by one, where their range has more levels, or some are not finite.
inline ScaledSum add_each(const double* x, int64_t n, int32_t scale, int64_t* words,
                          LimbForm form) {
  const PowerOfTwo unscale = power_of_two(-scale);
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    add_square(words, form, x[i]);
    const double y = x[i] * unscale.first * unscale.second;
    sum += y * y;
  }
  return {sum, static_cast<double>(scale)};
}

// float64 is split into high + low of 26 bits each (after Dekker 1971, by bits), whose products
// have 52: x^2 = high^2 + 2 high low + low^2. Where these might leave float64's range, x is scaled
// by a power of two before.
template <>
ScaledSum add_finite(const Steps<double>& steps, const Range<double>& range, int64_t* words,
                     LimbForm form) {
  const int32_t top = range.top(), bottom = range.bottom();
  const int32_t scale = top < 400 && bottom > -400 ? 0 : top < 1000 ? top : 1000;
  const Span first(2 * (bottom - 25), 2 * top + 2, form);
  const Span second(2 * bottom - 76, 2 * top - 24, form);
  const Span third(2 * (bottom - 52), 2 * top - 52, form);
  int32_t most = first.levels();
  if (second.levels() > most) most = second.levels();
  if (third.levels() > most) most = third.levels();
  if (most > kMostLevels) {
    ScaledSum sum = add_each(steps.x, steps.whole, top, words, form);
    if (steps.padding)
      sum.value += add_each(steps.tail, Steps<double>::kStep, top, words, form).value;
    return sum;
  }
  const double unscale = power(-scale);
  const double sum = with_levels(most, [&](auto levels) {
    Accumulators<levels(), 1> highs(first, scale, form), mixed(second, scale, form),
        lows(third, scale, form);
    const auto take = [&](DoubleVec v) {
      const DoubleVec x = v * unscale;
      const LongVec rounded =
          (bit_cast<LongVec>(x) + (int64_t{1} << 26)) & ~((int64_t{1} << 27) - 1);
      const DoubleVec high = bit_cast<DoubleVec>(rounded), low = x - high;
      highs.take(high * high, 0);
      mixed.take((high + high) * low, 0);
      lows.take(low * low, 0);
    };
    steps.each([&](const double* x, int64_t n) {
      for (int64_t i = 0; i < n; i += Steps<double>::kStep) {
        const Pair<DoubleVec> v = load_pair(x + i);
        take(v.a);
        take(v.b);
      }
    });
    const double small = lows.flush(words);
    return highs.flush(words) + (mixed.flush(words) + small);
  });
  return {sum, static_cast<double>(scale)};
}

// Squares of a block in which some are not finite. Returns how many.
template <class T>
int64_t add_nonfinite(const T* x, int64_t n, int64_t* words, LimbForm form) {
  using Vec = typename Lanes<T>::Vec;
  const int64_t before = words[form.infs()] + words[form.nans()];
  for (int64_t i = 0; i < n; i += Steps<T>::kStep) {
    const Pair<Vec> v = load_pair(x + i);
    for (const Vec& half : {v.a, v.b})
      for (int k = 0; k < Lanes<T>::count; ++k) add_square(words, form, half[k]);
  }
  return words[form.infs()] + words[form.nans()] - before;
}

inline double bits_to_double(int32_t bits) { return bit_cast<float>(bits); }
inline double bits_to_double(int64_t bits) { return bit_cast<double>(bits); }

template <class T>
Stats add_block(const T* x, int64_t n, int64_t* words, LimbForm form) {
  const Steps<T> steps(x, n);
  const Range<T> range = range_of(steps);
  Stats s = {{0.0, 0.0}, {0.0, 0.0}, bits_to_double(range.largest), 0, range.zeros};
  if (range.largest >= Lanes<T>::infinity) {
    steps.each([&](const T* q, int64_t m) { s.nonfinite += add_nonfinite(q, m, words, form); });
    s.l2.value = s.amax;
  } else if (range.largest != 0) {
    s.l2 = add_finite(steps, range, words, form);
  }
  return s;
}

Stats add_squares(const void* data, DType dtype, int64_t n, int64_t* words, LimbForm form) {
  return with_type<Half, BFloat16>(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int64_t block = kExactBlock / (sizeof(T) == 8 ? 8 : 4);
    const T* x = static_cast<const T*>(data);
    Stats total = add_block(x, n < block ? n : block, words, form);
    for (int64_t i = block; i < n; i += block)
      total = merge(total, add_block(x + i, n - i < block ? n - i : block, words, form), 2.0);
    return total;
  });
}

}  // namespace

const ExactKernels exact_kernels = {add_squares};

#endif
