#include "caches.h"

#include <atomic>
#include <fstream>

namespace gradfuse::cpu {
namespace {

// What one core shares with its neighbours. sysconf adds up those of all cores on some processors.
int64_t from_system() {
  constexpr int64_t kTypical = int64_t{32} << 20;  // where the system does not say
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t size = 0;
  char unit = 0;
  if (!(file >> size >> unit) || size <= 0) return kTypical;
  switch (unit) {
    case 'K': return size << 10;
    case 'M': return size << 20;
    default: return kTypical;
  }
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
