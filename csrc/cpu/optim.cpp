// Traversal of an optimizer's step on the CPU: cuts the parameters into chunks and hands them to
// threads. An element's update depends on no other, and the sums of update clipping have a slot for
// each chunk, combined in order: the bits do not depend on the threads.
//
// The sweep runs backwards, for the end of the gradients is what the caches hold after their norm
// was taken.

#include <memory>

#include "kernels.h"
#include "work.h"

namespace gradfuse::cpu {

namespace {

// What is the same for all elements of a parameter.
struct Prepared {
  AdamWFactors<double> adamw;
  SgdFactors<double> sgd;
  ElementFactor factor;
  Rounding rounding;
};

ScaledNorm factor_for(const GradientUse& use, int32_t row) {
  ScaledNorm factor = {1.0, 0.0};
  if (use.totals) factor = {use.totals[6], use.totals[7]};
  if (use.coefficients) factor.value *= use.coefficients[row];
  return factor;
}

Prepared prepare(const OptimStep& step, const ParamRef& p) {
  const GroupOptions& group = step.groups[p.group];
  const double taken = p.step ? *p.step : 0.0;
  Prepared out;
  if (step.rule == Rule::AdamW)
    out.adamw = adamw_factors(group.adamw, group.lr, taken + 1.0);
  else
    out.sgd = sgd_factors(group.sgd, group.lr, taken == 0.0);
  out.factor = element_factor(factor_for(step.use, p.row), p.dtype, step.use.bound, group.maximize);
  out.rounding = rounding_of(step.stochastic_rounding, p.row, taken);
  return out;
}

// Divides the step sizes of parameters whose updates would be large. Reads gradient and second
// moment once.
void clip_updates(const OptimStep& step, const Work& work, std::vector<Prepared>& prepared) {
  const int64_t chunks = static_cast<int64_t>(work.chunks.size());
  const std::unique_ptr<double[]> sums(new double[chunks]);
  work.for_each(false, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Chunk& c = work.chunks[k];
      const Prepared& with = prepared[c.tensor];
      sums[k] = optim_kernels().adamw_ratio_sum(step.params[c.tensor], c.start, c.length,
                                                with.adamw, with.factor);
    }
  });
  for (int64_t k = 0; k < chunks;) {
    const int64_t tensor = work.chunks[k].tensor;
    const ParamRef& p = step.params[tensor];
    double sum = 0.0;
    for (; k < chunks && work.chunks[k].tensor == tensor; ++k) sum += sums[k];
    const double slower = update_clip_factor(sum / static_cast<double>(p.numel));
    const GroupOptions& group = step.groups[p.group];
    const double lr = group.lr * slower;
    prepared[tensor].adamw = adamw_factors(group.adamw, lr, *p.step + 1.0);
  }
}

}  // namespace

void optim_step(const OptimStep& step) {
  if (step.use.totals) {
    const Action action = static_cast<Action>(static_cast<int>(step.use.totals[3]));
    if (action == Action::Skip || action == Action::Refuse) return;
  }
  const OptimKernels& kernels = optim_kernels();
  std::vector<Prepared> prepared;
  prepared.reserve(step.params.size());
  for (const ParamRef& p : step.params) prepared.push_back(prepare(step, p));
  const Work work(step.params);
  if (step.update_clip) clip_updates(step, work, prepared);
  work.for_each(true, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = end - 1; k >= begin; --k) {
      const Chunk& c = work.chunks[k];
      const ParamRef& p = step.params[c.tensor];
      const Prepared& with = prepared[c.tensor];
      if (step.rule == Rule::AdamW)
        kernels.adamw(p, c.start, c.length, with.adamw, with.factor, with.rounding);
      else
        kernels.sgd(p, c.start, c.length, with.sgd, with.factor, with.rounding);
    }
  });
  for (const ParamRef& p : step.params)
    if (p.step) *p.step += 1.0f;
}

}  // namespace gradfuse::cpu
