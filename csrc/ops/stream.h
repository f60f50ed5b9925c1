// One pass over memory without arithmetic: what no kernel that moves these bytes can undercut. The
// benches take it for their floor. Torch-free.
#pragma once

#include <cstdint>

namespace gradfuse {

constexpr int kMostReads = 4, kMostWrites = 3;  // those of AdamW

// Copies reads[k] to writes[k], or writes zeros where there are fewer reads; other reads are only
// loaded. A buffer may be in both lists.
struct StreamCall {
  const char* reads[kMostReads];
  char* writes[kMostWrites];
  int read_count, write_count;
  int64_t bytes;  // of each buffer
  bool backwards;  // each thread starts at the end of its part
  bool past_caches[kMostWrites];  // of each write: whether it is stored past the caches
};

namespace cpu {
void stream(const StreamCall& call);
}

}  // namespace gradfuse
