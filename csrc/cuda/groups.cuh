// Groups of eight elements: how a warp reads and writes them. Shared by the kernels of the norms.
//
// A group is eight consecutive elements of a run along the contiguous axis: one byte of a mask, one
// block of a dropout's random numbers.
#pragma once

#include "common.cuh"

namespace gradfuse::cuda {

constexpr int kGroup = 8;
constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
using Wide = typename Element<T>::Wide;

// Position of a thread's group.
struct Place {
  int64_t at = 0;  // of its first element
  int64_t byte = 0;  // of its mask
  int count = 0;  // of its elements; 0 if the thread has none
  int64_t row = 0;  // of its run
};

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
// `length` is that of a run. Where every run begins at a 16-byte boundary, groups are accessed in
// words, elsewhere, as in maps of 7 x 7, by element. A warp takes the words or elements of its 32
// groups in turns: the lanes of a turn access neighbours, and pass them on in shared memory. So a
// warp touches as few sectors of 32 bytes as there are, where threads for themselves would touch
// each up to eight times. Words are loaded without turns: the cache next to the multiprocessor
// holds a sector's other half.
template <class T, int kBlock = kThreads>
struct Groups {
  using W = Wide<T>;
  static constexpr int kWords = Packed<T>::kWords;
  static constexpr int kPer = Packed<T>::kPer;

  int64_t run_bytes;

  // `length`: elements of a run.
  explicit __device__ Groups(int64_t length)
      : run_bytes(length * static_cast<int64_t>(sizeof(T))) {}

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

}  // namespace gradfuse::cuda
