// Shared by the row norm kernels: the threads of a row and their sums, a row's addends.
//
// A team of threads has a row: a warp, or a few of one block. Each thread has the groups of eight
// elements at its place and every team's length further on.
#pragma once

#include <cmath>

#include "../math/row_norm.h"
#include "../ops/row_norm.h"
#include "groups.cuh"

namespace gradfuse::cuda {

struct Team {
  int size;   // threads: a power of two from 32 to the block's
  int index;  // of the team in its block
  int lane;   // of the thread in its team

  explicit __device__ Team(int threads)
      : size(threads),
        index(static_cast<int>(threadIdx.x) / threads),
        lane(static_cast<int>(threadIdx.x) % threads) {}
};

// Two sums over a row.
struct RowMoments {
  double sum = 0.0, squares = 0.0;
};

// Combines a value of each thread over its team, in a fixed order. All threads of the block call it
// and get the result.
template <int kBlock, class V, class Op>
__device__ V over_team(V mine, const Team& team, Op op) {
  __shared__ V of_warps[kBlock / kWarp];
  mine = op.over_warp(mine);
  if (team.size == kWarp) return mine;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  const int warps = team.size / kWarp;
  V all = of_warps[team.index * warps];
  for (int w = 1; w < warps; ++w) all = op(all, of_warps[team.index * warps + w]);
  return all;
}
template <class Op>
__device__ double over_warp_by(double mine, Op op, int first_step = kWarp / 2) {
#pragma unroll
  for (int step = first_step; step > 0; step /= 2)
    mine = op(mine, __shfl_xor_sync(kWholeWarp, mine, step));
  return mine;
}
struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
  __device__ double over_warp(double mine) const { return over_warp_by(mine, *this); }
};
struct Larger {
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
  __device__ double over_warp(double mine) const { return over_warp_by(mine, *this); }
};
struct AddMoments {
  __device__ RowMoments operator()(RowMoments a, const RowMoments& b) const {
    a.sum += b.sum;
    a.squares += b.squares;
    return a;
  }
  // Half of the lanes add the one sum, half the other: float64 is slow.
  __device__ RowMoments over_warp(const RowMoments& mine) const {
    constexpr int kHalf = kWarp / 2;
    const bool upper = (threadIdx.x % kWarp) >= kHalf;
    const double sent = upper ? mine.sum : mine.squares;
    const double got = __shfl_xor_sync(kWholeWarp, sent, kHalf);
    const double total = over_warp_by((upper ? mine.squares : mine.sum) + got, Add(), kHalf / 2);
    RowMoments all;
    all.sum = __shfl_sync(kWholeWarp, total, 0);
    all.squares = __shfl_sync(kWholeWarp, total, kHalf);
    return all;
  }
};
// Whether any thread's team needs something; for each team alone if it is a warp.
__device__ inline bool any_needs(bool mine, const Team& team) {
  return team.size == kWarp ? mine : __syncthreads_or(mine) != 0;
}

// A group of T, or of the type that T is computed in, as it lies in memory.
template <class T>
struct Mixed {
  using W = Wide<T>;
  static constexpr int kPer = kPer16Bytes<W>;
  uint4 raw[kGroup / kPer] = {};

  __device__ W get(int e, bool is_own) const {
    if (is_own) {
      Word<T> word;
      word.raw = raw[e / kPer16Bytes<T>];
      return Element<T>::widen(word.element[e % kPer16Bytes<T>]);
    }
    Word<W> word;
    word.raw = raw[e / kPer];
    return word.element[e % kPer];
  }
};

// Reads and writes groups of either type. All lanes of a warp take part in each call.
template <class T, int kBlock>
struct MixedGroups {
  using W = Wide<T>;
  Groups<T, kBlock> own;
  Groups<W, kBlock> wide;

  explicit __device__ MixedGroups(int64_t width) : own(width), wide(width) {}

  __device__ Mixed<T> load(const void* data, bool is_own, const Place& place) const {
    Mixed<T> x;
    if (is_own) {
      const Packed<T> packed = own.load(data, place);
#pragma unroll
      for (int w = 0; w < Packed<T>::kWords; ++w) x.raw[w] = packed.word[w].raw;
    } else {
      const Packed<W> packed = wide.load(data, place);
#pragma unroll
      for (int w = 0; w < Packed<W>::kWords; ++w) x.raw[w] = packed.word[w].raw;
    }
    return x;
  }
  __device__ void store(void* data, bool is_own, const Place& place, const W (&x)[kGroup]) const {
    if (is_own)
      own.store(data, place, x);
    else
      wide.store(data, place, x);
  }
};

// Whether each of eight elements from `at` on stays, by bit.
__device__ inline unsigned kept_of_group(const Dropout& dropout, int64_t at) {
  const RandomStream stream = random_stream(dropout.seed);
  const uint16_t upper = upper_half(dropout.threshold), lower = lower_half(dropout.threshold);
  const int before = static_cast<int>(at % kDropoutBlock);
  const uint64_t first = static_cast<uint64_t>(at / kDropoutBlock);
  unsigned kept = 0, undecided = 0;
  // A row's groups begin within a block where its width is no multiple of eight.
  for (int b = 0; b < (before ? 2 : 1); ++b) {
    const Philox random = random_block(stream, first + b);
#pragma unroll
    for (int i = 0; i < kDropoutBlock; ++i) {
      const uint16_t half = half_of_block(random, i);
      kept |= (half >= upper ? 1u : 0u) << (b * kDropoutBlock + i);
      undecided |= (half == upper ? 1u : 0u) << (b * kDropoutBlock + i);
    }
  }
  while (undecided && lower) {
    const int i = __ffs(static_cast<int>(undecided)) - 1;
    undecided &= undecided - 1;
    const uint64_t block = first + static_cast<uint64_t>(i / kDropoutBlock);
    const Philox random = random_block(stream, block | kLowerHalves);
    const int j = i % kDropoutBlock;
    const uint32_t word = j < 4 ? (j < 2 ? random.word[0] : random.word[1])
                                : (j < 6 ? random.word[2] : random.word[3]);
    if (static_cast<uint16_t>(word >> (j % 2 * 16)) < lower) kept &= ~(1u << i);
  }
  return kept >> before;
}

// residual + factor * dropout(input) of one row, by group.
template <class T, int kBlock>
struct RowAddends {
  using W = Wide<T>;
  const RowSum& sum;
  const MixedGroups<T, kBlock>& groups;
  bool residual_is_own, sum_is_own;
  W factor;

  __device__ RowAddends(const RowSum& addends, const RowNormShape& shape,
                        const MixedGroups<T, kBlock>& given, int64_t row)
      : sum(addends),
        groups(given),
        residual_is_own(shape.residual_dtype == shape.dtype),
        sum_is_own(shape.sum_dtype == shape.dtype),
        factor(factor_of(addends, shape, row)) {}

  static __device__ W factor_of(const RowSum& addends, const RowNormShape& shape, int64_t row) {
    if (row >= shape.rows) return W(0);
    double f = addends.sample_scale ? addends.sample_scale[row / addends.rows_per_sample] : 1.0;
    if (addends.dropout.seed) f *= addends.dropout.scale;
    return static_cast<W>(f);
  }

  struct Loaded {
    Packed<T> input;
    Mixed<T> residual;
  };
  __device__ Loaded load(const Place& place) const {
    Loaded x;
    x.input = groups.own.load(sum.input, place);
    if (sum.residual) x.residual = groups.load(sum.residual, residual_is_own, place);
    return x;
  }
  // What each element of a group is multiplied by.
  __device__ W factor_of_element(unsigned kept, int e) const {
    return kept >> e & 1u ? factor : W(0);
  }
  __device__ unsigned kept(const Place& place) const {
    return sum.dropout.seed && place.count ? kept_of_group(sum.dropout, place.at) : 0xffu;
  }
  __device__ void combine(const Loaded& x, const Place& place, W (&v)[kGroup]) const {
    const unsigned stays = kept(place);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      v[e] = sum.residual ? x.residual.get(e, residual_is_own) : W(0);
      const W f = factor_of_element(stays, e);
      if (f != W(0)) v[e] += x.input[e] * f;
      if (sum_is_own) v[e] = Element<T>::widen(Element<T>::narrow(v[e]));
    }
  }
};

// A group of a vector [width].
template <class W>
__device__ void read_vector(const RowVector& v, int64_t first, int count, W otherwise, W offset,
                            W (&x)[kGroup]) {
#pragma unroll
  for (int e = 0; e < kGroup; ++e) x[e] = otherwise;
  if (!v.data || !count) return;
  with_type(v.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* p = static_cast<const T*>(v.data) + first;
    constexpr int kPer = kPer16Bytes<T>;
    if (count == kGroup && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
#pragma unroll
      for (int w = 0; w < kGroup / kPer; ++w) {
        const Word<T> word = load_word(p + w * kPer);
#pragma unroll
        for (int e = 0; e < kPer; ++e)
          x[w * kPer + e] = static_cast<W>(Element<T>::widen(word.element[e])) + offset;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
        if (e < count) x[e] = static_cast<W>(Element<T>::widen(p[e])) + offset;
    }
  });
}

template <class W>
__device__ W normalised(W v, const RowNormalisation<W>& n) {
  return (v * n.scale - n.mean) * n.inverse + n.offset;
}

// The place of a thread's k-th group in its row.
__device__ inline Place place_in_row(const RowNormShape& shape, int64_t row, int64_t group) {
  const int64_t left = shape.width - group * kGroup;
  if (row >= shape.rows || left <= 0) return {};
  return {row * shape.width + group * kGroup, 0, left < kGroup ? static_cast<int>(left) : kGroup};
}

// The fewest threads that hold a row with this many groups each, up to `most`.
inline int team_threads(int64_t width, int held, int most) {
  const int64_t groups = divided_up(width, kGroup);
  int threads = kWarp;
  while (threads < most && static_cast<int64_t>(threads) * held < groups) threads *= 2;
  return threads;
}
inline bool fits_team(int64_t width, int held, int threads) {
  return divided_up(width, kGroup) <= static_cast<int64_t>(held) * threads;
}

inline unsigned row_blocks(int64_t blocks) {
  if (blocks > 0x7fffffff)
    throw std::runtime_error("row_norm: expected at most 2^31 - 1 blocks, got " +
                             std::to_string(blocks));
  return static_cast<unsigned>(blocks);
}

}  // namespace gradfuse::cuda
