// Gradient clipping by norm and by value: the calls as kernels see them, and their twins.
// Torch-free.
//
// The same input gives the same bits for any number of threads and any timing. Functions of cuda::
// enqueue on `stream` of the current device, read and write device memory, never make the host
// wait, and can be captured in a CUDA graph. They throw std::runtime_error if a launch fails.
#pragma once

#include <vector>

#include "../math/clip.h"
#include "../math/runs.h"

namespace gradfuse {

// A measurement on the device: its settings, and where the results go.
struct NormCall {
  NormSpec spec;
  double max_norm;
  NonFinite nonfinite;
  const float* scale;  // [], the loss scale that the gradients carry; or null
  const float* found_inf;  // [], not 0 if the step is to be skipped; or null
  TensorStats* stats;  // [rows]; those without a gradient are marked absent
  int64_t rows;
  ClipPlan* plan;
  void* norm;  // []
  bool norm_is_double;  // else float32
};

// Statistics of all gradients as one vector, and of each. Reads each gradient once.
namespace cpu {
Stats stats(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,  // [grads.size()]
            NormSpec spec, TensorStats* stats);  // [above the largest row]
}
namespace cuda {
void stats(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,  // [grads.size()]
           const NormCall& call, void* scratch,  // stats_scratch_bytes(grads), 256-byte aligned
           Stream stream);
int64_t stats_scratch_bytes(const std::vector<GradRef>& grads);
// The plan for the sums of several ranks.
void plan_of_sums(const RankSum* sums, int64_t ranks, const NormCall& call, Stream stream);
// The plan for a given norm.
void plan(const double* norm, double max_norm, ClipPlan* plan, Stream stream);
}  // namespace cuda

// The exact sum of all squares, as the words of its form, carried; and the statistics of each
// gradient. Reads each gradient once.
namespace cpu {
void exact_limbs(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,
                 LimbForm form,  // wide if there is a float64 gradient
                 int64_t* words, TensorStats* stats);
}
namespace cuda {
// Writes all that stats does, too.
void exact_limbs(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows, LimbForm form,
                 int64_t* words, const NormCall& call,
                 void* scratch,  // stats_scratch_bytes(grads), 256-byte aligned
                 Stream stream);
// The plan and the norm for a sum of up to 2^22 of such words, which need not be carried.
void exact_plan(const int64_t* words, LimbForm form, const NormCall& call, Stream stream);
}  // namespace cuda

// g *= factor, or g = 0; with coefficients, g *= factor * coefficients[row]. Reads and writes each
// gradient once.
namespace cpu {
void scale(const std::vector<GradRef>& grads, ScaledNorm factor);
void scale_each(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,
                ScaledNorm factor, const double* coefficients);
void zero(const std::vector<GradRef>& grads);
}  // namespace cpu
namespace cuda {
// Does one of these, as the plan says. The plan is read on the device; if it says Keep, no gradient
// is touched. float32 is multiplied in float32, up to 1 ulp from the CPU twin: float64 per element
// is too slow on consumer GPUs.
void apply(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,
           const ClipPlan* plan, const double* coefficients,  // [rows] or null
           Stream stream);
}  // namespace cuda

// g = clamp(g, -bound, bound). Reads each gradient once, writes the blocks (on CUDA the 16-byte
// words) that change.
namespace cpu {
void clamp(const std::vector<GradRef>& grads, double bound);
}
namespace cuda {
void clamp(const std::vector<GradRef>& grads, double bound, Stream stream);
}

}  // namespace gradfuse
