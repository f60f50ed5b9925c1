// Cuts a pass over memory into items and shares them among the threads, as the ops do.
#include "../ops/stream.h"

#include <algorithm>
#include <atomic>

#include "caches.h"
#include "chunks.h"
#include "stream_kernels.h"

namespace gradfuse::cpu {

void stream(const StreamCall& given) {
  StreamCall call = given;
  const int64_t buffers = call.read_count + call.write_count;
  for (int k = 0; k < call.write_count; ++k) {
    const char* const target = call.writes[k];
    const bool in_place = std::count(call.reads, call.reads + call.read_count, target) > 0;
    call.past_caches[k] =
        !in_place && on_cache_lines(target) && stores_past_caches(buffers * call.bytes);
  }
  const StreamKernels& kernels = stream_kernels();
  constexpr int64_t kBytes = sizeof(float);
  const int64_t item =
      std::clamp<int64_t>(call.bytes / 256, kBytes * kItem, 32 * kBytes * kItem) / 64 * 64;
  const Items items = {(call.bytes + item - 1) / item, buffers * call.bytes / kBytes,
                       kLeastParallel, call.backwards};
  std::atomic<uint32_t> seen{0};
  for_each_item(items, [&](int64_t i) {
    const int64_t begin = i * item;
    const uint32_t bits = kernels.stream(call, begin, std::min(begin + item, call.bytes));
    seen.fetch_or(bits, std::memory_order_relaxed);
  });
}

}  // namespace gradfuse::cpu
