// Exact sums of squares for host and device: a big integer in limbs, and its correctly rounded
// root. No tensors, no launches, no loops over memory.
//
// A sum is an integer times 2^lowest. Limb i is an int64 that counts 2^(lowest + 40 i), a grid that
// all sums share (a small superaccumulator: Kulisch 2013, "Computer Arithmetic and Validity",
// chapter 8; Neal 2015, "Fast exact summation using small and large superaccumulators"). Limbs are
// added as plain integers, so the order of additions, and who makes them, does not change a bit.
#pragma once

#include <cmath>
#include <cstring>

#include "norm.h"

namespace gradfuse {

constexpr int32_t kLimbBits = 40;

// Where the limbs lie. Their words in memory: int64 [limbs], lowest first; then the count of inf,
// then that of NaN.
struct LimbForm {
  int32_t limbs;
  int32_t lowest;  // exponent of limb 0's unit; even

  GRADFUSE_HD constexpr int32_t words() const { return limbs + 2; }
  GRADFUSE_HD constexpr int32_t infs() const { return limbs; }
  GRADFUSE_HD constexpr int32_t nans() const { return limbs + 1; }
};
// float32 and narrower: from the square of its smallest number, 2^-298, up to 2^63 squares below
// 2^256 each.
constexpr LimbForm kNarrowLimbs = {16, -320};
// float64: from 2^-2148 up to 2^63 squares below 2^2048 each. Limb 46 is the narrow form's first.
constexpr LimbForm kWideLimbs = {107, -2160};
constexpr int32_t kMostWords = kWideLimbs.words();

// Squares that may be added between two carries. However they are split, each adds less than 2^44
// to a limb, so 2^18 of them to carried limbs, below 2^40 each, stay below 2^63.
constexpr int64_t kCarryAfter = int64_t{1} << 18;

// What value * 2^exponent adds: parts[k], below 2^40 each, to limb first + k.
struct LimbParts {
  int32_t first;
  int64_t parts[3];
};

// value < 2^64; exponent >= lowest. The third part is 0 where there is no such limb.
GRADFUSE_HD LimbParts limb_parts(uint64_t value, int32_t exponent, LimbForm form) {
  const int32_t position = exponent - form.lowest;
  const int32_t first = position / kLimbBits, shift = position % kLimbBits;
  const uint64_t mask = (uint64_t{1} << kLimbBits) - 1;
  const uint64_t above = value >> (kLimbBits - shift);
  return {first,
          {static_cast<int64_t>((value << shift) & mask), static_cast<int64_t>(above & mask),
           static_cast<int64_t>(above >> kLimbBits)}};
}

// Calls add(limb, part).
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Add>
GRADFUSE_HD void each_part(const LimbParts& p, Add add) {
  for (int32_t k = 0; k < 3; ++k)
    if (p.parts[k] != 0) add(p.first + k, p.parts[k]);
}

// Calls add(word, value) for all that x^2 adds to a sum. At most 3 parts go to one limb. That of a
// float64 takes the wide form.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Add>
GRADFUSE_HD void each_part_of_square(LimbForm form, float x, Add add) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const int32_t field = static_cast<int32_t>((bits >> 23) & 0xff);
  uint64_t mantissa = bits & 0x7fffff;
  if (field == 0xff) return add(mantissa ? form.nans() : form.infs(), int64_t{1});
  if (field != 0) mantissa |= 0x800000;
  const int32_t exponent = (field == 0 ? 1 : field) - 150;
  each_part(limb_parts(mantissa * mantissa, 2 * exponent, form), add);
}
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Add>
GRADFUSE_HD void each_part_of_square(LimbForm form, double x, Add add) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const int32_t field = static_cast<int32_t>((bits >> 52) & 0x7ff);
  uint64_t mantissa = bits & 0xfffffffffffff;
  if (field == 0x7ff) return add(mantissa ? form.nans() : form.infs(), int64_t{1});
  if (field != 0) mantissa |= 0x10000000000000;
  const int32_t exponent = 2 * ((field == 0 ? 1 : field) - 1075);
  const uint64_t high = mantissa >> 27, low = mantissa & 0x7ffffff;
  each_part(limb_parts(high * high, exponent + 54, form), add);
  each_part(limb_parts(high * low, exponent + 28, form), add);
  each_part(limb_parts(low * low, exponent, form), add);
}

// Adds value * 2^exponent.
GRADFUSE_HD void add_multiple(int64_t* words, int64_t value, int32_t exponent, LimbForm form) {
  const uint64_t size = static_cast<uint64_t>(value < 0 ? -value : value);
  each_part(limb_parts(size, exponent, form),
            [=](int32_t word, int64_t part) { words[word] += value < 0 ? -part : part; });
}
// Adds x^2.
template <class T>
GRADFUSE_HD void add_square(int64_t* words, LimbForm form, T x) {
  each_part_of_square(form, x, [=](int32_t word, int64_t value) { words[word] += value; });
}

// Brings all limbs into [0, 2^40), but the last, which takes the rest. The sum stays the same, and
// so equal sums have equal words. Limbs may be negative before, the sum may not.
GRADFUSE_HD void carry(int64_t* words, LimbForm form) {
  int64_t over = 0;
  for (int32_t i = 0; i < form.limbs - 1; ++i) {
    const int64_t limb = words[i] + over;
    over = limb >> kLimbBits;
    words[i] = limb & ((int64_t{1} << kLimbBits) - 1);
  }
  words[form.limbs - 1] += over;
}

// to += from. Sums of up to 2^22 carried words need no carry between.
GRADFUSE_HD void add_words(int64_t* to, const int64_t* from, LimbForm form) {
  for (int32_t i = 0; i < form.words(); ++i) to[i] += from[i];
}

// Where a root is rounded: bits of its significand, and the exponent of the smallest number.
struct Precision {
  int32_t bits;
  int32_t least;
};
constexpr Precision kToDouble = {53, -1074};
constexpr Precision kToFloat = {24, -149};

// The root of carried limbs, rounded once, to nearest even: value * 2^exponent with an integer
// value below 2^53, also above the precision's largest number. NaN if there is a NaN, else inf if
// there is an inf.
//
// Digit by digit from pairs of bits, as on paper: remainder <= 2 * root, so 64 bits hold all but
// the limbs, whatever the precision. What is left below the last digit decides ties alone.
GRADFUSE_HD ScaledNorm root_of_limbs(const int64_t* words, LimbForm form, Precision precision) {
  if (words[form.nans()] != 0) return {static_cast<double>(NAN), 0.0};
  if (words[form.infs()] != 0) return {static_cast<double>(INFINITY), 0.0};
  constexpr int32_t kPairs = kLimbBits / 2;
  int32_t top = form.limbs - 1;
  while (top >= 0 && words[top] == 0) --top;
  if (top < 0) return {0.0, 0.0};
  int32_t first = 0;
  while ((words[top] >> (2 * first)) > 3) ++first;
  first += kPairs * top;  // the highest pair that is not 0; pair k is a digit 2^(lowest / 2 + k)
  int32_t last = first - precision.bits;  // one digit more than the result has
  const int32_t least = precision.least - 1 - form.lowest / 2;
  if (last < least) last = least;
  if (last > first) return {0.0, 0.0};  // below half of the smallest number
  uint64_t root = 0, remainder = 0;
  for (int32_t k = first; k >= last; --k) {
    uint64_t pair = 0;
    if (k >= 0) {
      const int32_t limb = k / kPairs < form.limbs ? k / kPairs : form.limbs - 1;
      pair = static_cast<uint64_t>(words[limb] >> (2 * (k - kPairs * limb))) & 3;
    }
    remainder = remainder * 4 + pair;
    const uint64_t trial = root * 4 + 1;
    const bool fits = remainder >= trial;
    if (fits) remainder -= trial;
    root = root * 2 + (fits ? 1 : 0);
  }
  bool is_more = remainder != 0;
  if (last > 0) {
    int32_t limb = last / kPairs < form.limbs ? last / kPairs : form.limbs - 1;
    is_more |= (words[limb] & ((int64_t{1} << (2 * (last - kPairs * limb))) - 1)) != 0;
    while (--limb >= 0) is_more |= words[limb] != 0;
  }
  const uint64_t whole = root >> 1;
  const bool up = (root & 1) != 0 && (is_more || (whole & 1) != 0);
  return {static_cast<double>(whole + (up ? 1 : 0)),
          static_cast<double>(form.lowest / 2 + last + 1)};
}

}  // namespace gradfuse
