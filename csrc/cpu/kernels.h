// The table of CPU kernels that exist once per instruction set, and the choice among them.
// Torch-free, so that the kernels compile in a second.
#pragma once

#include <cstdint>

#include "../batch_norm_call.h"
#include "../math/clip.h"
#include "../optim_call.h"

namespace gradfuse::cpu {

struct ClipKernels {
  const char* isa;
  // Stats of x[0..n). One read.
  Stats (*stats)(const void* x, DType dtype, int64_t n, NormSpec spec);
  // x *= coefficient, rounded once from float64 (from float32 for 16-bit types where that is exact
  // enough).
  void (*scale)(void* x, DType dtype, int64_t n, double coefficient);
  // x = min(max(x, -bound), bound); NaN stays. Stores only blocks that change;
  // returns whether there were any.
  bool (*clamp)(void* x, DType dtype, int64_t n, double bound);
};

extern const ClipKernels kClipBaseline;
#if defined(__x86_64__)
extern const ClipKernels kClipAvx2;
extern const ClipKernels kClipAvx512;
#endif

// A part of a tensor [outer, channels, inner]. In the channels-last layouts (inner == 1) it is some
// columns of some rows.
struct Span {
  int64_t outer, outer_end;
  int64_t channel, channel_end;
  int64_t inner, inner_end;  // the first a multiple of 8, so that no byte of the mask is in two
};

// Where inner > 1, the most channels of a span.
constexpr int64_t kMostChannels = 64;

// Per-channel vectors lie side by side in one array, `stride` apart, that begins at the span's
// first channel; `stride` is a multiple of kChannelPadding, and every vector may be read to its
// end. Coefficients are of the type that elements are computed in: double for Double, else float.
constexpr int64_t kChannelPadding = 16;
enum ForwardCoefficient { kMean, kScale, kShift, kForwardCoefficients };
// The first three as above: what the forward normalised with.
enum BackwardCoefficient {
  kInvstd = kForwardCoefficients,
  kDirect,
  kSlope,
  kOffset,
  kBackwardCoefficients
};

struct BatchNormKernels {
  // Adds the sums of x - kMean, which is not shrunk here, and of its square to sums[0] and sums[1].
  // Reads the span once. A few
  // float32 terms are added up in float32 before they are widened; if `wide`, none, so that no
  // finite term is lost.
  void (*forward_sums)(const BatchNormForward& call, const Span& span, const void* coefficients,
                       double* sums, int64_t stride, bool wide);
  // Writes the output and the mask. Reads input and residual once.
  void (*forward_apply)(const BatchNormForward& call, const Span& span, const void* coefficients,
                        int64_t stride);
  // Adds the sums of g and of g * h, as math/batch_norm.h names them, to sums[0] and sums[1].
  void (*backward_sums)(const BatchNormBackward& call, const Span& span, const void* coefficients,
                        double* sums, int64_t stride, bool wide);
  // Writes the gradients of input and residual that are wanted.
  void (*backward_apply)(const BatchNormBackward& call, const Span& span, const void* coefficients,
                         int64_t stride);
};

extern const BatchNormKernels kBatchNormBaseline;
#if defined(__x86_64__)
extern const BatchNormKernels kBatchNormAvx2;
extern const BatchNormKernels kBatchNormAvx512;
#endif

// All of elements [start, start + n) of a parameter.
struct OptimKernels {
  // Updates them and their state.
  void (*adamw)(const ParamRef& p, int64_t start, int64_t n, const AdamWFactors<double>& factors,
                const ElementFactor& factor, const Rounding& rounding);
  void (*sgd)(const ParamRef& p, int64_t start, int64_t n, const SgdFactors<double>& factors,
              const ElementFactor& factor, const Rounding& rounding);
  // Sum of their adamw_ratio. Writes nothing.
  double (*adamw_ratio_sum)(const ParamRef& p, int64_t start, int64_t n,
                            const AdamWFactors<double>& factors, const ElementFactor& factor);
};

extern const OptimKernels kOptimBaseline;
#if defined(__x86_64__)
extern const OptimKernels kOptimAvx2;
extern const OptimKernels kOptimAvx512;
#endif

// The widest set this machine runs, or the one named by GRADFUSE_ISA (baseline | avx2 | avx512).
// Throws std::invalid_argument if that name is unknown or the machine lacks it. Chosen once.
const ClipKernels& clip_kernels();
const BatchNormKernels& batch_norm_kernels();  // of the same set
const OptimKernels& optim_kernels();

}  // namespace gradfuse::cpu
