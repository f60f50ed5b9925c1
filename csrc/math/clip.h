// Gradient clipping by the global norm for host and device: the plan of a step.
#pragma once

#include "limbs.h"
#include "norm.h"

namespace gradfuse {

// How a norm of NaN or inf is treated. gradfuse/_codes.py has the same numbers.
enum class NonFinite : int32_t { Propagate, Error, Zero, Skip };

// What a step does to the gradients. Refuse: the setting is Error and the norm is not finite, so
// the caller raises. Skip: an optimizer's step changes nothing.
enum class Action : int32_t { Keep, Scale, Zero, Refuse, Skip };

// The plan of a step, stored as a float64 tensor [8]. gradfuse/_records.py has the same fields.
struct ClipPlan {
  double norm;  // of all gradients, without their loss scale
  double coefficient;
  double clipped_norm;
  double action_code;
  ScaledSum sum;  // the norm is its root; for the infinity norm, the maximum
  ScaledNorm factor;  // of the gradients: coefficient / loss scale, also where that is outside
                      // float64's range

  GRADFUSE_HD Action action() const {
    return static_cast<Action>(static_cast<int32_t>(action_code));
  }
  // Whether nothing may be written: the action is Refuse or Skip.
  GRADFUSE_HD bool is_refused() const {
    return action() == Action::Refuse || action() == Action::Skip;
  }
};
constexpr int64_t kPlanFields = 8;
static_assert(sizeof(ClipPlan) == kPlanFields * sizeof(double), "a plan is a float64 tensor [8]");

GRADFUSE_HD ClipPlan make_plan(double norm, double coefficient, double clipped_norm, Action action,
                               ScaledNorm factor) {
  return {norm, coefficient, clipped_norm, static_cast<double>(action), {0.0, 0.0}, factor};
}

// Pascanu, Mikolov, Bengio 2013, Algorithm 1, in torch's form min(1, max_norm / (norm + 1e-6)),
// except that a finite norm <= max_norm leaves the gradients alone.
GRADFUSE_HD ClipPlan clip_plan(ScaledNorm norm, double max_norm, NonFinite nonfinite) {
  const double wide = to_double(norm);
  if (std::isfinite(norm.value)) {
    if (wide <= max_norm) return make_plan(wide, 1.0, wide, Action::Keep, {1.0, 0.0});
    ScaledNorm factor = {max_norm / (wide + 1e-6), 0.0};
    if (!std::isfinite(wide))
      factor = {max_norm / norm.value, -norm.exponent};
    else if (factor.value < 0x1p-1022)
      factor = {max_norm / ((wide + 1e-6) * 0x1p-900), -900.0};
    const double clipped = std::isfinite(wide) ? times_power(wide, factor.exponent) * factor.value
                                               : norm.value * factor.value;
    return make_plan(wide, to_double(factor), clipped, Action::Scale, factor);
  }
  if (nonfinite == NonFinite::Zero) return make_plan(wide, 0.0, 0.0, Action::Zero, {0.0, 0.0});
  if (nonfinite == NonFinite::Error) return make_plan(wide, 1.0, wide, Action::Refuse, {1.0, 0.0});
  if (nonfinite == NonFinite::Skip) return make_plan(wide, 1.0, wide, Action::Skip, {1.0, 0.0});
  const double ratio = max_norm / (wide + 1e-6);
  const double coefficient = ratio > 1.0 ? 1.0 : ratio;
  return make_plan(wide, coefficient, wide * coefficient, Action::Scale, {coefficient, 0.0});
}

// Scale of the loss, and so of its gradients (Micikevicius et al. 2018, "Mixed Precision Training",
// section 3.2).
struct LossScale {
  double value;
  bool found_inf;  // some gradient was reported as not finite
};

// The plan for gradients of a scaled loss: its norms exclude the scale, its factor removes it.
GRADFUSE_HD ClipPlan unscaled_plan(ScaledNorm norm, ScaledSum sum, double max_norm,
                                   NonFinite nonfinite, LossScale scale) {
  ClipPlan plan = clip_plan({norm.value / scale.value, norm.exponent}, max_norm, nonfinite);
  plan.factor.value /= scale.value;
  plan.sum = sum;
  if (scale.found_inf) plan.action_code = static_cast<double>(Action::Skip);
  return plan;
}
GRADFUSE_HD ClipPlan unscaled_plan(ScaledSum sum, NormSpec spec, double max_norm,
                                   NonFinite nonfinite, LossScale scale) {
  return unscaled_plan(norm_of(sum, spec), sum, max_norm, nonfinite, scale);
}

// The plan for an exact sum, in carried limbs. Its norm is the root, rounded once; a loss scale
// that is no power of two rounds it once more.
GRADFUSE_HD ClipPlan plan_of_limbs(const int64_t* words, LimbForm form, double max_norm,
                                   NonFinite nonfinite, LossScale scale) {
  const ScaledNorm norm = root_of_limbs(words, form, kToDouble);
  const ScaledSum sum = {norm.value * norm.value, norm.exponent};
  return unscaled_plan(norm, sum, max_norm, nonfinite, scale);
}
// The norm of that plan in float32, without a loss scale rounded once from the limbs.
GRADFUSE_HD float float_norm(const int64_t* words, LimbForm form, const ClipPlan& plan,
                             double scale) {
  if (scale != 1.0) return static_cast<float>(plan.norm);
  return static_cast<float>(to_double(root_of_limbs(words, form, kToFloat)));
}

// What one rank adds to a norm over several, stored as a row of a float64 tensor [ranks, 4].
struct RankSum {
  ScaledSum sum;
  double found_inf;  // not 0 if the step is to be skipped
  double refused;  // not 0 if the rank refused its gradients, so that no rank writes
};
constexpr int64_t kRankSumFields = 4;
static_assert(sizeof(RankSum) == kRankSumFields * sizeof(double), "a row of a float64 [n, 4]");

// The plan for the sums of all ranks, which are combined in the ranks' order: the bits are the same
// on each of them.
GRADFUSE_HD ClipPlan plan_of_sums(const RankSum* sums, int64_t ranks, NormSpec spec,
                                  double max_norm, NonFinite nonfinite, double scale) {
  ScaledSum total = ranks > 0 ? sums[0].sum : ScaledSum{0.0, 0.0};
  LossScale loss = {scale, false};
  bool refused = false;
  for (int64_t r = 0; r < ranks; ++r) {
    if (r > 0) total = combine(total, sums[r].sum, spec);
    loss.found_inf |= sums[r].found_inf != 0.0;
    refused |= sums[r].refused != 0.0;
  }
  ClipPlan plan = unscaled_plan(total, spec, max_norm, nonfinite, loss);
  if (refused) plan.action_code = static_cast<double>(Action::Refuse);
  return plan;
}

// Statistics of one tensor, stored as a row of a float64 tensor [n, 5]. gradfuse/_records.py has
// the same fields.
struct TensorStats {
  double norm;  // L2
  double largest;  // |g|
  double nonfinite;  // count
  double zeros;  // count
  double numel;  // -1 if there is no such tensor
};
constexpr int64_t kStatsFields = 5;
static_assert(sizeof(TensorStats) == kStatsFields * sizeof(double), "a row of a float64 [n, 5]");

GRADFUSE_HD TensorStats tensor_stats(const Stats& s, double numel) {
  return {to_double(norm_of(s.l2, {NormKind::L2, 2.0})), s.amax, static_cast<double>(s.nonfinite),
          static_cast<double>(s.zeros), numel};
}
GRADFUSE_HD TensorStats absent_stats() { return tensor_stats(Stats{}, -1.0); }

GRADFUSE_HD void unscale(TensorStats& stats, double scale) {
  stats.norm /= scale;
  stats.largest /= scale;
}

}  // namespace gradfuse
