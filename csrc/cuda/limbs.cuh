// A block's share of an exact sum of squares: limbs in shared memory, to which threads add
// integers. Their order changes no bit.
#pragma once

#include "../math/limbs.h"
#include "common.cuh"

namespace gradfuse::cuda {

// The narrow form has a column of words for each thread, so that no two add to one. The wide form
// has one for each lane, to which the block's warps add atomically.
template <bool kWide>
class BlockLimbs {
 public:
  static constexpr LimbForm kForm = kWide ? kWideLimbs : kNarrowLimbs;
  static constexpr int kColumns = kWide ? 32 : kThreads;
  struct Storage {
    int64_t words[kForm.words()][kColumns];
  };
  using Element = std::conditional_t<kWide, double, float>;

  // Ends with a barrier.
  __device__ explicit BlockLimbs(Storage& storage) : storage_(storage) {
    for (int i = threadIdx.x; i < kForm.words() * kColumns; i += kThreads)
      storage_.words[i / kColumns][i % kColumns] = 0;
    __syncthreads();
  }

  __device__ void add_square(Element x) {
    each_part_of_square(kForm, x, [this](int32_t word, int64_t value) {
      int64_t& mine = storage_.words[word][threadIdx.x % kColumns];
      if (kWide)
        atomic_add(&mine, value);
      else
        mine += value;
    });
  }

  // Adds all columns to `words` in global memory: less than 2^40 + 2^34 to a limb. A column's words
  // are below 2^62 if the block has added up to 2^24 squares.
  __device__ void add_to(int64_t* words) const {
    __syncthreads();
    for (int w = threadIdx.x / 32; w < kForm.words(); w += kThreads / 32) {
      int64_t low = 0, high = 0;  // of 40 bits, and above
      for (int c = threadIdx.x % 32; c < kColumns; c += 32) {
        const int64_t word = storage_.words[w][c];
        low += word & kLimbMask;
        high += word >> kLimbBits;
      }
      for (int distance = 16; distance > 0; distance /= 2) {
        low += __shfl_down_sync(~0u, low, distance);
        high += __shfl_down_sync(~0u, high, distance);
      }
      if (threadIdx.x % 32 != 0) continue;
      // The last limb and the counts have no limb above them.
      const bool has_next = w < kForm.limbs - 1;
      const int64_t own = has_next ? low & kLimbMask : low + (high << kLimbBits);
      if (own != 0) atomic_add(words + w, own);
      const int64_t over = high + (low >> kLimbBits);
      if (has_next && over != 0) atomic_add(words + w + 1, over);
    }
  }

 private:
  static constexpr int64_t kLimbMask = (int64_t{1} << kLimbBits) - 1;

  static __device__ void atomic_add(int64_t* to, int64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
  }

  Storage& storage_;
};

}  // namespace gradfuse::cuda
