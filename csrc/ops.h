// The native contract: every entry point of the kernels, CPU and CUDA twins on adjacent lines, and
// the torch-facing functions above them. Raw pointers and sizes only; no torch headers.
//
// Counts are 64-bit. The same input gives the same bits whatever the threads and their timing.
#pragma once

#include <cstdint>
#include <vector>

#include "batch_norm_call.h"
#include "math/clip.h"
#include "optim_call.h"

#if defined(GRADFUSE_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace gradfuse {

// Dimensions of a tensor that is not one dense run, outermost first, strides in elements.
struct StridedLayout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
};

// One gradient. For a complex tensor, `data` points to (real, imaginary) pairs, numel counts pairs
// and stats are of the modulus; dtype is that of each part.
struct GradRef {
  void* data;
  int64_t numel;
  DType dtype;
  bool is_complex;
  const StridedLayout* layout;  // null for one dense run of numel elements
};

// One unit-wise clipped parameter: `rows` units, each of a weight and a gradient run.
struct UnitRef {
  GradRef weight;  // numel is that of one unit; `data` that of the first
  GradRef grad;
  int64_t rows;
  int64_t weight_stride;  // elements between units
  int64_t grad_stride;
};

// Gradients are reduced in chunks of this many elements, more where that would make too many: the
// memory for the chunks' results stays bounded. Depends on sizes alone.
template <class Ref>
int64_t chunk_elements(const std::vector<Ref>& tensors) {
  int64_t total = 0;
  for (const Ref& t : tensors) total += t.numel;
  int64_t chunk = 32768;
  while (total / chunk > 16384) chunk *= 2;
  return chunk;
}

// Columns of the per-gradient table.
constexpr int64_t kTableColumns =
    5;  // L2 norm, largest |g|, non-finite count, zero count, elements
// The totals: norm, coefficient, norm after clipping, Action, then the sum or maximum that the norm
// is the root of and the factor of the gradients, each as value and exponent.
constexpr int64_t kTotals = 8;

GRADFUSE_HD void write_table_row(const Stats& s, double numel, double* row) {
  row[0] = to_double(norm_of(s.l2, {NormKind::L2, 2.0}));
  row[1] = s.amax;
  row[2] = static_cast<double>(s.nonfinite);
  row[3] = static_cast<double>(s.zeros);
  row[4] = numel;
}

GRADFUSE_HD void unscale_table_row(double* row, double scale) {
  row[0] /= scale;
  row[1] /= scale;
}

GRADFUSE_HD void write_totals(const ClipPlan& plan, ScaledSum sum, double* totals) {
  totals[0] = plan.norm;
  totals[1] = plan.coefficient;
  totals[2] = plan.clipped_norm;
  totals[3] = static_cast<double>(plan.action);
  totals[4] = sum.value;
  totals[5] = sum.exponent;
  totals[6] = plan.factor.value;
  totals[7] = plan.factor.exponent;
}

// A step of an optimizer on the parameters of one device.
struct OptimStep {
  Rule rule;
  std::vector<ParamRef> params;
  std::vector<GroupOptions> groups;
  GradientUse use;
  bool update_clip;  // AdamW: divide a parameter's learning rate by the root mean square of
                     // g / sqrt(second moment) where that is above 1
  bool stochastic_rounding;
};

namespace cpu {

// Stats of all gradients as one vector, and the table row of each. Reads each gradient once.
Stats stats(const std::vector<GradRef>& grads,
            const std::vector<int64_t>& rows,  // [grads.size()]
            NormSpec spec,
            double* table);  // [above the largest row, kTableColumns]
// g *= coefficient, or g = 0. Reads and writes each gradient once.
void scale(const std::vector<GradRef>& grads, ScaledNorm factor);
void zero(const std::vector<GradRef>& grads);
// g *= factor * coefficients[row]. Reads and writes each gradient once.
void scale_each(const std::vector<GradRef>& grads,
                const std::vector<int64_t>& rows,  // [grads.size()]
                ScaledNorm factor, const double* coefficients);
// g = clamp(g, -bound, bound). Reads each gradient once, writes the blocks that change.
void clamp(const std::vector<GradRef>& grads, double bound);
// Clips each unit of each gradient against its weight. Writes the clipped units only.
void clip_units(const std::vector<UnitRef>& units, double clip_factor, double eps, NormSpec spec);
void batch_norm_forward(const BatchNormForward& call);
void batch_norm_backward(const BatchNormBackward& call);
// One step of an optimizer. Reads and writes every stream of every parameter once; nothing if the
// totals say Skip or Refuse.
void optim_step(const OptimStep& step);
// Name of the instruction set in use.
const char* isa();

}  // namespace cpu

#if defined(GRADFUSE_CUDA)
// Everything below enqueues on `stream` of the current device, reads and writes device memory,
// never waits for the host, and can be captured in a CUDA graph. Throws std::runtime_error if a
// launch fails.
namespace cuda {

// Bytes of scratch that stats() needs.
int64_t stats_scratch_bytes(const std::vector<GradRef>& grads);
// The table rows, the totals of the plan for (max_norm, policy), and the norm.
void stats(const std::vector<GradRef>& grads,
           const std::vector<int64_t>& rows,  // [grads.size()]
           int64_t table_rows,  // rows not in `rows` are marked absent
           NormSpec spec, double max_norm, NonFinite policy,
           void* scratch,  // stats_scratch_bytes(grads), 256-byte aligned
           double* table,  // [table_rows, kTableColumns]
           double* totals,  // [kTotals]
           void* norm,  // [], float64 if norm_is_double, else float32
           bool norm_is_double,
           const float* scale,  // [], the loss scale that the gradients carry; or null
           const float* found_inf,  // [], not 0 if the step is to be skipped; or null
           cudaStream_t stream);
// The totals of the plan for a norm that is already there.
void plan(const double* norm,  // []
          double max_norm,
          double* totals,  // [kTotals]
          cudaStream_t stream);
// g *= coefficient or g = 0, as the totals say; returns before touching memory if they say Keep.
// float32 is multiplied in float32, up to 1 ulp from the CPU twin: float64 per element is too slow
// on consumer GPUs.
void apply(const std::vector<GradRef>& grads,
           const double* totals,  // [kTotals]
           const double* coefficients,  // [rows], on top of the totals' factor; or null
           const std::vector<int64_t>& rows,  // [grads.size()]
           cudaStream_t stream);
// g = clamp(g, -bound, bound). Stores only the 16-byte words that change.
void clamp(const std::vector<GradRef>& grads, double bound, cudaStream_t stream);
// Clips each unit of each gradient against its weight. Stores the clipped units only.
void clip_units(const std::vector<UnitRef>& units, double clip_factor, double eps,
                const float* scale,  // [] that the gradients carry, or null
                NormSpec spec, cudaStream_t stream);
// Bytes of scratch that either direction of batch normalisation needs.
int64_t batch_norm_scratch_bytes(const BatchNormShape& shape);
void batch_norm_forward(const BatchNormForward& call,
                        void* scratch,  // batch_norm_scratch_bytes(shape), 256-byte aligned
                        cudaStream_t stream);
void batch_norm_backward(const BatchNormBackward& call, void* scratch, cudaStream_t stream);
// Bytes of scratch that optim_step() needs: for update clipping.
int64_t optim_scratch_bytes(const OptimStep& step);
// One step of an optimizer; the step counters advance after the updates.
void optim_step(const OptimStep& step,
                void* scratch,  // optim_scratch_bytes(step), 256-byte aligned
                cudaStream_t stream);

}  // namespace cuda
#endif
}  // namespace gradfuse
