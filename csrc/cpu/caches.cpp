#include "caches.h"

#include <unistd.h>

#include <atomic>

namespace gradfuse::cpu {
namespace {

int64_t from_system() {
  long bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return bytes > 0 ? bytes : int64_t{32} << 20;  // some systems and virtual machines do not say
}

std::atomic<int64_t>& last_level() {
  static std::atomic<int64_t> bytes = from_system();
  return bytes;
}

}  // namespace

int64_t last_level_cache() { return last_level().load(std::memory_order_relaxed); }

void set_last_level_cache(int64_t bytes) {
  last_level().store(bytes > 0 ? bytes : from_system(), std::memory_order_relaxed);
}

}  // namespace gradfuse::cpu
