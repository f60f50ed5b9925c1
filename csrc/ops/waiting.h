// Outputs that wait (see deferred.h), for what writes to tensors without torch's operators.
#pragma once

namespace gradfuse {

// Computes all of them, before a write that no dispatcher sees.
void materialize_all(const char* reason);

}  // namespace gradfuse
