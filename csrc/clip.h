// The torch-facing functions of gradient clipping: allocate the results, pick the device, call the
// kernels. They take checked gradients and need no GIL.
#pragma once

#include "gradients.h"

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

// Scales by min(1, max_norm / (total_norm + 1e-6)) unless total_norm <= max_norm.
void scale_by_norm(GradList& grads, double max_norm, const at::Tensor& total_norm);

// Clamps to [-clip_value, clip_value].
void clip_by_value(GradList& grads, double clip_value);

// Adaptive clipping, unit by unit.
void clip_adaptively(UnitList& params, double clip_factor, double eps, NormSpec spec);

}  // namespace gradfuse
