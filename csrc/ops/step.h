// One step on held parameters: their norm, and their update. Torch-facing; needs no GIL.
#pragma once

#include <vector>

#include "held_params.h"
#include "measure.h"

namespace gradfuse {

// What a step does. Python's StepOptions has the last six but lr_scales.
struct StepCall {
  std::vector<GroupOptions> groups;
  std::vector<MaybeTensor> lr_values;  // [groups], each [] on any device, in place of lr
  double bound;  // of each element of the gradients, after the factor
  LrScale lr_scale;
  MaybeTensor lr_scales;  // [parameters] float64, where others found what lr_scale asks for
  bool eps_follows_clip;
  bool atan2;
  bool stochastic_rounding;
  bool materialize;  // write the factor to the gradients as well
};

// Norm, plan and statistics of a step. Writes nothing. Throws as measure_gradients.
ClipResult measure(const HeldParams& held, const Measurement& m);

// The same and the update, in one walk of the parameters. Throws as both.
ClipResult step(HeldParams& held, const Measurement& m, const StepCall& call);

// Updates the parameters that have a gradient as the plan says, unless it says Skip.
// Throws std::invalid_argument or TypeError, nothing written, where a gradient or a state does not
// fit its parameter.
void update(HeldParams& held, const StepCall& call, const MaybeTensor& plan,
            const MaybeTensor& coefficients);

// What an update would throw. Writes nothing.
void check_step(HeldParams& held);

// The sums that an update's LrScale depends on: [parameters, 2] float64, 0 where there is no
// gradient or no LrScale, on the first gradient's device. With UpdateClip the sum of squares of
// g / sqrt(exp_avg_sq); with TrustRatio those of the parameter and of its update. Throws as update.
at::Tensor lr_sums(HeldParams& held, const StepCall& call, const MaybeTensor& plan,
                   const MaybeTensor& coefficients);

}  // namespace gradfuse
