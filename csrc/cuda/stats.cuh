// Stats of one run by one block: each thread's share in registers, then a fixed-order reduction.
//
// Squares are summed in float32 over the words a thread has in flight and in float64 beyond. A
// group whose squares overflow or vanish in float32, or that is not finite, is summed again in
// float64 from the same registers, so memory is read once whatever the values, and consumer GPUs do
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

// The largest and the least magnitude of finite elements. float32 has instructions for them, which
// pass over NaN; float64 is compared as integers.
template <class Wide>
struct Extremes {
  float largest = 0.0f, least = INFINITY;
  __device__ void take(float x) {
    largest = fmaxf(largest, fabsf(x));
    least = fminf(least, fabsf(x));
  }
  __device__ double top() const { return largest; }
  __device__ uint32_t top_bits() const { return __float_as_uint(largest); }
  __device__ bool has_zero() const { return least == 0.0f; }
};
template <>
struct Extremes<double> {
  uint64_t largest = 0, least = ~0ull;
  __device__ void take(double x) {
    const uint64_t bits = magnitude_bits(x);
    largest = bits > largest ? bits : largest;
    least = bits < least ? bits : least;
  }
  __device__ double top() const { return from_bits(largest); }
  __device__ uint64_t top_bits() const { return largest; }
  __device__ bool has_zero() const { return least == 0; }
};

// Whether the squares of a group with this largest magnitude may be summed unscaled. Those of
// float16 always may.
template <class T>
__device__ bool squares_are_safe(double largest) {
  if (std::is_same_v<T, __half>) return largest > 0.0;
  if (std::is_same_v<T, double>) return largest >= kSafeDoubleMin && largest <= kSafeDoubleMax;
  return largest >= kSafeFloatMin && largest <= kSafeFloatMax;
}

// What is summed of the elements, besides their squares.
enum class Sums { Squares, Magnitudes, Powers };

// One thread's share. Powers: the norm is NormKind::P, and every element is raised to spec.p.
template <class T, Sums kSums>
struct ThreadStats {
  using Wide = typename Element<T>::Wide;
  using Bits = std::conditional_t<sizeof(Wide) == 8, uint64_t, uint32_t>;
  static constexpr bool kScales = sizeof(Wide) == 8;  // float64 holds the squares of float32

  ScaledSum l2 = {0.0, 0};
  ScaledSum lp = {0.0, 0};
  Bits largest = 0;  // integer order is magnitude order, NaN above all
  int64_t nonfinite = 0;
  int64_t zeros = 0;

  template <int kCount>
  __device__ void take(const Wide (&x)[kCount], NormSpec spec) {
    if constexpr (kSums == Sums::Powers) return take_carefully(x, spec);  // pow takes longer anyway
    Extremes<Wide> extremes;
    Wide squares = 0, magnitudes = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      extremes.take(x[i]);
      squares += x[i] * x[i];
      if (kSums == Sums::Magnitudes) magnitudes += abs_of(x[i]);
    }
    const double amax = extremes.top();
    // Not if an element is NaN or infinite, or all are 0.
    const bool safe = squares_are_safe<T>(amax) && squares < static_cast<Wide>(INFINITY);
    if (__builtin_expect(safe, 1)) {
      add_squares(squares, 0);
      if (kSums == Sums::Magnitudes) add_magnitudes(magnitudes, 0);
      largest = extremes.top_bits() > largest ? extremes.top_bits() : largest;
      if (extremes.has_zero()) zeros += count(x, [](Bits bits) { return bits == 0; });
    } else {
      take_carefully(x, spec);
    }
  }

  __device__ Stats finish() const {
    const double amax = from_bits(largest);
    if (largest >= kInfinityBits<Wide>) return {{amax, 0}, {amax, 0}, amax, nonfinite, zeros};
    return {l2, lp, amax, nonfinite, zeros};
  }

 private:
  // The same for any elements.
  template <int kCount>
  __device__ void take_carefully(const Wide (&x)[kCount], NormSpec spec) {
    Bits top = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) top = magnitude_bits(x[i]) > top ? magnitude_bits(x[i]) : top;
    largest = top > largest ? top : largest;
    zeros += count(x, [](Bits bits) { return bits == 0; });
    if (top == 0) return;
    if (top >= kInfinityBits<Wide>) {
      nonfinite += count(x, [](Bits bits) { return bits >= kInfinityBits<Wide>; });
      return;
    }
    const double amax = from_bits(top);
    const int32_t e = kScales ? scale_exponent(amax) : 0;
    add_squares(scaled_sum<true>(x, e), e);
    if (kSums == Sums::Magnitudes) add_magnitudes(scaled_sum<false>(x, e), e);
    if constexpr (kSums == Sums::Powers) add_powers(x, amax, spec.p);
  }

  __device__ void add_squares(double sum, int32_t exponent) {
    if (kScales)
      l2 = add(l2, {sum, static_cast<double>(exponent)}, 2.0);
    else
      l2.value += sum;
  }
  __device__ void add_magnitudes(double sum, int32_t exponent) {
    if (kScales)
      lp = add(lp, {sum, static_cast<double>(exponent)}, 1.0);
    else
      lp.value += sum;
  }
  // Of |x / amax|^p: for every p the largest term is 1.
  template <int kCount>
  __device__ void add_powers(const Wide (&x)[kCount], double amax, double p) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += pow(fabs(x[i] / amax), p);
    lp = add(lp, {sum, log2(amax)}, p);
  }

  static __device__ float abs_of(float x) { return fabsf(x); }
  static __device__ double abs_of(double x) { return fabs(x); }

  template <int kCount, class Test>
  static __device__ int count(const Wide (&x)[kCount], Test test) {
    int found = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) found += test(magnitude_bits(x[i]));
    return found;
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

// This thread's stats of x[0..n), dense, kUnroll words at a time. Calls also(element) for each.
struct Nothing {
  template <class Wide>
  __device__ void operator()(Wide) const {}
};
template <class T, int kBlock, int kUnroll, Sums kSums, class Also = Nothing>
__device__ Stats thread_stats(const T* x, int64_t n, NormSpec spec, Also also = {}) {
  using Wide = typename Element<T>::Wide;
  constexpr int kPer = kPer16Bytes<T>;
  ThreadStats<T, kSums> stats;
  const auto take = [&](const auto& wide) {
    stats.take(wide, spec);
    for (const Wide& each : wide) also(each);
  };
  visit_run<T, kBlock, kUnroll>(
      x, n,
      [&](int64_t i) {
        const Wide one[1] = {Element<T>::widen(x[i])};
        take(one);
      },
      [&](int64_t, const Word<T>(&words)[kUnroll]) {
        Wide wide[kUnroll * kPer];
#pragma unroll
        for (int i = 0; i < kUnroll * kPer; ++i)
          wide[i] = Element<T>::widen(words[i / kPer].element[i % kPer]);
        take(wide);
      },
      [&](int64_t, const Word<T>& word) {
        Wide wide[kPer];
#pragma unroll
        for (int i = 0; i < kPer; ++i) wide[i] = Element<T>::widen(word.element[i]);
        take(wide);
      });
  return stats.finish();
}

// This thread's stats of elements [start, end) of a strided or complex run whose first element is
// `base` elements after its data. All types in float64; a complex element counts by its modulus.
// Calls also(part) for each part.
template <int kBlock, Sums kSums, class Also = Nothing>
__device__ Stats strided_thread_stats(const StridedRun& run, int64_t base, int64_t start,
                                      int64_t end, NormSpec spec, Also also = {}) {
  ThreadStats<double, kSums> stats;
  for (int64_t i = start + threadIdx.x; i < end; i += kBlock) {
    const int64_t element = base + strided_offset(run, i);
    double one[1];
    if (run.is_complex) {
      const double real = load_element(run, 2 * element), imag = load_element(run, 2 * element + 1);
      one[0] = hypot(real, imag);
      also(real);
      also(imag);
    } else {
      one[0] = load_element(run, element);
      also(one[0]);
    }
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
