// Shared by the batch norm kernels: groups of eight elements, how a warp reads and writes them, and
// per-channel values.
//
// A group is eight consecutive elements of a run along the contiguous axis: one byte of the mask. A
// run is [inner] of one channel, or, where inner is 1, [channels] with a channel per element.
#pragma once

#include "../math/batch_norm.h"
#include "../ops/batch_norm.h"
#include "common.cuh"

namespace gradfuse::cuda {

constexpr int kGroup = 8;
constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
using Wide = typename Element<T>::Wide;

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

// Position of a thread's group.
struct Place {
  int64_t at = 0;  // of its first element
  int64_t byte = 0;  // of its mask
  int count = 0;  // of its elements; 0 if the thread has none
};
__device__ inline Place place_of(const Runs& runs, int64_t row, int64_t group) {
  const int64_t left = runs.length - group * kGroup;
  return {row * runs.length + group * kGroup, row * runs.groups + group,
          left < kGroup ? static_cast<int>(left) : kGroup};
}
// Of a channel's group q, if the channel has one before `end`.
__device__ inline Place place_in_channel(const Runs& runs, int64_t channel, int64_t q,
                                         int64_t end) {
  if (q >= end) return {};
  return place_of(runs, q / runs.groups * runs.channels + channel, q % runs.groups);
}

// A group as it lies in memory. What is loaded stays so until it is used, for loads overlap only
// where nothing waits for them.
template <class T>
struct Packed {
  static constexpr int kPer = kPer16Bytes<T>;
  static constexpr int kWords = kGroup / kPer;
  Word<T> word[kWords];

  __device__ Wide<T> operator[](int e) const {
    return Element<T>::widen(word[e / kPer].element[e % kPer]);
  }
};

// Reads and writes groups of tensors of one shape. All lanes of a warp take part in each call.
//
// Where every run begins at a 16-byte boundary, groups are accessed in words, elsewhere, as in maps
// of 7 x 7, by element. A warp takes the words or elements of its 32 groups in turns: the lanes of
// a turn access neighbours, and pass them on in shared memory. So a warp touches as few sectors of
// 32 bytes as there are, where threads for themselves would touch each up to eight times. Words are
// loaded without turns: the cache next to the multiprocessor holds a sector's other half.
template <class T, int kBlock = kThreads>
struct Groups {
  using W = Wide<T>;
  static constexpr int kWords = Packed<T>::kWords;
  static constexpr int kPer = Packed<T>::kPer;

  int64_t run_bytes;

  explicit __device__ Groups(const Runs& runs)
      : run_bytes(runs.length * static_cast<int64_t>(sizeof(T))) {}

  __device__ Packed<T> load(const void* data, const Place& place) const {
    const T* p = static_cast<const T*>(data);
    Packed<T> x;
    if (in_words(data)) {
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        if (w * kPer < place.count) x.word[w] = load_word(p + place.at + w * kPer);
      return x;
    }
    T turn[kGroup];
    for_each_turn<kGroup>(place, [&](int k, int64_t at, bool exists) {
      turn[k] = exists ? p[at] : Element<T>::narrow(W(0));
    });
    Word<T>* const passed = words_of_warp();
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kGroup; ++k) passed->element[k * kWarp + lane()] = turn[k];
    __syncwarp();
#pragma unroll
    for (int w = 0; w < kWords; ++w) x.word[w] = passed[lane() * kWords + w];
    return x;
  }

  __device__ void store(void* data, const Place& place, const W (&x)[kGroup]) const {
    T* p = static_cast<T*>(data);
    Packed<T> out;
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      out.word[e / kPer].element[e % kPer] = Element<T>::narrow(x[e]);
    if (kWords == 1 && in_words(data)) {
      if (place.count) store_word(p + place.at, out.word[0]);
      return;
    }
    Word<T>* const passed = words_of_warp();
    __syncwarp();
#pragma unroll
    for (int w = 0; w < kWords; ++w) passed[lane() * kWords + w] = out.word[w];
    __syncwarp();
    if (in_words(data))
      for_each_turn<kWords>(place, [&](int k, int64_t at, bool exists) {
        if (exists) store_word(p + at, passed[k * kWarp + lane()]);
      });
    else
      for_each_turn<kGroup>(place, [&](int k, int64_t at, bool exists) {
        if (exists) p[at] = passed->element[k * kWarp + lane()];
      });
  }

 private:
  static __device__ int lane() { return threadIdx.x % kWarp; }

  __device__ bool in_words(const void* data) const {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(run_bytes)) % 16 == 0;
  }

  static __device__ Word<T>* words_of_warp() {
    __shared__ uint4 words[kBlock * kWords];  // a Word has a constructor
    return reinterpret_cast<Word<T>*>(words) + threadIdx.x / kWarp * kWarp * kWords;
  }

  // Calls f(turn, at, whether it exists) with the position of each of this lane's parts of groups.
  // A group has kParts; those of all the warp's groups go to its lanes in order.
  template <int kParts, class F>
  static __device__ void for_each_turn(const Place& place, F f) {
    constexpr int kCountBits = 4;
    static_assert(kGroup < 1 << kCountBits, "a place passes in one shuffle");
    const long long mine = static_cast<long long>(place.at) << kCountBits | place.count;
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const int owner = (k * kWarp + lane()) / kParts;
      const int64_t theirs = __shfl_sync(kWholeWarp, mine, owner);
      const int e = lane() % kParts * (kGroup / kParts);
      f(k, (theirs >> kCountBits) + e, e < (theirs & ((1 << kCountBits) - 1)));
    }
  }
};

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
