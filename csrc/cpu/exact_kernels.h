// Exact sums of squares of one contiguous run of gradients, for one instruction set.
//
// A block of kExactBlock bytes is read from memory once. A first sweep over it, by integers, finds
// the range of its magnitudes, and so the bits that its squares have: some 45 for bfloat16, 80 for
// float32. A second one splits each square among levels of 46 bits and adds the parts without
// rounding, in lanes of float64 (after Rump, Ogita, Oishi 2008, "Accurate floating-point summation,
// part I", section 3; Demmel, Nguyen 2013, "Fast reproducible floating-point summation"). How, and
// why nothing is lost, is said in simd/vec_exact.h.
//
// Every product here is exact, so a compiler that fuses it with an addition changes no bit.
#ifndef GRADFUSE_CPU_EXACT_KERNELS_H
#define GRADFUSE_CPU_EXACT_KERNELS_H

#include "../math/limbs.h"
#include "../math/prefetch.h"
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
#include "simd/vec_exact.h"

constexpr int64_t kExactBlock = 16384;  // bytes as computed: 4096 float32 or 2048 float64

// The bits of a type.
template <class T>
struct Format {
  using Word = std::conditional_t<sizeof(T) == 8, int64_t,
                                  std::conditional_t<sizeof(T) == 4, int32_t, int16_t> >;
  typedef Word Vec __attribute__((vector_size(GRADFUSE_VEC_BYTES)));
  static constexpr int count = GRADFUSE_VEC_BYTES / sizeof(T);
  static constexpr bool is_half = std::is_same<T, Half>::value;
  static constexpr int32_t field = sizeof(T) == 8   ? 52  // place of the exponent
                                   : sizeof(T) == 4 ? 23
                                   : is_half        ? 10
                                                    : 7;
  static constexpr int32_t bias = sizeof(T) == 8 ? 1023 : is_half ? 15 : 127;
  static constexpr Word magnitude = static_cast<Word>(~(Word{1} << (8 * sizeof(T) - 1)));
  static constexpr Word infinity = static_cast<Word>(magnitude >> field << field);
};

// What the first sweep finds.
template <class T>
struct Range {
  using F = Format<T>;
  using Word = typename F::Word;
  Word largest;  // |x| as bits; integer order is magnitude order, NaN above all
  Word least;  // of those that are not 0
  int64_t zeros;

  static constexpr int32_t exponent(Word bits) {
    const int32_t field = static_cast<int32_t>(bits >> F::field);
    return (field == 0 ? 1 : field) - F::bias;
  }
  // |x| < 2^(top() + 1), and x is a multiple of 2^(bottom() - F::field).
  int32_t top() const { return exponent(largest); }
  int32_t bottom() const {
    // float64 is scaled, and so split where a subnormal number would have its leading bit.
    if (sizeof(T) == 8 && (least >> F::field) == 0) return -1074;
    return exponent(least);
  }
};

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
  // What the next block has at the place of this one's step, for the second sweep, during which
  // memory would be idle. Past the end of a run this is no access.
  static void prefetch_next(const T* x, int64_t n) {
    constexpr int64_t kLine = 64;
    const char* const next = reinterpret_cast<const char*>(x + n);
    for (int64_t b = 0; b < kStep * static_cast<int64_t>(sizeof(T)); b += kLine)
      prefetch_line(next + b);
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
  using F = Format<T>;
  using Vec = typename F::Vec;
  Vec largest = {}, least = Vec{} + F::magnitude, zeros = {};
  steps.each([&](const T* x, int64_t n) {
    for (int64_t i = 0; i < n; i += F::count) {
      const Vec bits = load_bytes<Vec>(x + i) & F::magnitude;
      const Vec below = (bits - 1) & F::magnitude;  // 0 becomes the largest
      largest = bits > largest ? bits : largest;
      least = below < least ? below : least;
      zeros += (bits == 0);
    }
  });
  const auto larger = [](auto a, auto b) { return a > b ? a : b; };
  const auto lesser = [](auto a, auto b) { return a < b ? a : b; };
  const auto both = [](auto a, auto b) { return a + b; };
  return {static_cast<typename F::Word>(reduce_lanes(largest, larger)),
          static_cast<typename F::Word>(reduce_lanes(least, lesser) + 1),
          -static_cast<int64_t>(reduce_lanes(zeros, both)) - steps.padding};
}

// Calls take(x + i) for the steps of a block and drain() as often as it must be: a step adds at
// most two values to each accumulator.
template <class T, class Take, class Drain>
void each_step(const Steps<T>& steps, Take take, Drain drain) {
  constexpr int64_t run = kDrainAfter / 2 * Steps<T>::kStep;
  steps.each([&](const T* x, int64_t n) {
    for (int64_t i = 0; i < n; i += run) {
      const int64_t end = n - i < run ? n : i + run;
      for (int64_t k = i; k < end; k += Steps<T>::kStep) {
        Steps<T>::prefetch_next(x + k, n);
        take(x + k);
      }
      drain();
    }
  });
}

// Squares of float32 have 48 bits: float64 holds them.
template <class T>
ScaledSum add_finite(const Steps<T>& steps, const Range<T>& range, int64_t* words, LimbForm form) {
  const Span span = {2 * (range.bottom() - Format<T>::field), 2 * (range.top() + 1)};
  const double sum = with_levels(span.levels(), [&](auto levels) {
    Accumulators<levels(), 2> sums(span, 0);
    each_step(
        steps,
        [&](const T* x) {
          const Pair<FloatVec> v = load_pair(x);
          const Pair<DoubleVec> a = widen(v.a), b = widen(v.b);
          sums.take(a.a * a.a, 0);
          sums.take(a.b * a.b, 1);
          sums.take(b.a * b.a, 0);
          sums.take(b.b * b.b, 1);
        },
        [&] { sums.drain(); });
    return sums.flush(words, form, span.low);
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
  const int32_t scale = top < 200 && bottom > -200 ? 0 : top < 1000 ? top : 1000;
  // Parts of a multiple of 2^-1074 are multiples of it.
  const auto span = [](int32_t low, int32_t high) {
    return Span{low < 2 * -1074 ? 2 * -1074 : low, high};
  };
  const Span highs = span(2 * (bottom - 25), 2 * top + 2);
  const Span mixed = span(2 * bottom - 76, 2 * top - 24);
  const Span lows = span(2 * (bottom - 52), 2 * top - 52);
  // All of at most 52 bits and twice the range of exponents.
  if (highs.levels() > kMostLevels) {
    ScaledSum sum = add_each(steps.x, steps.whole, top, words, form);
    if (steps.padding)
      sum.value += add_each(steps.tail, Steps<double>::kStep, top, words, form).value;
    return sum;
  }
  const double unscale = power(-scale);
  const double sum = with_levels(highs.levels(), [&](auto levels) {
    Accumulators<levels(), 1> of_highs(highs, 2 * scale), of_mixed(mixed, 2 * scale),
        of_lows(lows, 2 * scale);
    const auto take = [&](DoubleVec v) {
      const DoubleVec x = v * unscale;
      const LongVec rounded =
          (bit_cast<LongVec>(x) + (int64_t{1} << 26)) & ~((int64_t{1} << 27) - 1);
      const DoubleVec high = bit_cast<DoubleVec>(rounded), low = x - high;
      of_highs.take(high * high, 0);
      of_mixed.take((high + high) * low, 0);
      of_lows.take(low * low, 0);
    };
    each_step(
        steps,
        [&](const double* x) {
          const Pair<DoubleVec> v = load_pair(x);
          take(v.a);
          take(v.b);
        },
        [&] {
          of_highs.drain();
          of_mixed.drain();
          of_lows.drain();
        });
    const double small = of_lows.flush(words, form, lows.low);
    return of_highs.flush(words, form, highs.low) +
           (of_mixed.flush(words, form, mixed.low) + small);
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

// A magnitude by its bits.
template <class T>
double value_of(typename Format<T>::Word bits) {
  T x[Steps<T>::kStep] = {};
  std::memcpy(x, &bits, sizeof(T));
  return load_pair(x).a[0];
}

template <class T>
Stats add_block(const T* x, int64_t n, int64_t* words, LimbForm form) {
  const Steps<T> steps(x, n);
  const Range<T> range = range_of(steps);
  Stats s = {{0.0, 0.0}, {0.0, 0.0}, value_of<T>(range.largest), 0, range.zeros};
  if (range.largest >= Format<T>::infinity) {
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
