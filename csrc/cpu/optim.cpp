// Traversal of an optimizer's step on the CPU: cuts the parameters into chunks and hands them to
// threads. Elements are updated independently, and the sums of an LrScale have a slot per chunk and
// are combined in order, so the bits do not depend on the threads.
//
// The sweep runs backwards: after the norm, the caches hold the end of the gradients.

#include "../ops/optim.h"

#include <memory>
#include <type_traits>

#include "chunks.h"
#include "optim_kernels.h"

namespace gradfuse::cpu {

namespace {

constexpr int64_t kUpdatesAhead = 5;  // chunks
constexpr int64_t kStreams = 4;  // parameter, gradient, moments

// Values shared by all elements of a parameter, and mostly by its neighbours.
struct Prepared {
  AdamWFactors<double> adamw;
  SgdFactors<double> sgd;
  LionFactors<double> lion;
  ScheduleFreeStep schedule_free;
  ElementFactor factor;
};

// The inputs that determine a Prepared.
struct Source {
  int32_t group;
  DType dtype, state_dtype;
  double taken;
  ScaledNorm factor;
  double coefficient;
  Averaging averaging;

  bool operator==(const Source& o) const {
    return group == o.group && dtype == o.dtype && state_dtype == o.state_dtype &&
           taken == o.taken && factor.value == o.factor.value &&
           factor.exponent == o.factor.exponent && coefficient == o.coefficient &&
           averaging.weight_sum == o.averaging.weight_sum && averaging.lr_max == o.averaging.lr_max;
  }
};

// The Prepared of every parameter, and the steps it had taken before.
struct Preparations {
  std::vector<Prepared> distinct;
  std::vector<int32_t> of;  // [parameters] index into distinct
  std::vector<float> taken;  // [parameters]

  Prepared& operator[](int64_t param) { return distinct[of[param]]; }
  const Prepared& operator[](int64_t param) const { return distinct[of[param]]; }
};

// eps for one parameter; `options` are its group's.
template <class Options>
double eps_of(const OptimStep& step, const ParamRef& p, const Options& options) {
  if (!step.eps_follows_clip) return options.eps;
  return followed_eps(options.eps, options.beta2, step.use.coefficient_of_row(p.row),
                      smallest_normal(p.state_dtype));
}

// `lr_scale` multiplies the group's learning rate.
AdamWFactors<double> adamw_of(const OptimStep& step, const ParamRef& p, double taken,
                              double lr_scale) {
  const GroupOptions& group = step.groups[p.group];
  AdamWOptions options = group.adamw;
  options.eps = eps_of(step, p, options);
  return adamw_factors(options, group.lr * lr_scale, taken + 1.0, step.atan2);
}

ScheduleFreeStep schedule_free_of(const OptimStep& step, const ParamRef& p, double taken) {
  const GroupOptions& group = step.groups[p.group];
  ScheduleFreeOptions options = group.schedule_free;
  options.eps = eps_of(step, p, options);
  return schedule_free_step(options, group.lr, taken + 1.0, {*p.weight_sum, *p.lr_max});
}

Prepared prepare(const OptimStep& step, const ParamRef& p, const Source& source) {
  const GroupOptions& group = step.groups[p.group];
  Prepared out;
  switch (arithmetic_of(step.rule)) {
    case Rule::Sgd: out.sgd = sgd_factors(group.sgd, group.lr, source.taken == 0.0); break;
    case Rule::Lion: out.lion = lion_factors(group.lion, group.lr); break;
    case Rule::ScheduleFree: out.schedule_free = schedule_free_of(step, p, source.taken); break;
    default: out.adamw = adamw_of(step, p, source.taken, 1.0);
  }
  out.factor = element_factor(source.factor, source.dtype, step.use.bound, group.maximize);
  return out;
}

Preparations prepare(const OptimStep& step) {
  const size_t n = step.params.size();
  Preparations out;
  out.of.reserve(n);
  out.taken.reserve(n);
  Source last = {};
  const auto take = [&](size_t i) {
    const ParamRef& p = step.params[i];
    const float taken = p.step ? *p.step : 0.0f;
    Source source = {p.group, p.dtype, p.state_dtype, taken, step.use.factor_of_row(p.row),
                     1.0,     {}};
    if (step.eps_follows_clip) source.coefficient = step.use.coefficient_of_row(p.row);
    if (p.weight_sum) source.averaging = {*p.weight_sum, *p.lr_max};
    // An LrScale gives each parameter its own step size. NaN never compares equal.
    if (out.distinct.empty() || step.lr_scale != LrScale::None || !(source == last))
      out.distinct.push_back(prepare(step, p, source));
    last = source;
    out.of.push_back(static_cast<int32_t>(out.distinct.size() - 1));
    out.taken.push_back(taken);
  };
  prefetched(n, take, ahead(16, [&](size_t i) { prefetch_line<true>(step.params[i].step); }));
  return out;
}

// Prefetches the beginning of an upcoming chunk.
void prefetch_chunk(const ParamRef& p, const Chunk& c) {
  const auto from = [&](const void* data, DType dtype, auto writes) {
    const int64_t bytes = element_bytes(dtype);
    if (data)
      prefetch_run<writes>(static_cast<const char*>(data) + c.start * bytes, c.length * bytes);
  };
  from(p.param, p.dtype, std::true_type());
  from(p.grad, p.grad_dtype, std::false_type());
  from(p.exp_avg, p.state_dtype, std::true_type());
  from(p.exp_avg_sq, p.state_dtype, std::true_type());
  from(p.max_exp_avg_sq, p.state_dtype, std::true_type());
  from(p.master, DType::Float, std::true_type());
}

// The two sums of an LrScale over a part of a parameter.
struct ScaleSums {
  double first, second;
};

ScaleSums scale_sums(const OptimStep& step, const Chunk& c, const Prepared& with) {
  const ParamRef& p = step.params[c.tensor];
  const OptimKernels& kernels = optim_kernels();
  if (step.lr_scale == LrScale::UpdateClip)
    return {kernels.adamw_ratio_sum(p, c.start, c.length, with.adamw, with.factor), 0.0};
  ScaleSums sums;
  kernels.lamb_sums(p, c.start, c.length, step.groups[p.group].adamw.weight_decay, with.adamw,
                    with.factor, &sums.first, &sums.second);
  return sums;
}

double lr_scale(const OptimStep& step, const ParamRef& p, const ScaleSums& sums) {
  if (step.lr_scale == LrScale::UpdateClip)
    return update_clip_factor(sums.first / static_cast<double>(p.numel));
  return trust_ratio(sums.first, sums.second, step.groups[p.group].trust);
}

bool is_scaled(const OptimStep& step, const ParamRef& p) {
  return step.lr_scale != LrScale::TrustRatio || step.groups[p.group].trust.adapts;
}

// Multiplies the learning rates by their LrScale. Reads once what it depends on: gradient and
// exp_avg_sq, or all streams. Or only stores the sums, or takes the factors that others found.
void scale_lrs(const OptimStep& step, const Work& work, Preparations& prepared) {
  if (step.lr_scales) {
    for (size_t i = 0; i < step.params.size(); ++i) {
      const ParamRef& p = step.params[i];
      if (is_scaled(step, p))
        prepared[i].adamw = adamw_of(step, p, prepared.taken[i], step.lr_scales[p.row]);
    }
    return;
  }
  const int64_t chunks = static_cast<int64_t>(work.chunks.size());
  const std::unique_ptr<ScaleSums[]> sums(new ScaleSums[chunks]());
  work.for_each(false, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Chunk& c = work.chunks[k];
      if (is_scaled(step, step.params[c.tensor])) sums[k] = scale_sums(step, c, prepared[c.tensor]);
    }
  });
  for (int64_t k = 0; k < chunks;) {
    const int64_t tensor = work.chunks[k].tensor;
    const ParamRef& p = step.params[tensor];
    ScaleSums sum = {0.0, 0.0};
    for (; k < chunks && work.chunks[k].tensor == tensor; ++k) {
      sum.first += sums[k].first;
      sum.second += sums[k].second;
    }
    if (step.lr_sums) {
      step.lr_sums[2 * p.row] = sum.first;
      step.lr_sums[2 * p.row + 1] = sum.second;
    } else if (is_scaled(step, p)) {
      prepared[tensor].adamw = adamw_of(step, p, prepared.taken[tensor], lr_scale(step, p, sum));
    }
  }
}

void update(const OptimStep& step, const Chunk& c, const Prepared& with, const Rounding& rounding) {
  const OptimKernels& kernels = optim_kernels();
  const ParamRef& p = step.params[c.tensor];
  switch (arithmetic_of(step.rule)) {
    case Rule::Sgd: return kernels.sgd(p, c.start, c.length, with.sgd, with.factor, rounding);
    case Rule::Lion: return kernels.lion(p, c.start, c.length, with.lion, with.factor, rounding);
    case Rule::ScheduleFree:
      return kernels.schedule_free(p, c.start, c.length, with.schedule_free.factors, with.factor,
                                   rounding);
    default: kernels.adamw(p, c.start, c.length, with.adamw, with.factor, rounding);
  }
}

}  // namespace

void optim_step(const OptimStep& step) {
  if (step.use.is_refused()) return;
  Preparations prepared = prepare(step);
  const Work work(step.params, kStreams);
  if (step.lr_scale != LrScale::None) scale_lrs(step, work, prepared);
  if (step.lr_sums) return;
  work.for_each(true, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = end - 1; k >= begin; --k) {
      if (k >= kUpdatesAhead) {
        const Chunk& next = work.chunks[k - kUpdatesAhead];
        prefetch_chunk(step.params[next.tensor], next);
      }
      const Chunk& c = work.chunks[k];
      const int32_t row = step.params[c.tensor].row;
      update(step, c, prepared[c.tensor],
             rounding_of(step.stochastic_rounding, row, prepared.taken[c.tensor]));
    }
  });
  for (size_t i = 0; i < step.params.size(); ++i) {
    const ParamRef& p = step.params[i];
    if (p.step) *p.step = prepared.taken[i] + 1.0f;
    if (!p.weight_sum) continue;
    const Averaging& after = prepared[i].schedule_free.after;
    *p.weight_sum = after.weight_sum;
    *p.lr_max = after.lr_max;
  }
}

}  // namespace gradfuse::cpu
