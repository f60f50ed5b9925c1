// Traversal of adaptive clipping on the CPU. One thread does all of a unit: both norms, the
// coefficient and the scaling.
#include "../ops/adaptive_clip.h"

#include "chunks.h"
#include "gradient_runs.h"

namespace gradfuse::cpu {

void adaptive_clip(const std::vector<UnitRef>& units, UnitLimit limit, double scale) {
  const NormSpec spec = limit.spec;
  // Items are runs of whole units of about kItem elements.
  struct Item {
    int64_t param, first, last;
  };
  std::vector<Item> items;
  int64_t total = 0;
  for (size_t u = 0; u < units.size(); ++u) {
    const int64_t step = std::max<int64_t>(1, kItem / units[u].grad.numel);
    total += units[u].rows * units[u].grad.numel;
    for (int64_t first = 0; first < units[u].rows; first += step)
      items.push_back({static_cast<int64_t>(u), first, std::min(units[u].rows, first + step)});
  }
  for_each_item({static_cast<int64_t>(items.size()), total}, [&](int64_t i) {
    const UnitRef& u = units[items[i].param];
    for (int64_t row = items[i].first; row < items[i].last; ++row) {
      GradRef weight = u.weight, grad = u.grad;
      weight.data = at(u.weight, row * u.weight_stride);
      grad.data = at(u.grad, row * u.grad_stride);
      const Stats w = run_stats(weight, 0, weight.numel, spec);
      const Stats g = run_stats(grad, 0, grad.numel, spec);
      const ScaledNorm c =
          unit_coefficient(norm_of(sum_of(w, spec), spec), norm_of(sum_of(g, spec), spec),
                           limit.clip_factor, limit.eps, scale);
      if (c.value == 1.0 && c.exponent == 0.0) continue;
      update_run(grad, 0, grad.numel,
                 [&](void* x, int64_t n) { return scale_by(x, grad.dtype, n, factor_of(c)); });
    }
  });
}

}  // namespace gradfuse::cpu
