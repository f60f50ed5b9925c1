// Parameters that share memory, as after `b.data = a.data`. Threads may not update them at once.
#pragma once

#include "held_params.h"

namespace gradfuse {

// The address of a tensor's first element; null if it has no memory.
const void* begin_of(const at::Tensor& t);

// Puts each parameter into the first layer after those of all earlier parameters whose memory, or
// whose state's, it may share, and notes where it lies. Returns the last layer; 0 if nothing is
// shared. Views that interleave without sharing an element count as sharing.
int find_layers(HeldParams& held);

}  // namespace gradfuse
