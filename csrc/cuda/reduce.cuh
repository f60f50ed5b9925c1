// Reductions over a block, in a fixed order.
#pragma once

#include <cub/block/block_reduce.cuh>

#include "common.cuh"

namespace gradfuse::cuda {

struct Plus {
  template <class T>
  __device__ T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

// op over the block's threads, in thread order. Assumes blockDim.x == kBlock. Result valid in
// thread 0. A second call with the same types needs a barrier in between.
template <int kBlock, cub::BlockReduceAlgorithm kAlgorithm = cub::BLOCK_REDUCE_WARP_REDUCTIONS,
          class T, class Op>
__device__ T block_reduce(const T& mine, Op op) {
  using Reduce = cub::BlockReduce<T, kBlock, kAlgorithm>;
  __shared__ typename Reduce::TempStorage storage;
  return Reduce(storage).Reduce(mine, op);
}

}  // namespace gradfuse::cuda
