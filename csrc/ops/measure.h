// Measures norm, plan and statistics of gradients on any devices, and applies plans to them.
// Torch-facing, for all ops that clip; needs no GIL.
#pragma once

#include <tuple>
#include <utility>

#include "../tensor/grad_list.h"
#include "plans.h"

namespace gradfuse {

struct ClipResult {
  at::Tensor norm;   // [] float32, or float64 if any gradient is; on the first gradient's device
  at::Tensor plan;   // [kPlanFields] float64, a ClipPlan; same device
  at::Tensor stats;  // [list length, kStatsFields] float64, a TensorStats each; same device. A
                     // repeated gradient has those of the first
};

using ClipTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // as Python takes it
inline ClipTuple as_tuple(ClipResult&& r) {
  return {std::move(r.norm), std::move(r.plan), std::move(r.stats)};
}

// Norm, plan and statistics of the gradients without their loss scale. One read, no write.
// Throws std::runtime_error if the norm is NaN or inf under NonFinite::Error.
ClipResult measure_gradients(const char* op, const GradList& grads, const Measurement& m);

// The exact sum of squares, as int64 [words] in the wide form if a gradient is float64, else in the
// narrow one; and the statistics of a ClipResult. Both on the first gradient's device.
std::pair<at::Tensor, at::Tensor> exact_limbs(const GradList& grads);

// Applies the plan to the gradients and multiplies each by its row's coefficient, if given. CUDA
// gradients read the plan on the device; the host waits for a plan on a device only if there is a
// CPU gradient.
void apply_plan(GradList& grads, const at::Tensor& plan, const MaybeTensor& coefficients);

}  // namespace gradfuse
