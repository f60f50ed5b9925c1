// The torch-facing functions of gradient clipping: allocate the results, pick the device, call the
// kernels. They take checked gradients and need no GIL.
#pragma once

#include "gradients.h"
#include "memory.h"

namespace gradfuse {

struct ClipResult {
  at::Tensor norm;  // [] float32, or float64 if any gradient is; on the first gradient's device
  at::Tensor totals;  // [kTotals] float64, same device
  at::Tensor
      table;  // [list length, kTableColumns] float64; elements is -1 in rows without gradient
};

// The norm and the per-gradient table. One read, no write.
// Throws std::runtime_error if the norm is NaN or inf under NonFinite::Error.
ClipResult grad_stats(const char* op, const GradList& grads, NormSpec spec, NonFinite policy);

// Clips by the global norm. One read; a second read and a write if norm > max_norm.
// Throws std::runtime_error, nothing written, if the norm is NaN or inf under NonFinite::Error.
ClipResult clip_by_norm(const char* op, GradList& grads, double max_norm, NormSpec spec,
                        NonFinite policy);

// What a loss scaler says of the gradients; each one float32 number, on any device.
struct LossScaleTensors {
  MaybeTensor scale;      // that the gradients carry
  MaybeTensor found_inf;  // not 0 if the step is to be skipped
};

// The norm, the table and the plan of a step, of the gradients without their scale. One read, no
// write. The totals' factor takes the scale off. Throws as clip_by_norm.
ClipResult plan_step(const char* op, const GradList& grads, double max_norm, NormSpec spec,
                     NonFinite policy, const LossScaleTensors& scale);

// Does to the gradients what the totals say, and their rows' coefficients on top of that.
void apply_totals(GradList& grads, const at::Tensor& totals, const MaybeTensor& coefficients);

// Scales by min(1, max_norm / (total_norm + 1e-6)) unless total_norm <= max_norm.
void scale_by_norm(GradList& grads, double max_norm, const at::Tensor& total_norm);

// Clamps to [-clip_value, clip_value].
void clip_by_value(GradList& grads, double clip_value);

// Adaptive clipping, unit by unit, of gradients that carry a loss scale if one is given.
void clip_adaptively(UnitList& params, double clip_factor, double eps, NormSpec spec,
                     const MaybeTensor& scale);

}  // namespace gradfuse
