// What the batch norm kernels share: groups of eight elements, the activations of scalars, sums
// that keep the range of float32, and how a channel's elements fall into chunks.
//
// A group is eight consecutive elements of a run along the contiguous axis: one byte of the mask. A
// run is [inner] of one channel, or, where inner is 1, [channels] with a channel per element.
#pragma once

#include "../math/batch_norm.h"
#include "../ops/batch_norm.h"
#include "common.cuh"
#include "reduce.cuh"

namespace gradfuse::cuda {

constexpr int kGroup = 8;

template <class T>
using Wide = typename Element<T>::Wide;

__device__ inline int32_t bits_of_float(float x) { return __float_as_int(x); }
__device__ inline float float_of_bits(int32_t bits) { return __int_as_float(bits); }

#include "../math/elementary.h"

__device__ inline float exponential(float x) { return exponential_float(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float hyperbolic_tangent(float x) { return hyperbolic_tangent_float(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }
__device__ inline float normal_cdf(float x) { return normal_cdf_float(x); }
__device__ inline double normal_cdf(double x) { return normcdf(x); }
__device__ inline float normal_density(float x) { return normal_density_float(x); }
__device__ inline double normal_density(double x) {
  return 0.39894228040143267794 * exp(-0.5 * x * x);
}

#include "../math/activation_functions.h"

// The tensor as runs of groups.
struct Runs {
  int64_t channels;
  int64_t length;  // elements of a run
  int64_t rows;  // runs
  int64_t groups;  // of a run
  bool by_row;  // an element's channel is its place in the run, not the run's

  explicit __host__ __device__ Runs(const BatchNormShape& s)
      : channels(s.channels),
        length(s.inner == 1 ? s.channels : s.inner),
        rows(s.mask_rows()),
        groups(s.mask_bytes_per_row()),
        by_row(s.inner == 1) {}
};

// Elements [0, count) of a group at p, widened; the rest are 0. Words of 16 bytes where p allows.
template <class T>
__device__ void load_group(const T* p, int count, Wide<T> (&x)[kGroup]) {
  constexpr int kPer = kPer16Bytes<T>;
  if (count == kGroup && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
    for (int w = 0; w < kGroup / kPer; ++w) {
      const Word<T> word = load_word(p + w * kPer);
#pragma unroll
      for (int e = 0; e < kPer; ++e) x[w * kPer + e] = Element<T>::widen(word.element[e]);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kGroup; ++e) x[e] = e < count ? Element<T>::widen(p[e]) : Wide<T>(0);
}
template <class T>
__device__ void store_group(T* p, int count, const Wide<T> (&x)[kGroup]) {
  constexpr int kPer = kPer16Bytes<T>;
  if (count == kGroup && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
    for (int w = 0; w < kGroup / kPer; ++w) {
      Word<T> word;
#pragma unroll
      for (int e = 0; e < kPer; ++e) word.element[e] = Element<T>::narrow(x[w * kPer + e]);
      store_word(p + w * kPer, word);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kGroup; ++e)
    if (e < count) p[e] = Element<T>::narrow(x[e]);
}

// Per-channel vectors [][channels] as a group takes them: its channel's for all eight elements, or,
// where channels are contiguous, each element's own.
template <class W>
struct Coefficients {
  const W* of_first;  // of the group's first channel, in the first vector
  int64_t channels;
  int count;
  bool by_row;

  __device__ void operator()(int k, W (&v)[kGroup]) const {
    const W* p = of_first + k * channels;
    if (by_row) return load_group(p, count, v);
    const W one = *p;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) v[e] = one;
  }
};

// Element i of a vector of channels.
__device__ inline double read_channel(ChannelRef v, int64_t i, double otherwise) {
  double value = otherwise;
  if (v.data)
    with_type(v.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      value = Element<T>::widen(static_cast<const T*>(v.data)[i]);
    });
  return value;
}
__device__ inline void write_channel(ChannelRef v, int64_t i, double value) {
  if (!v.data) return;
  with_type(v.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    static_cast<T*>(v.data)[i] = Element<T>::narrow(static_cast<Wide<T>>(value));
  });
}

// Sums of terms, and of products, in float64. A few float32 terms are first added up in float32,
// which consumer GPUs are 64 times faster at, unless one of them is too large or small to square.
struct TwoSums {
  double first = 0.0, second = 0.0;

  __device__ TwoSums operator+(const TwoSums& other) const {
    TwoSums s;
    s.first = first + other.first;
    s.second = second + other.second;
    return s;
  }

  template <class W>
  __device__ void add(const W (&x)[kGroup], const W (&y)[kGroup], const W (&z)[kGroup]) {
    bool fits = sizeof(W) == 4;
    if (fits) {
      W a = 0, b = 0, most = 0, least = W(1);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        const W product = y[e] * z[e];
        a += x[e];
        b += product;
        const W size = fabsf(product);
        most = size > most ? size : most;
        least = size < least && y[e] != W(0) && z[e] != W(0) ? size : least;
      }
      fits = most < W(1e30f) && least > W(1e-30f) && a == a && fabsf(a) < W(1e30f);
      if (fits) first += a, second += b;
    }
    if (fits) return;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      first += x[e];
      second += static_cast<double>(y[e]) * z[e];
    }
  }
};

// Whether float32 differences from a channel's first element are no good: one overflowed, or their
// squares would cancel, for that element lies more than 8 deviations from the mean.
__device__ inline bool left_range(const TwoSums& s, double elements) {
  return !isfinite(s.first) || !isfinite(s.second) ||
         65.0 * s.first * s.first > 64.0 * s.second * elements;
}
template <class W>
constexpr bool kLeavesRange = sizeof(W) == 4;

// (x - mean) * kShrink, from the mean times that.
template <class W>
__device__ W difference(W x, W shrunk_mean) {
  return x * static_cast<W>(kShrink) - shrunk_mean;
}

// Sums over the block, in a fixed order. Assumes blockDim.x == kThreads. Result valid in thread 0.
__device__ inline TwoSums block_sum(const TwoSums& mine) {
  return block_reduce<kThreads, cub::BLOCK_REDUCE_RAKING>(mine, Plus());
}

// A channel's groups fall into chunks, each summed by one block; where channels are contiguous, the
// rows do, and a block sums kTileColumns columns of a chunk. The sums lie in slots [chunk][2]
// [channels] and are added in the chunks' order. Chunks depend on sizes alone.
constexpr int kTileGroups = 32;  // of a tile, in columns
constexpr int kTileRows = kThreads / kTileGroups;
constexpr int64_t kMostChunks = 256;

struct Chunks {
  int64_t count;
  int64_t size;  // groups, or rows

  explicit __host__ __device__ Chunks(const BatchNormShape& s) {
    const Runs runs(s);
    const int64_t all = runs.by_row ? runs.rows : runs.rows / runs.channels * runs.groups;
    const int64_t least = runs.by_row ? kTileRows * 8 : kThreads * 4;
    size = (all + kMostChunks - 1) / kMostChunks;
    size = size < least ? least : size;
    count = (all + size - 1) / size;
  }
};

// Few enough groups of a channel for one block to keep in registers, between the sums and the
// sweep.
template <class T>
constexpr int kHeldGroups = sizeof(Wide<T>) == 8 ? 1 : 4;  // of a thread

inline bool fits_one_block(const BatchNormShape& s) {
  const Runs runs(s);
  const int held = s.dtype == DType::Double ? kHeldGroups<double> : kHeldGroups<float>;
  return !runs.by_row && runs.rows / runs.channels * runs.groups <= kThreads * held;
}

// Group q of a channel's.
struct Place {
  int64_t at;  // of its first element
  int64_t byte;  // of its mask
  int count;
};
__device__ inline Place place_of(const Runs& runs, int64_t row, int64_t group) {
  const int64_t left = runs.length - group * kGroup;
  return {row * runs.length + group * kGroup, row * runs.groups + group,
          left < kGroup ? static_cast<int>(left) : kGroup};
}
template <class W>
__device__ Coefficients<W> coefficients_of_group(const Runs& runs, int64_t row, int64_t group,
                                                 int count, const W* coefficients) {
  const int64_t first = runs.by_row ? group * kGroup : row % runs.channels;
  return {coefficients + first, runs.channels, count, runs.by_row};
}
__device__ inline Place place_in_channel(const Runs& runs, int64_t channel, int64_t q) {
  return place_of(runs, q / runs.groups * runs.channels + channel, q % runs.groups);
}

// Elements of a channel before its group q.
__device__ inline int64_t elements_before(const Runs& runs, int64_t q) {
  return q / runs.groups * runs.length + q % runs.groups * kGroup;
}

// Calls terms(place, channel, TwoSums&, wide) for a block's share of a channel's chunk, and leaves
// its sums in the slots. wide is false_type; if kAgain and the sums left their range, all is summed
// again with true_type. Grid: (channels, chunks), channels fastest.
template <bool kAgain, class Terms>
__device__ void sum_channel_chunk(const BatchNormShape& shape, double* slots, Terms terms) {
  const Runs runs(shape);
  const Chunks chunks(shape);
  const int64_t channel = blockIdx.x % runs.channels, chunk = blockIdx.x / runs.channels;
  const int64_t all = runs.rows / runs.channels * runs.groups;
  const int64_t first = chunk * chunks.size;
  const int64_t end = first + chunks.size < all ? first + chunks.size : all;
  const auto chunk_sum = [&](auto wide) {
    TwoSums mine;
    for (int64_t q = first + threadIdx.x; q < end; q += kThreads)
      terms(place_in_channel(runs, channel, q), channel, mine, wide);
    return block_sum(mine);
  };
  TwoSums sum = chunk_sum(std::false_type());
  if constexpr (kAgain) {
    const int64_t elements = elements_before(runs, end) - elements_before(runs, first);
    const bool again = threadIdx.x == 0 && left_range(sum, static_cast<double>(elements));
    if (__syncthreads_or(again)) sum = chunk_sum(std::true_type());
  }
  if (threadIdx.x == 0) {
    slots[chunk * 2 * runs.channels + channel] = sum.first;
    slots[(chunk * 2 + 1) * runs.channels + channel] = sum.second;
  }
}

// Where channels are contiguous: the group of columns that a thread sums. Grid as below.
__device__ inline int64_t group_of_thread(const Runs& runs) {
  const int64_t tiles = (runs.groups + kTileGroups - 1) / kTileGroups;
  return blockIdx.x % tiles * kTileGroups + threadIdx.x % kTileGroups;
}

// The same where channels are contiguous: terms(place, x, y, z) gives the eight terms x and
// products y * z of a group, as W or, if again, as double, which are added by column. Grid: (column
// tiles, chunks), tiles fastest.
template <class W, bool kAgain, class Terms>
__device__ void sum_row_chunk(const BatchNormShape& shape, double* slots, Terms terms) {
  const Runs runs(shape);
  const Chunks chunks(shape);
  const int64_t tiles = (runs.groups + kTileGroups - 1) / kTileGroups;
  const int64_t chunk = blockIdx.x / tiles;
  const int lane = threadIdx.x % kTileGroups, line = threadIdx.x / kTileGroups;
  const int64_t group = group_of_thread(runs);
  const int64_t first = chunk * chunks.size;
  const int64_t end = first + chunks.size < runs.rows ? first + chunks.size : runs.rows;
  // The block's lines are added one after another: 16 KiB hold a sum of each column at a time.
  __shared__ double shared[kTileRows][kTileGroups * kGroup];
  const auto column_sums = [&](auto type) {
    using V = decltype(type);
    double a[kGroup] = {}, b[kGroup] = {};
    if (group < runs.groups) {
      for (int64_t row = first + line; row < end; row += kTileRows) {
        V x[kGroup], y[kGroup], z[kGroup];
        terms(place_of(runs, row, group), x, y, z);
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          a[e] += x[e];
          b[e] += static_cast<double>(y[e]) * z[e];
        }
      }
    }
    TwoSums sums;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      __syncthreads();
#pragma unroll
      for (int e = 0; e < kGroup; ++e) shared[line][e * kTileGroups + lane] = k ? b[e] : a[e];
      __syncthreads();
      // Thread t adds up column (e, lane) = (t / 32, t % 32), as they lie in the shared memory.
      double& sum = k ? sums.second : sums.first;
#pragma unroll
      for (int l = 0; l < kTileRows; ++l) sum += shared[l][threadIdx.x];
    }
    return sums;
  };
  TwoSums sums = column_sums(W());
  if constexpr (kAgain)
    if (__syncthreads_or(left_range(sums, static_cast<double>(end - first))))
      sums = column_sums(double());
  const int64_t column = group * kGroup + line;
  if (column >= runs.channels) return;
  slots[chunk * 2 * runs.channels + column] = sums.first;
  slots[(chunk * 2 + 1) * runs.channels + column] = sums.second;
}

// The chunks' sums of a channel, added in order.
__device__ inline TwoSums sum_of_chunks(const BatchNormShape& shape, const double* slots,
                                        int64_t channel) {
  TwoSums s;
  const int64_t count = Chunks(shape).count;
  for (int64_t k = 0; k < count; ++k) {
    s.first += slots[k * 2 * shape.channels + channel];
    s.second += slots[(k * 2 + 1) * shape.channels + channel];
  }
  return s;
}

// Blocks of a one-dimensional grid, checked against its limit.
inline unsigned blocks_for(int64_t blocks) {
  if (blocks > 0x7fffffff)
    throw std::runtime_error("batch_norm_act: expected at most 2^31 - 1 blocks, got " +
                             std::to_string(blocks));
  return static_cast<unsigned>(blocks);
}
inline int64_t sum_blocks(const BatchNormShape& s) {
  const Runs runs(s);
  const int64_t tiles = (runs.groups + kTileGroups - 1) / kTileGroups;
  return Chunks(s).count * (runs.by_row ? tiles : runs.channels);
}
inline int64_t sweep_blocks(const BatchNormShape& s) {
  const Runs runs(s);
  return (runs.rows * runs.groups + kThreads - 1) / kThreads;
}
inline int64_t channel_blocks(const BatchNormShape& s) {
  return (s.channels + kThreads - 1) / kThreads;
}

// Scratch: the slots, then the coefficients [7][channels] of the elements' type.
inline double* slots_of(void* scratch) { return static_cast<double*>(scratch); }
inline void* coefficients_of(const BatchNormShape& s, void* scratch) {
  return static_cast<double*>(scratch) + Chunks(s).count * 2 * s.channels;
}

}  // namespace gradfuse::cuda
