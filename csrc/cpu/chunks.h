// Cuts tensors into chunks and groups chunks into work items for the threads. Boundaries depend on
// the sizes alone.
#pragma once

#include <vector>

#include "../math/prefetch.h"
#include "../math/runs.h"
#include "parallel.h"

namespace gradfuse::cpu {

constexpr int64_t kItem = 16384;  // minimum elements of a work item
constexpr int64_t kChunkCost = 256;  // what a chunk takes besides its elements, in elements

// Prefetches the beginning of a run of memory, to read or to write. The hardware prefetcher must
// see part of a run first, so short runs would always miss.
template <bool kWrites = false>
inline void prefetch_run(const void* data, int64_t bytes) {
  constexpr int64_t kLine = 64, kMost = 512;
  const char* line = static_cast<const char*>(data);
  for (const char* end = line + std::min(bytes, kMost); line < end; line += kLine)
    prefetch_line<kWrites>(line);
}

struct Chunk {
  int64_t tensor;
  int64_t start;
  int64_t length;
};

// All chunks in order, and the items of work: item i is chunks [items[i], items[i + 1]).
struct Work {
  std::vector<Chunk> chunks;
  std::vector<int64_t> items;
  int64_t total = 0;  // elements

  // Ref has a numel.
  template <class Ref>
  explicit Work(const std::vector<Ref>& tensors, int64_t streams = 1) : streams_(streams) {
    const int64_t chunk = chunk_elements(tensors);
    chunks.reserve(tensors.size());
    // Long items keep the hardware prefetcher on one stream; short ones balance the threads.
    for (const Ref& t : tensors) total += t.numel;
    const int64_t item = std::clamp<int64_t>(total / 256, kItem, 32 * kItem);
    int64_t pending = item;
    for (size_t t = 0; t < tensors.size(); ++t) {
      for (int64_t start = 0; start < tensors[t].numel; start += chunk) {
        if (pending >= item) {
          items.push_back(static_cast<int64_t>(chunks.size()));
          pending = 0;
        }
        const int64_t length = std::min(chunk, tensors[t].numel - start);
        chunks.push_back({static_cast<int64_t>(t), start, length});
        pending += length;
      }
    }
    items.push_back(static_cast<int64_t>(chunks.size()));
  }

  // Calls f(item, first chunk, end) for every item. Each thread has the same items forwards and
  // backwards, so that a second sweep finds in its own caches what the first one read.
  template <class F>
  void for_each(bool backwards, F f) const {
    const int64_t cost = streams_ * total + kChunkCost * static_cast<int64_t>(chunks.size());
    for_each_item({count(), cost, kLeastParallel, backwards},
                  [&](int64_t item) { f(item, items[item], items[item + 1]); });
  }
  int64_t count() const { return static_cast<int64_t>(items.size()) - 1; }

 private:
  int64_t streams_;  // that are read for each element
};

}  // namespace gradfuse::cpu
