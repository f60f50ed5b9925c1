// Adaptive gradient clipping: the call as kernels see it, and its twins. Torch-free.
#pragma once

#include <vector>

#include "../math/adaptive_clip.h"
#include "../math/runs.h"

namespace gradfuse {

// One parameter: `rows` units, each of a weight and a gradient run.
struct UnitRef {
  GradRef weight;  // numel is that of one unit; `data` that of the first
  GradRef grad;
  int64_t rows;
  int64_t weight_stride;  // elements between units
  int64_t grad_stride;
};

// Limit of the norm of a unit's gradient, relative to that of its weights.
struct UnitLimit {
  double clip_factor, eps;
  NormSpec spec;
};

// Clips each unit of each gradient against its weight. Writes the clipped units only.
namespace cpu {
void adaptive_clip(const std::vector<UnitRef>& units, UnitLimit limit,
                   double scale);  // loss scale of the gradients
}
namespace cuda {
void adaptive_clip(const std::vector<UnitRef>& units, UnitLimit limit,
                   const float* scale,  // [] loss scale of the gradients, or null
                   Stream stream);
}

}  // namespace gradfuse
