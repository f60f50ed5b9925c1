// Stats, scaling and clamping of one contiguous run of gradients, for one instruction set.
//
// Reads are one per element from memory: a block of kBlock elements fits the first-level cache, so
// the rare second look (values whose squares leave float32, non-finite values, general p) is free.
// The hot loop is a load, a fused multiply-add, a maximum and a compare per vector.
#ifndef GRADFUSE_CPU_CLIP_KERNELS_H
#define GRADFUSE_CPU_CLIP_KERNELS_H

#include "../math/norm.h"
#include "isa.h"

namespace gradfuse::cpu {

struct ClipKernels {
  // Stats of x[0..n). One read.
  Stats (*stats)(const void* x, DType dtype, int64_t n, NormSpec spec);
  // x *= coefficient, rounded once from float64 (from float32 for 16-bit types where that is exact
  // enough).
  void (*scale)(void* x, DType dtype, int64_t n, double coefficient);
  // x = min(max(x, -bound), bound); NaN stays. Stores only blocks that change;
  // returns whether there were any.
  bool (*clamp)(void* x, DType dtype, int64_t n, double bound);
};
GRADFUSE_KERNEL_TABLE(ClipKernels, clip_kernels)

}  // namespace gradfuse::cpu

#endif

#ifdef GRADFUSE_IN_UNIT
namespace {

#include "simd/vec.h"

constexpr int64_t kBlock = 4096;
constexpr int kUnroll = 8;

// Sums, largest magnitude and zero count of one block, kUnroll vectors at a time. The unrolling
// keeps the arrays in registers.
template <class T, bool kL1>
struct Accumulators {
  using Vec = typename Lanes<T>::Vec;
  using Bits = typename Lanes<T>::Bits;
  Vec squares[kUnroll];
  Vec magnitudes[kL1 ? kUnroll : 1];
  Bits largest[kUnroll / 2];  // as bits: integer order is magnitude order, NaN above all
  Bits zeros[kUnroll / 2];    // minus the count

  Accumulators() {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) squares[u] = Vec{};
#pragma GCC unroll 8
    for (int u = 0; u < (kL1 ? kUnroll : 1); ++u) magnitudes[u] = Vec{};
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll / 2; ++u) largest[u] = zeros[u] = Bits{};
  }
  inline void take(Vec v, int u) {
    const Bits bits = bit_cast<Bits>(v) & Lanes<T>::magnitude;
    const Bits top = largest[u / 2];
    squares[u] += v * v;
    if constexpr (kL1) magnitudes[u] += bit_cast<Vec>(bits);
    largest[u / 2] = bits > top ? bits : top;
    zeros[u / 2] += (bits == 0);
  }
  inline void take(const T* x) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; u += 2) {
      const Pair<Vec> v = load_pair(x + u * Lanes<T>::count);
      take(v.a, u);
      take(v.b, u + 1);
    }
  }
};

template <class V>
V tree_sum(V (&v)[kUnroll]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// 4 * kDoubles elements as float64.
template <class T>
inline void load_doubles(const T* x, DoubleVec (&v)[4]) {
  Pair<DoubleVec> a, b;
  if constexpr (sizeof(T) == 8) {
    a = load_pair(x);
    b = load_pair(x + 2 * kDoubles);
  } else {
    const Pair<FloatVec> floats = load_pair(x);
    a = widen(floats.a);
    b = widen(floats.b);
  }
  v[0] = a.a, v[1] = a.b, v[2] = b.a, v[3] = b.b;
}

// Sum of (x * 2^-exponent)^2, or of its magnitude, in float64. n is a multiple of 4 * kDoubles.
template <class T, bool kSquare>
double scaled_sum(const T* x, int64_t n, int32_t exponent) {
  const PowerOfTwo scale = power_of_two(-exponent);
  DoubleVec sums[4] = {};
  for (int64_t i = 0; i < n; i += 4 * kDoubles) {
    DoubleVec v[4];
    load_doubles(x + i, v);
    for (int k = 0; k < 4; ++k) {
      const DoubleVec w = v[k] * scale.first * scale.second;
      sums[k] +=
          kSquare ? w * w : bit_cast<DoubleVec>(bit_cast<LongVec>(w) & Lanes<double>::magnitude);
    }
  }
  return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Sum of |x / amax|^p: whatever p, the largest term is 1.
template <class T>
double scaled_power_sum(const T* x, int64_t n, double amax, double p) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; i += 4 * kDoubles) {
    DoubleVec v[4];
    load_doubles(x + i, v);
    for (const DoubleVec& w : v)
      for (int k = 0; k < kDoubles; ++k) sum += std::pow(std::fabs(w[k] / amax), p);
  }
  return sum;
}

inline double bits_to_double(int32_t bits) { return bit_cast<float>(bits); }
inline double bits_to_double(int64_t bits) { return bit_cast<double>(bits); }

template <class T>
int64_t count_nonfinite(const T* x, int64_t n) {
  using L = Lanes<T>;
  typename L::Bits count = {};
  for (int64_t i = 0; i < n; i += 2 * L::count) {
    const auto v = load_pair(x + i);
    count += ((bit_cast<typename L::Bits>(v.a) & L::magnitude) >= L::infinity);
    count += ((bit_cast<typename L::Bits>(v.b) & L::magnitude) >= L::infinity);
  }
  return -lane_sum(count);
}

template <class T>
constexpr double kSafeMin = sizeof(T) == 8 ? kSafeDoubleMin : kSafeFloatMin;
template <class T>
constexpr double kSafeMax = sizeof(T) == 8 ? kSafeDoubleMax : kSafeFloatMax;

// Stats of at most kBlock elements. step = kUnroll vectors; the last, partial step is read through
// a zero-padded copy.
template <class T, NormKind kKind>
Stats block_stats(const T* x, int64_t n, double p) {
  using L = Lanes<T>;
  constexpr bool kL1 = kKind == NormKind::L1;
  constexpr int64_t step = kUnroll * L::count;
  const int64_t whole = n / step * step;
  const int64_t rest = n - whole;

  Accumulators<T, kL1> acc;
  for (int64_t i = 0; i < whole; i += step) acc.take(x + i);
  T tail[step];
  if (rest) {
    std::memcpy(tail, x + whole, rest * sizeof(T));
    std::memset(static_cast<void*>(tail + rest), 0, (step - rest) * sizeof(T));
    acc.take(tail);
  }

  typename L::Bits largest = acc.largest[0];
  for (int u = 1; u < kUnroll / 2; ++u)
    largest = acc.largest[u] > largest ? acc.largest[u] : largest;
  const auto top = lane_max(largest);
  const int64_t padding = rest ? step - rest : 0;
  const int64_t zeros =
      -lane_sum((acc.zeros[0] + acc.zeros[1]) + (acc.zeros[2] + acc.zeros[3])) - padding;

  Stats s = {{lane_sum(tree_sum(acc.squares)), 0}, {0.0, 0}, bits_to_double(top), 0, zeros};
  if constexpr (kL1) s.lp.value = lane_sum(tree_sum(acc.magnitudes));

  auto whole_and_tail = [&](auto f) { return f(x, whole) + (rest ? f(tail, step) : 0); };
  if (top >= L::infinity) {
    s.nonfinite = whole_and_tail([](const T* q, int64_t m) { return count_nonfinite(q, m); });
    s.l2 = s.lp = {s.amax, 0};
    return s;
  }
  if (s.amax == 0.0) return s;
  const bool unsafe = s.amax < kSafeMin<T> || s.amax > kSafeMax<T>;
  if (unsafe) {
    const int32_t exponent = sizeof(T) == 8 ? scale_exponent(s.amax) : 0;
    auto sum = [&](auto f) {
      return ScaledSum{whole_and_tail([&](const T* q, int64_t m) { return f(q, m, exponent); }),
                       static_cast<double>(exponent)};
    };
    s.l2 = sum(scaled_sum<T, true>);
    if constexpr (kL1) s.lp = sum(scaled_sum<T, false>);
  }
  if constexpr (kKind == NormKind::P)
    s.lp = {
        whole_and_tail([&](const T* q, int64_t m) { return scaled_power_sum(q, m, s.amax, p); }),
        std::log2(s.amax)};
  return s;
}

template <class T, NormKind kKind>
Stats blocks_stats(const T* x, int64_t n, double p) {
  Stats total = block_stats<T, kKind>(x, n < kBlock ? n : kBlock, p);
  for (int64_t i = kBlock; i < n; i += kBlock)
    total = merge(total, block_stats<T, kKind>(x + i, n - i < kBlock ? n - i : kBlock, p), p);
  return total;
}

template <class T>
Stats stats_of(const void* data, int64_t n, NormSpec spec) {
  const T* x = static_cast<const T*>(data);
  switch (spec.kind) {
    case NormKind::L1: return blocks_stats<T, NormKind::L1>(x, n, spec.p);
    case NormKind::P: return blocks_stats<T, NormKind::P>(x, n, spec.p);
    default: return blocks_stats<T, NormKind::L2>(x, n, spec.p);
  }
}

// Replaces every pair of vectors v of x by f(v). The last, partial pair goes through a padded copy.
template <class T, class F>
void transform(T* x, int64_t n, F f) {
  constexpr int64_t step = 2 * Lanes<T>::count;
  int64_t i = 0;
  for (; i + step <= n; i += step) store_pair(x + i, f(load_pair(x + i)));
  if (i < n) {
    T tail[step] = {};
    std::memcpy(tail, x + i, (n - i) * sizeof(T));
    store_pair(tail, f(load_pair(tail)));
    std::memcpy(static_cast<void*>(x + i), tail, (n - i) * sizeof(T));
  }
}

template <class T>
void scale_run(void* data, int64_t n, double coefficient) {
  T* x = static_cast<T*>(data);
  if constexpr (sizeof(T) == 8) {
    transform(x, n, [=](Pair<DoubleVec> v) {
      return Pair<DoubleVec>{v.a * coefficient, v.b * coefficient};
    });
  } else if (sizeof(T) == 2 && coefficient >= 0x1p-126) {
    // float32 holds such a coefficient to 24 bits, more than a 16-bit result can show.
    const float c = static_cast<float>(coefficient);
    transform(x, n, [=](Pair<FloatVec> v) { return Pair<FloatVec>{v.a * c, v.b * c}; });
  } else {
    auto times = [=](FloatVec v) {
      const Pair<DoubleVec> wide = widen(v);
      return narrow({wide.a * coefficient, wide.b * coefficient});
    };
    transform(x, n, [=](Pair<FloatVec> v) { return Pair<FloatVec>{times(v.a), times(v.b)}; });
  }
}

// Clamps a block at a time: blocks within the bound are read only. The bound is rounded to T first,
// as torch's clamp_ rounds it. Returns whether anything changed.
template <class T>
bool clamp_run(void* data, int64_t n, double bound) {
  using L = Lanes<T>;
  using Vec = typename L::Vec;
  using Bits = typename L::Bits;
  constexpr int64_t step = 2 * L::count;
  constexpr int64_t block = 16 * step;
  T* x = static_cast<T*>(data);

  T held[step];
  const Vec wide = Vec{} + static_cast<std::remove_reference_t<decltype(Vec{}[0])>>(bound);
  store_pair(held, {wide, wide});
  const Vec high = load_pair(held).a;
  const Vec low = -high;
  const Bits limit = bit_cast<Bits>(high);

  auto clamp = [=](Vec v) { return v > high ? high : (v < low ? low : v); };
  bool changed = false;
  for (int64_t i = 0; i < n; i += block) {
    const int64_t m = n - i < block ? n - i : block;
    Bits outside = {};
    auto look = [&](Vec v) { outside |= (bit_cast<Bits>(v) & L::magnitude) > limit; };
    int64_t k = 0;
    for (; k + step <= m; k += step) {
      const Pair<Vec> v = load_pair(x + i + k);
      look(v.a);
      look(v.b);
    }
    if (k < m) {
      T tail[step] = {};
      std::memcpy(tail, x + i + k, (m - k) * sizeof(T));
      const Pair<Vec> v = load_pair(tail);
      look(v.a);
      look(v.b);
    }
    if (lane_sum(outside) == 0) continue;
    changed = true;
    transform(x + i, m, [=](Pair<Vec> v) { return Pair<Vec>{clamp(v.a), clamp(v.b)}; });
  }
  return changed;
}

Stats stats(const void* x, DType dtype, int64_t n, NormSpec spec) {
  return with_type<Half, BFloat16>(
      dtype, [&](auto type) { return stats_of<typename decltype(type)::type>(x, n, spec); });
}

void scale(void* x, DType dtype, int64_t n, double coefficient) {
  with_type<Half, BFloat16>(
      dtype, [&](auto type) { scale_run<typename decltype(type)::type>(x, n, coefficient); });
}

bool clamp(void* x, DType dtype, int64_t n, double bound) {
  return with_type<Half, BFloat16>(
      dtype, [&](auto type) { return clamp_run<typename decltype(type)::type>(x, n, bound); });
}

}  // namespace

const ClipKernels clip_kernels = {stats, scale, clamp};

#endif
