// The step of an optimizer: the call as kernels see it, and its twins. Torch-free.
#pragma once

#include <vector>

#include "../math/clip.h"
#include "../math/optim.h"
#include "../math/rounding.h"
#include "../math/runs.h"

namespace gradfuse {

// gradfuse/_codes.py has the same numbers.
enum class Rule : int32_t { AdamW, Sgd, Adam, Lamb, Lion, ScheduleFree };

// What errors and profilers call it.
struct RuleName {
  const char *name, *step, *event;
};
constexpr RuleName kRuleNames[] = {
    {"AdamW", "AdamW.step", "gradfuse::AdamW.step"},
    {"SGD", "SGD.step", "gradfuse::SGD.step"},
    {"Adam", "Adam.step", "gradfuse::Adam.step"},
    {"LAMB", "LAMB.step", "gradfuse::LAMB.step"},
    {"Lion", "Lion.step", "gradfuse::Lion.step"},
    {"ScheduleFreeAdamW", "ScheduleFreeAdamW.step", "gradfuse::ScheduleFreeAdamW.step"}};
constexpr int kRules = sizeof(kRuleNames) / sizeof(RuleName);
inline const RuleName& names_of(Rule rule) { return kRuleNames[static_cast<int>(rule)]; }

// The rule whose arithmetic a rule has: Adam and LAMB are AdamW with other factors.
GRADFUSE_HD constexpr Rule arithmetic_of(Rule rule) {
  return rule == Rule::Adam || rule == Rule::Lamb ? Rule::AdamW : rule;
}

// What multiplies the learning rate of each parameter, after a sweep of its own.
enum class LrScale : int32_t {
  None,
  UpdateClip,  // of AdamW: 1 over the root mean square of g / sqrt(exp_avg_sq), where that is above
               // 1
  TrustRatio,  // of LAMB
};

// The tensors of a parameter's state. Slot i is bit i of Python's Slot.
enum Slot : int {
  kExpAvg,
  kExpAvgSq,
  kMaxExpAvgSq,
  kMasterParam,
  kStep,
  kWeightSum,
  kLrMax,
  kSlots
};

// A parameter, its gradient and its state: dense runs of numel elements in one order. A complex
// element counts as two.
struct ParamRef {
  void* param;
  const void* grad;
  void* exp_avg;  // SGD: momentum_buffer, or null without momentum; schedule-free: z
  void* exp_avg_sq;  // not of SGD and Lion
  void* max_exp_avg_sq;  // AdamW with amsgrad; else null
  float* master;  // float32 copy of a 16-bit parameter that has one; else null. Where param is no
                  // longer its rounding, param counts
  float* step;  // []: steps taken; advanced by an update that is not skipped. Null: not counted
  double* weight_sum;  // [], schedule-free; advanced with step. Else null
  double* lr_max;  // the same
  int64_t numel;
  DType dtype;
  DType state_dtype;  // of the moments: dtype, or Float for a 16-bit one
  DType grad_dtype;  // the same
  int32_t group;
  int32_t row;  // index among the optimizer's parameters, for coefficients and random numbers
};

// Options of a parameter group.
struct GroupOptions {
  double lr;
  const float* lr_value;  // [], in place of lr, in the kernels' memory; or null
  AdamWOptions adamw;  // also of Adam and LAMB
  TrustOptions trust;
  SgdOptions sgd;
  LionOptions lion;
  ScheduleFreeOptions schedule_free;
  bool maximize;
};

// How the gradients enter an update: g = clamp(gradient * factor, -bound, bound).
struct GradientUse {
  const ClipPlan* plan;  // in the kernels' memory, with the action and the factor; null: the
                         // gradients as they are
  const double* coefficients;  // [rows] on top of the factor, in the kernels' memory; or null
  double bound;
  bool applied;  // the gradients are multiplied already

  // Whether the plan says that nothing changes.
  GRADFUSE_HD bool is_refused() const { return plan && plan->is_refused(); }
  GRADFUSE_HD ScaledNorm factor_of_row(int32_t row) const {
    ScaledNorm factor = {1.0, 0.0};
    if (applied) return factor;
    if (plan) factor = plan->factor;
    if (coefficients) factor.value *= coefficients[row];
    return factor;
  }
  // What clipping multiplied, without the loss scale. Beside coefficients the plan has their mean.
  GRADFUSE_HD double coefficient_of_row(int32_t row) const {
    if (coefficients) return coefficients[row];
    return plan ? plan->coefficient : 1.0;
  }
};

// The smallest normal number of a type.
GRADFUSE_HD double smallest_normal(DType dtype) {
  switch (dtype) {
    case DType::Half: return 0x1p-14;
    case DType::Double: return 0x1p-1022;
    default: return 0x1p-126;
  }
}

// with_types for a 16-bit T.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class T, class F>
GRADFUSE_HD_FORCED auto with_short_types(bool wide_state, bool wide_grad, F f) {
  using Wide = Type<float>;
  if (wide_state) return wide_grad ? f(Type<T>(), Wide(), Wide()) : f(Type<T>(), Wide(), Type<T>());
  return wide_grad ? f(Type<T>(), Type<T>(), Wide()) : f(Type<T>(), Type<T>(), Type<T>());
}

// Calls f(Type<T>, Type<S>, Type<G>) with the types of a parameter, its moments and its gradient.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Half, class BFloat16, class F>
GRADFUSE_HD_FORCED auto with_types(DType dtype, DType state_dtype, DType grad_dtype, F f) {
  const bool wide = state_dtype == DType::Float, wide_grad = grad_dtype == DType::Float;
  switch (dtype) {
    case DType::Half: return with_short_types<Half>(wide, wide_grad, f);
    case DType::BFloat16: return with_short_types<BFloat16>(wide, wide_grad, f);
    case DType::Float: return f(Type<float>(), Type<float>(), Type<float>());
    default: return f(Type<double>(), Type<double>(), Type<double>());
  }
}

// A step on the parameters of one device.
struct OptimStep {
  Rule rule;
  std::vector<ParamRef> params;
  std::vector<GroupOptions> groups;
  GradientUse use;
  LrScale lr_scale;
  const double* lr_scales;  // [rows] the factors of lr_scale, in the kernels' memory; null: found
                            // here
  double* lr_sums;  // [rows, 2] in the kernels' memory: takes the sums that lr_scale depends on,
                    // and nothing is updated; or null
  bool eps_follows_clip;  // eps times the clip's coefficient
  bool atan2;  // AdamW and Adam: atan2 in place of a quotient with eps
  bool stochastic_rounding;
};

// Reads and writes every stream of every parameter once, after one more read of those that an
// LrScale needs; nothing if the plan says Skip or Refuse.
namespace cpu {
void optim_step(const OptimStep& step);
}
namespace cuda {
void optim_step(const OptimStep& step,
                void* scratch,  // optim_scratch_bytes(step), 256-byte aligned
                Stream stream);
int64_t optim_scratch_bytes(const OptimStep& step);  // what an LrScale needs
}  // namespace cuda

}  // namespace gradfuse
