// Traversal of gradients on the CPU: cuts them into chunks, hands the chunks to threads, combines
// the results in chunk order.
//
// Chunk borders depend on the sizes alone and each chunk's result has a slot of its own, so the
// bits do not depend on the threads. The second sweep runs backwards: the end of the first one is
// what the caches still hold.

#include <pthread.h>

#include <cstring>
#include <memory>

#include "kernels.h"
#include "strided.h"
#include "work.h"

namespace gradfuse::cpu {

namespace {

bool g_forked = false;
[[maybe_unused]] const int g_fork_hook = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

constexpr int64_t kBuffer = 2048;  // elements gathered at a time

char* at(const GradRef& g, int64_t element) {
  return static_cast<char*>(g.data) + element * element_bytes(g.dtype) * (g.is_complex ? 2 : 1);
}

// Asks for the beginning of a chunk that comes soon.
constexpr int64_t kAhead = 6;
void prefetch_chunk(const std::vector<GradRef>& grads, const Chunk& c) {
  const GradRef& g = grads[c.tensor];
  if (!g.layout) prefetch_run(at(g, c.start), c.length * element_bytes(g.dtype));
}

// Stats of elements [start, start + n) of g. Strided and complex ones pass through a buffer.
Stats run_stats(const GradRef& g, int64_t start, int64_t n, NormSpec spec) {
  const ClipKernels& kernels = clip_kernels();
  if (!g.layout && !g.is_complex) return kernels.stats(at(g, start), g.dtype, n, spec);
  alignas(64) char gathered[kBuffer * 16];
  alignas(64) double modulus[kBuffer];
  const int64_t bytes = element_bytes(g.dtype) * (g.is_complex ? 2 : 1);
  Stats total = {};
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t m = std::min(kBuffer, n - i);
    const void* dense = at(g, start + i);
    if (g.layout) {
      copy_strided(g.data, *g.layout, bytes, start + i, m, gathered, true);
      dense = gathered;
    }
    DType dtype = g.dtype;
    if (g.is_complex) {
      if (dtype == DType::Float)
        moduli<float>(dense, m, modulus);
      else
        moduli<double>(dense, m, modulus);
      dense = modulus;
      dtype = DType::Double;
    }
    total = merge(total, kernels.stats(dense, dtype, m, spec), spec.p);
  }
  return total;
}

// Applies f(pointer, elements) to dense runs that hold elements [start, start + n) of g, parts of
// complex numbers counted singly. What was gathered is written back if f returns true.
template <class F>
void update_run(const GradRef& g, int64_t start, int64_t n, F f) {
  const int64_t parts = g.is_complex ? 2 : 1;
  if (!g.layout) {
    f(at(g, start), n * parts);
    return;
  }
  alignas(64) char gathered[kBuffer * 16];
  const int64_t bytes = element_bytes(g.dtype) * parts;
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t m = std::min(kBuffer, n - i);
    copy_strided(g.data, *g.layout, bytes, start + i, m, gathered, true);
    if (f(gathered, m * parts))
      copy_strided(g.data, *g.layout, bytes, start + i, m, gathered, false);
  }
}

template <class F>
void update(const std::vector<GradRef>& grads, bool backwards, F f) {
  const Work work(grads);
  work.for_each(backwards, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t k = first; k < end; ++k) {
      const Chunk& c = work.chunks[k];
      const GradRef& g = grads[c.tensor];
      update_run(g, c.start, c.length, [&](void* x, int64_t n) { return f(x, g.dtype, n); });
    }
  });
}

// x *= factor.
bool scale_by(void* x, DType dtype, int64_t n, const Factor& factor) {
  const ClipKernels& kernels = clip_kernels();
  if ((factor.second == 1.0 && factor.third == 1.0) || dtype != DType::Double) {
    kernels.scale(x, dtype, n, factor.whole);
  } else {
    for (double step : {factor.first, factor.second, factor.third})
      kernels.scale(x, dtype, n, step);
  }
  return true;
}

}  // namespace

bool forked() { return g_forked; }

const char* isa() { return clip_kernels().isa; }

Stats stats(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows, NormSpec spec,
            double* table) {
  const Work work(grads);
  const int64_t chunks = static_cast<int64_t>(work.chunks.size());
  const std::unique_ptr<Stats[]> slots(new Stats[chunks]);  // of gradients in several chunks
  const std::unique_ptr<Stats[]> sums(new Stats[work.count()]);
  auto write_row = [&](int64_t grad, const Stats& s) {
    write_table_row(s, static_cast<double>(grads[grad].numel), table + rows[grad] * kTableColumns);
  };
  work.for_each(false, [&](int64_t item, int64_t first, int64_t end) {
    Stats sum = {};
    for (int64_t k = first; k < end; ++k) {
      const Chunk& c = work.chunks[k];
      const GradRef& g = grads[c.tensor];
      if (k + kAhead < chunks) prefetch_chunk(grads, work.chunks[k + kAhead]);
      const Stats s = run_stats(g, c.start, c.length, spec);
      sum = merge(sum, s, spec.p);
      if (c.length == g.numel)
        write_row(c.tensor, s);
      else
        slots[k] = s;
    }
    sums[item] = sum;
  });
  for (int64_t k = 0; k < chunks;) {
    const int64_t grad = work.chunks[k].tensor;
    if (work.chunks[k].length == grads[grad].numel) {
      ++k;
      continue;
    }
    Stats sum = {};
    for (; k < chunks && work.chunks[k].tensor == grad; ++k) sum = merge(sum, slots[k], spec.p);
    write_row(grad, sum);
  }
  for (size_t i = 0; i < grads.size(); ++i)
    if (grads[i].numel == 0) write_row(static_cast<int64_t>(i), Stats{});
  Stats total = {};
  for (int64_t i = 0; i < work.count(); ++i) total = merge(total, sums[i], spec.p);
  return total;
}

void scale(const std::vector<GradRef>& grads, ScaledNorm norm_factor) {
  const Factor factor = factor_of(norm_factor);
  update(grads, true,
         [=](void* x, DType dtype, int64_t n) { return scale_by(x, dtype, n, factor); });
}

void scale_each(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,
                ScaledNorm norm_factor, const double* coefficients) {
  const Work work(grads);
  work.for_each(true, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t k = first; k < end; ++k) {
      const Chunk& c = work.chunks[k];
      const GradRef& g = grads[c.tensor];
      const double own = coefficients[rows[c.tensor]];
      const Factor factor = factor_of({norm_factor.value * own, norm_factor.exponent});
      if (factor.whole == 1.0) continue;
      update_run(g, c.start, c.length,
                 [&](void* x, int64_t n) { return scale_by(x, g.dtype, n, factor); });
    }
  });
}

void zero(const std::vector<GradRef>& grads) {
  update(grads, true, [](void* x, DType dtype, int64_t n) {
    std::memset(x, 0, n * element_bytes(dtype));
    return true;
  });
}

void clamp(const std::vector<GradRef>& grads, double bound) {
  update(grads, false,
         [=](void* x, DType dtype, int64_t n) { return clip_kernels().clamp(x, dtype, n, bound); });
}

void clip_units(const std::vector<UnitRef>& units, double clip_factor, double eps, NormSpec spec) {
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
  for_each_item(static_cast<int64_t>(items.size()), total, [&](int64_t i) {
    const UnitRef& u = units[items[i].param];
    for (int64_t row = items[i].first; row < items[i].last; ++row) {
      GradRef weight = u.weight, grad = u.grad;
      weight.data = at(u.weight, row * u.weight_stride);
      grad.data = at(u.grad, row * u.grad_stride);
      const Stats w = run_stats(weight, 0, weight.numel, spec);
      const Stats g = run_stats(grad, 0, grad.numel, spec);
      const ScaledNorm c = unit_coefficient(norm_of(sum_of(w, spec), spec),
                                            norm_of(sum_of(g, spec), spec), clip_factor, eps);
      if (c.value == 1.0 && c.exponent == 0.0) continue;
      update_run(grad, 0, grad.numel,
                 [&](void* x, int64_t n) { return scale_by(x, grad.dtype, n, factor_of(c)); });
    }
  });
}

}  // namespace gradfuse::cpu
