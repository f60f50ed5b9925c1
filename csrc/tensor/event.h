// Named events in torch.profiler.
#pragma once

#include <ATen/record_function.h>

// From here to the end of the block, the profiler shows an event of this name. Without a profiler
// it costs some nanoseconds.
#define GRADFUSE_EVENT(name) RECORD_FUNCTION(name, c10::ArrayRef<const c10::IValue>())
