// Shared by the batch norm kernels: the tensor as runs of groups, and per-channel values.
//
// A run is [inner] of one channel, or, where inner is 1, [channels] with a channel per element.
#pragma once

#include "../math/batch_norm.h"
#include "../ops/batch_norm_channel.h"
#include "groups.cuh"

namespace gradfuse::cuda {

// The tensor as runs of groups.
struct Runs {
  int64_t channels;
  int64_t length;  // elements of a run
  int64_t rows;  // runs
  int64_t groups;  // of a run
  bool by_row;  // an element's channel is its index in the run; all runs have the same

  explicit __host__ __device__ Runs(const BatchNormShape& s)
      : channels(s.channels),
        length(s.inner == 1 ? s.channels : s.inner),
        rows(s.mask_rows()),
        groups(s.mask_bytes_per_row()),
        by_row(s.inner == 1) {}

  __host__ __device__ int64_t groups_of_channel() const { return rows / channels * groups; }
};

__device__ inline Place place_of(const Runs& runs, int64_t row, int64_t group) {
  const int64_t left = runs.length - group * kGroup;
  return {row * runs.length + group * kGroup, row * runs.groups + group,
          left < kGroup ? static_cast<int>(left) : kGroup, row};
}
// Of a channel's group q, if the channel has one before `end`.
__device__ inline Place place_in_channel(const Runs& runs, int64_t channel, int64_t q,
                                         int64_t end) {
  if (q >= end) return {};
  return place_of(runs, q / runs.groups * runs.channels + channel, q % runs.groups);
}

// Reads per-channel vectors [][channels] for a group: one value for all eight elements or, if
// channels are contiguous, one for each.
template <class W>
struct Coefficients {
  const W* of_first;  // the group's first channel in the first vector
  int64_t channels;
  int count;
  bool by_row;

  __device__ void operator()(int k, W (&v)[kGroup]) const {
    const W* p = of_first + k * channels;
    if (!by_row) {
      const W one = count ? *p : W(0);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) v[e] = one;
    } else if (count == kGroup && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      constexpr int kPer = kPer16Bytes<W>;
#pragma unroll
      for (int w = 0; w < kGroup / kPer; ++w) {
        const Word<W> word = load_word(p + w * kPer);
#pragma unroll
        for (int e = 0; e < kPer; ++e) v[w * kPer + e] = word.element[e];
      }
    } else {
#pragma unroll
      for (int e = 0; e < kGroup; ++e) v[e] = e < count ? p[e] : W(0);
    }
  }
};
template <class W>
__device__ Coefficients<W> coefficients_of_group(const Runs& runs, int64_t row, int64_t group,
                                                 int count, const W* coefficients) {
  const int64_t first = runs.by_row ? group * kGroup : row % runs.channels;
  return {coefficients + first, runs.channels, count, runs.by_row};
}

// Vectors of channels.
struct Vectors {
  static __device__ double read(ChannelRef v, int64_t i, double otherwise) {
    double value = otherwise;
    if (v.data)
      with_type(v.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        value = Element<T>::widen(static_cast<const T*>(v.data)[i]);
      });
    return value;
  }
  static __device__ void write(ChannelRef v, int64_t i, double value) {
    if (!v.data) return;
    with_type(v.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      static_cast<T*>(v.data)[i] = Element<T>::narrow(static_cast<Wide<T>>(value));
    });
  }
};

// What a group of the normalised input is multiplied by.
template <class W>
__device__ W branch_factor(BranchScale scale, const BatchNormShape& shape, const Place& place) {
  if (!scale.data || !place.count) return W(1);
  const int64_t outer = shape.inner == 1 ? place.row : place.row / shape.channels;
  return static_cast<const W*>(scale.data)[outer];
}
// The same, where what has 0 is left out.
template <class W>
__device__ W scaled_branch(W v, W factor) {
  return factor == W(0) ? W(0) : v * factor;
}

// (x - mean) * kShrink, given mean * kShrink.
template <class W>
__device__ W difference(W x, W shrunk_mean) {
  return x * static_cast<W>(kShrink) - shrunk_mean;
}

// Blocks of a one-dimensional grid, checked against its limit.
inline unsigned blocks_for(int64_t blocks) {
  if (blocks > 0x7fffffff)
    throw std::runtime_error("batch_norm_act: expected at most 2^31 - 1 blocks, got " +
                             std::to_string(blocks));
  return static_cast<unsigned>(blocks);
}

// A sweep has a thread per group. Its first blocks take the last groups: those the sums read last,
// so that the L2 cache still holds them.
inline int64_t sweep_blocks(const BatchNormShape& s) {
  const Runs runs(s);
  return divided_up(runs.rows * runs.groups, kThreads);
}
struct SweptGroup {
  int64_t row = 0, group = 0;
  Place place;

  explicit __device__ SweptGroup(const Runs& runs) {
    const int64_t block = gridDim.x - 1 - blockIdx.x;
    const int64_t i = block * kThreads + threadIdx.x;
    if (i >= runs.rows * runs.groups) return;
    row = i / runs.groups;
    group = i % runs.groups;
    place = place_of(runs, row, group);
  }
};

}  // namespace gradfuse::cuda
