// Measures norm, plan and statistics of gradients on any devices, and applies plans to them.
// Torch-facing, for all ops that clip; needs no GIL.
#pragma once

#include <tuple>
#include <utility>

#include "../tensor/grad_list.h"
#include "../tensor/storage.h"
#include "clip.h"

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

// Throws std::invalid_argument if the code is unknown.
NonFinite nonfinite_of(int code);

// The ClipPlan stored in a tensor.
const ClipPlan* plan_in(const at::Tensor& t);
ClipPlan* mutable_plan_in(const at::Tensor& t);

// What a loss scaler passes: each one float32 number, on any device.
struct LossScaleTensors {
  MaybeTensor scale;      // of the gradients
  MaybeTensor found_inf;  // not 0 if the step is to be skipped
};
double scale_on_host(const MaybeTensor& scale);  // 1 without one; on CUDA this waits for the device
// A float32 number where kernels of the device read it.
MaybeTensor number_on(at::Device device, const MaybeTensor& t);

// Norm, plan and statistics of the gradients without their loss scale. One read, no write.
// Throws std::runtime_error if the norm is NaN or inf under NonFinite::Error.
ClipResult measure_gradients(const char* op, const GradList& grads, double max_norm, NormSpec spec,
                             NonFinite nonfinite, const LossScaleTensors& scale);

// Norm and plan for the sums of several ranks, a RankSum each in a float64 tensor
// [ranks, kRankSumFields], on their device.
// Throws std::runtime_error if the norm is NaN or inf under NonFinite::Error; on CUDA this waits.
std::pair<at::Tensor, at::Tensor> plan_of_rank_sums(const char* op, const at::Tensor& sums,
                                                    bool wide, double max_norm, NormSpec spec,
                                                    NonFinite nonfinite, const MaybeTensor& scale);

// Applies the plan to the gradients and multiplies each by its row's coefficient, if given. CUDA
// gradients read the plan on the device; the host waits for a plan on a device only if there is a
// CPU gradient.
void apply_plan(GradList& grads, const at::Tensor& plan, const MaybeTensor& coefficients);

}  // namespace gradfuse
