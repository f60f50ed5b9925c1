// Traversal of an optimizer's step on the CPU: cuts the parameters into chunks and hands them to
// threads. Elements are updated independently, and the sums of update clipping have a slot per
// chunk and are combined in order, so the bits do not depend on the threads.
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
  ElementFactor factor;
};

// The inputs that determine a Prepared.
struct Source {
  int32_t group;
  DType dtype;
  double taken;
  ScaledNorm factor;

  bool operator==(const Source& o) const {
    return group == o.group && dtype == o.dtype && taken == o.taken &&
           factor.value == o.factor.value && factor.exponent == o.factor.exponent;
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

Prepared prepare(const OptimStep& step, const Source& source) {
  const GroupOptions& group = step.groups[source.group];
  Prepared out;
  if (step.rule == Rule::AdamW)
    out.adamw = adamw_factors(group.adamw, group.lr, source.taken + 1.0);
  else
    out.sgd = sgd_factors(group.sgd, group.lr, source.taken == 0.0);
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
    const Source source = {p.group, p.dtype, taken, step.use.factor_of_row(p.row)};
    // Update clipping gives each parameter its own step size. NaN never compares equal.
    if (out.distinct.empty() || step.update_clip || !(source == last))
      out.distinct.push_back(prepare(step, source));
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

// Reduces the step sizes of parameters with large updates. Reads gradient and exp_avg_sq once.
void clip_updates(const OptimStep& step, const Work& work, Preparations& prepared) {
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
    const double lr_scale = update_clip_factor(sum / static_cast<double>(p.numel));
    const GroupOptions& group = step.groups[p.group];
    const double lr = group.lr * lr_scale;
    prepared[tensor].adamw = adamw_factors(group.adamw, lr, prepared.taken[tensor] + 1.0);
  }
}

}  // namespace

void optim_step(const OptimStep& step) {
  if (step.use.is_refused()) return;
  const OptimKernels& kernels = optim_kernels();
  Preparations prepared = prepare(step);
  const Work work(step.params, kStreams);
  if (step.update_clip) clip_updates(step, work, prepared);
  work.for_each(true, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t k = end - 1; k >= begin; --k) {
      if (k >= kUpdatesAhead) {
        const Chunk& next = work.chunks[k - kUpdatesAhead];
        prefetch_chunk(step.params[next.tensor], next);
      }
      const Chunk& c = work.chunks[k];
      const ParamRef& p = step.params[c.tensor];
      const Prepared& with = prepared[c.tensor];
      const Rounding rounding =
          rounding_of(step.stochastic_rounding, p.row, prepared.taken[c.tensor]);
      if (step.rule == Rule::AdamW)
        kernels.adamw(p, c.start, c.length, with.adamw, with.factor, rounding);
      else
        kernels.sgd(p, c.start, c.length, with.sgd, with.factor, rounding);
    }
  });
  for (size_t i = 0; i < step.params.size(); ++i)
    if (step.params[i].step) *step.params[i].step = prepared.taken[i] + 1.0f;
}

}  // namespace gradfuse::cpu
