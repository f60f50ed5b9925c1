// The caches of this machine, as far as kernels decide by them. Torch-free.
#pragma once

#include <cstdint>

namespace gradfuse::cpu {

constexpr int64_t kCacheLine = 64;

// Bytes of the last level.
int64_t last_level_cache();

// For tests: replaces that size; 0 brings the machine's back.
void set_last_level_cache(int64_t bytes);

// Whether a call that moves so many bytes stores its results past the caches. Beyond half of the
// last one hardly anything is there when somebody reads it, for others use it too, and a line that
// is stored as a whole need not be read first.
inline bool stores_past_caches(int64_t bytes_moved) { return bytes_moved > last_level_cache() / 2; }

inline bool on_cache_lines(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kCacheLine == 0;
}

}  // namespace gradfuse::cpu
