// Many tensors in few launches: a kernel's parameters hold the metadata of up to kCapacity runs,
// and each of its blocks finds its run there. So nothing is copied, and a captured graph keeps it.
#pragma once

#include "common.cuh"

namespace gradfuse::cuda {

// A grid has at most 2^31 - 1 blocks.
constexpr int64_t kMostBlocks = INT32_MAX;
inline unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }

// Since CUDA 12.1 a kernel takes up to 32,764 bytes of parameters.
constexpr size_t kMostParameterBytes = 32000;

// Collects runs into batches, and calls launch(batch, blocks) for each one that is full.
//
// Batch has kCapacity, count, first_block[kCapacity] (of each run, ascending from 0), and
// first_slot (of block 0, where the slots of all launches follow each other).
template <class Batch, class Launch>
class Launches {
  static_assert(sizeof(Batch) <= kMostParameterBytes, "a kernel's parameters are limited");

 public:
  explicit Launches(Launch launch) : launch_(launch) {
    batch_.count = 0;
    batch_.first_slot = 0;
  }
  Launches(const Launches&) = delete;

  // Makes room for a run of so many blocks, and returns its place in batch().
  int add(int64_t blocks) {
    if (batch_.count == Batch::kCapacity || blocks_ + blocks > kMostBlocks) flush();
    batch_.first_block[batch_.count] = blocks_;
    blocks_ += blocks;
    return batch_.count++;
  }
  Batch& batch() { return batch_; }
  // Slot of the next run's first block. A run that is given none takes no slot.
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

// The last run of a batch whose first block is at or before this one.
template <class Batch>
__device__ int run_of_block(const Batch& batch, int64_t block) {
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
__device__ BlockChunk chunk_of_block(const Batch& batch) {
  const int run = run_of_block(batch, blockIdx.x);
  const int64_t start = (blockIdx.x - batch.first_block[run]) * batch.chunk;
  const int64_t rest = batch.numel[run] - start;
  return {run, start, rest < batch.chunk ? rest : batch.chunk};
}

}  // namespace gradfuse::cuda
