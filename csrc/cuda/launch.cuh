// Many tensors in few launches: a kernel's parameters hold the metadata of up to kCapacity runs, in
// which each block finds its run. So no metadata is copied, and a captured graph contains it. A
// launch sends all its parameters, however few runs there are.
#pragma once

#include "common.cuh"

namespace gradfuse::cuda {

// A grid has at most 2^31 - 1 blocks.
constexpr int64_t kMostBlocks = INT32_MAX;
inline unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }

// Since CUDA 12.1 a kernel takes up to 32,764 bytes of parameters.
constexpr size_t kMostParameterBytes = 32000;

// Runs of a launch, and of one for the models that have fewer: ResNet-50 has 161 parameters, GPT-2
// 148.
constexpr int kManyRuns = 1024;
constexpr int kFewRuns = 256;

// Collects runs into batches, and calls launch(batch, blocks) for each one that is full.
//
// Batch has kCapacity, count, first_block[kCapacity] (of each run, ascending from 0), and
// first_slot (of block 0; slots are numbered through all launches).
template <class Batch, class Launch>
class Launches {
  static_assert(sizeof(Batch) <= kMostParameterBytes, "a kernel's parameters are limited");

 public:
  explicit Launches(Launch launch) : launch_(launch) {
    batch_.count = 0;
    batch_.first_slot = 0;
  }
  Launches(const Launches&) = delete;

  // Adds a run of this many blocks and returns its place in batch().
  int add(int64_t blocks) {
    if (batch_.count == Batch::kCapacity || blocks_ + blocks > kMostBlocks) flush();
    batch_.first_block[batch_.count] = static_cast<int32_t>(blocks_);
    blocks_ += blocks;
    return batch_.count++;
  }
  Batch& batch() { return batch_; }
  // Slot of the next run's first block. A run that is not added takes no slot.
  int64_t next_slot() const { return batch_.first_slot + blocks_; }
  void flush() {
    if (batch_.count) launch_(batch_, grid(blocks_));
    batch_.first_slot += blocks_;
    blocks_ = batch_.count = 0;
  }

 private:
  Launch launch_;
  Batch batch_;
  int64_t blocks_ = 0;
};

// Blocks of a second sweep run from the last to the first: so it begins with what the sweep before
// it has read last, which the L2 cache still holds.
__device__ inline int block_from_last() { return static_cast<int>(gridDim.x - 1 - blockIdx.x); }

// The last run of a batch whose first block is at or before this one.
template <class Batch>
__device__ int run_of_block(const Batch& batch, int block) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first_block[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The chunk of a run that a block works on: elements [start, start + length).
struct BlockChunk {
  int run;
  int64_t start, length;
};
template <class Batch>
__device__ BlockChunk chunk_of_block(const Batch& batch, int block) {
  const int run = run_of_block(batch, block);
  const int64_t start = (block - batch.first_block[run]) * batch.chunk;
  const int64_t rest = batch.numel[run] - start;
  return {run, start, rest < batch.chunk ? rest : batch.chunk};
}

}  // namespace gradfuse::cuda
