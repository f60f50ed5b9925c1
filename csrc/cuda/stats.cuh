// Stats of one run by one block: each thread's share in registers, then a fixed-order reduction.
//
// Squares are summed in float32 over the words a thread has in flight and in float64 beyond. A
// group whose largest magnitude makes float32 squares overflow or vanish is summed again in float64
// from the same registers, so memory is read once whatever the values, and consumer GPUs do
// float64 arithmetic once per group instead of once per element.
#pragma once

#include "../math/norm.h"
#include "common.cuh"
#include "reduce.cuh"

namespace gradfuse::cuda {

__device__ inline uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ inline uint64_t magnitude_bits(double x) {
  return static_cast<uint64_t>(__double_as_longlong(x)) & 0x7fffffffffffffffull;
}
__device__ inline double from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline double from_bits(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}
template <class Wide>
constexpr auto kInfinityBits = 0x7f800000u;
template <>
constexpr auto kInfinityBits<double> = 0x7ff0000000000000ull;

// Whether the squares of a group with this largest magnitude may be summed as they are. Those of
// float16 always may.
template <class T>
__device__ bool squares_are_safe(double largest) {
  if (std::is_same_v<T, __half>) return true;
  if (std::is_same_v<T, double>) return largest >= kSafeDoubleMin && largest <= kSafeDoubleMax;
  return largest >= kSafeFloatMin && largest <= kSafeFloatMax;
}

// One thread's share. kPower: the norm is NormKind::P, and every element is raised to spec.p.
template <class T, bool kPower>
struct ThreadStats {
  using Wide = typename Element<T>::Wide;
  using Bits = std::conditional_t<sizeof(Wide) == 8, uint64_t, uint32_t>;

  ScaledSum l2 = {0.0, 0};
  ScaledSum lp = {0.0, 0};
  Bits largest = 0;  // integer order is magnitude order, NaN above all
  int64_t nonfinite = 0;
  int64_t zeros = 0;

  template <int kCount>
  __device__ void take(const Wide (&x)[kCount], NormSpec spec) {
    Bits top = 0;
    Wide squares = 0, magnitudes = 0;
    int zero = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Bits bits = magnitude_bits(x[i]);
      top = bits > top ? bits : top;
      zero += bits == 0;
      squares += x[i] * x[i];
      magnitudes += x[i] < 0 ? -x[i] : x[i];
    }
    zeros += zero;
    largest = top > largest ? top : largest;
    if (top == 0) return;
    if (top >= kInfinityBits<Wide>) {
      int bad = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) bad += magnitude_bits(x[i]) >= kInfinityBits<Wide>;
      nonfinite += bad;
      return;
    }
    const double amax = from_bits(top);
    if (squares_are_safe<T>(amax)) {
      l2 = add(l2, {static_cast<double>(squares), 0}, 2.0);
      if (spec.kind == NormKind::L1) lp = add(lp, {static_cast<double>(magnitudes), 0}, 1.0);
    } else {
      // float64 holds the squares of float32 as they are.
      const int32_t e = sizeof(Wide) == 8 ? scale_exponent(amax) : 0;
      l2 = add(l2, {scaled_sum<true>(x, e), static_cast<double>(e)}, 2.0);
      if (spec.kind == NormKind::L1)
        lp = add(lp, {scaled_sum<false>(x, e), static_cast<double>(e)}, 1.0);
    }
    if constexpr (kPower) lp = add(lp, {power_sum(x, amax, spec.p), log2(amax)}, spec.p);
  }

  // Sum of (x * 2^-exponent)^2, or of its magnitude.
  template <bool kSquare, int kCount>
  static __device__ double scaled_sum(const Wide (&x)[kCount], int32_t exponent) {
    const PowerOfTwo scale = power_of_two(-exponent);
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const double v = fabs(x[i] * scale.first * scale.second);
      sum += kSquare ? v * v : v;
    }
    return sum;
  }

  // Sum of |x / amax|^p: whatever p, the largest term is 1.
  template <int kCount>
  static __device__ double power_sum(const Wide (&x)[kCount], double amax, double p) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += pow(fabs(x[i] / amax), p);
    return sum;
  }

  __device__ Stats finish() const {
    const double amax = from_bits(largest);
    if (largest >= kInfinityBits<Wide>) return {{amax, 0}, {amax, 0}, amax, nonfinite, zeros};
    return {l2, lp, amax, nonfinite, zeros};
  }
};

struct Merge {
  double p;
  __device__ Stats operator()(const Stats& a, const Stats& b) const { return merge(a, b, p); }
};

// Merges the threads' stats in thread order. Result valid in thread 0. Assumes blockDim.x ==
// kBlock; ends with a barrier, so that it may be called again.
template <int kBlock>
__device__ Stats block_merge(const Stats& mine, double p) {
  const Stats total = block_reduce<kBlock>(mine, Merge{p});
  __syncthreads();
  return total;
}

// This thread's stats of x[0..n), dense, kUnroll words at a time.
template <class T, int kBlock, int kUnroll, bool kPower>
__device__ Stats thread_stats(const T* x, int64_t n, NormSpec spec) {
  using Wide = typename Element<T>::Wide;
  constexpr int kPer = kPer16Bytes<T>;
  ThreadStats<T, kPower> stats;
  visit_run<T, kBlock, kUnroll>(
      x, n,
      [&](int64_t i) {
        const Wide one[1] = {Element<T>::widen(x[i])};
        stats.take(one, spec);
      },
      [&](int64_t, const Word<T>(&words)[kUnroll]) {
        Wide wide[kUnroll * kPer];
#pragma unroll
        for (int i = 0; i < kUnroll * kPer; ++i)
          wide[i] = Element<T>::widen(words[i / kPer].element[i % kPer]);
        stats.take(wide, spec);
      },
      [&](int64_t, const Word<T>& word) {
        Wide wide[kPer];
#pragma unroll
        for (int i = 0; i < kPer; ++i) wide[i] = Element<T>::widen(word.element[i]);
        stats.take(wide, spec);
      });
  return stats.finish();
}

// This thread's stats of elements [start, end) of a strided or complex run whose first element is
// `base` elements after its data. All types in float64; a complex element counts by its modulus.
template <int kBlock, bool kPower>
__device__ Stats strided_thread_stats(const StridedRun& run, int64_t base, int64_t start,
                                      int64_t end, NormSpec spec) {
  ThreadStats<double, kPower> stats;
  for (int64_t i = start + threadIdx.x; i < end; i += kBlock) {
    const int64_t element = base + strided_offset(run, i);
    const double one[1] = {
        run.is_complex ? hypot(load_element(run, 2 * element), load_element(run, 2 * element + 1))
                       : load_element(run, element)};
    stats.take(one, spec);
  }
  return stats.finish();
}

// x * factor as T. float32 holds a normal factor to 24 bits; a smaller one needs float64.
template <class T>
__device__ T scaled(T x, const Factor& factor) {
  using E = Element<T>;
  using Wide = typename E::Wide;
  if (sizeof(T) == 8 || !(factor.whole >= 0x1p-126))
    return E::narrow(static_cast<Wide>(factor.times(E::widen(x))));
  return E::narrow(E::widen(x) * static_cast<Wide>(factor.whole));
}

// x[0..n) *= factor, dense.
template <class T, int kBlock>
__device__ void scale_run(T* x, int64_t n, const Factor& factor) {
  constexpr int kPer = kPer16Bytes<T>;
  constexpr int kUnroll = 4;
  auto update = [=](Word<T> w) {
#pragma unroll
    for (int k = 0; k < kPer; ++k) w.element[k] = scaled(w.element[k], factor);
    return w;
  };
  visit_run<T, kBlock, kUnroll>(
      x, n, [=](int64_t i) { x[i] = scaled(x[i], factor); },
      [=](int64_t i, const Word<T>(&words)[kUnroll]) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) store_word(x + i + u * kBlock * kPer, update(words[u]));
      },
      [=](int64_t i, const Word<T>& w) { store_word(x + i, update(w)); });
}

// The same for elements [start, end) of a strided or complex run.
template <int kBlock>
__device__ void scale_strided(const StridedRun& run, int64_t base, int64_t start, int64_t end,
                              const Factor& factor) {
  const int parts = run.is_complex ? 2 : 1;
  for (int64_t i = start + threadIdx.x; i < end; i += kBlock) {
    const int64_t element = parts * (base + strided_offset(run, i));
    for (int k = 0; k < parts; ++k)
      with_type(run.dtype, [&](auto type) {
        auto* x = static_cast<typename decltype(type)::type*>(run.data) + element + k;
        *x = scaled(*x, factor);
      });
  }
}

}  // namespace gradfuse::cuda
