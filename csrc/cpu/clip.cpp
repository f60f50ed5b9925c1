// Traversal of gradients on the CPU: cuts them into chunks, hands the chunks to threads, combines
// the results in chunk order.
//
// Chunk boundaries depend on the sizes alone and each chunk's result has its own slot, so the bits
// do not depend on the threads. The second sweep runs backwards, because the caches still hold the
// end of the first.

#include "../ops/clip.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "chunks.h"
#include "gradient_runs.h"

namespace gradfuse::cpu {

namespace {

// Prefetches the beginning of an upcoming chunk.
constexpr int64_t kClipAhead = 6;
void prefetch_chunk(const std::vector<GradRef>& grads, const Chunk& c) {
  const GradRef& g = grads[c.tensor];
  if (!g.layout) prefetch_run(at(g, c.start), c.length * element_bytes(g.dtype));
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

// Statistics of all gradients and of each, from run(item, gradient, start, length), the Stats of a
// part of one.
template <class F>
Stats measure(const Work& work, const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,
              double p, TensorStats* table, F run) {
  const int64_t chunks = static_cast<int64_t>(work.chunks.size());
  const std::unique_ptr<Stats[]> slots(new Stats[chunks]);  // of gradients in several chunks
  const std::unique_ptr<Stats[]> sums(new Stats[work.count()]);
  auto write_row = [&](int64_t grad, const Stats& s) {
    table[rows[grad]] = tensor_stats(s, static_cast<double>(grads[grad].numel));
  };
  work.for_each(false, [&](int64_t item, int64_t first, int64_t end) {
    Stats sum = {};
    for (int64_t k = first; k < end; ++k) {
      const Chunk& c = work.chunks[k];
      const GradRef& g = grads[c.tensor];
      if (k + kClipAhead < chunks) prefetch_chunk(grads, work.chunks[k + kClipAhead]);
      const Stats s = run(item, g, c.start, c.length);
      sum = merge(sum, s, p);
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
    for (; k < chunks && work.chunks[k].tensor == grad; ++k) sum = merge(sum, slots[k], p);
    write_row(grad, sum);
  }
  for (size_t i = 0; i < grads.size(); ++i)
    if (grads[i].numel == 0) write_row(static_cast<int64_t>(i), Stats{});
  Stats total = {};
  for (int64_t i = 0; i < work.count(); ++i) total = merge(total, sums[i], p);
  return total;
}

}  // namespace

Stats stats(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows, NormSpec spec,
            TensorStats* table) {
  const Work work(grads);
  return measure(work, grads, rows, spec.p, table,
                 [&](int64_t, const GradRef& g, int64_t start, int64_t length) {
                   return run_stats(g, start, length, spec);
                 });
}

void exact_limbs(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows, LimbForm form,
                 int64_t* words, TensorStats* table) {
  const Work work(grads);
  // Each item has words of its own, because any thread may take it.
  const int64_t size = work.count() * form.words();
  const std::unique_ptr<int64_t[]> each(new int64_t[size]());
  measure(work, grads, rows, 2.0, table,
          [&](int64_t item, const GradRef& g, int64_t start, int64_t length) {
            LimbSum sum = {each.get() + item * form.words(), form};
            const Stats s = run_exact(g, start, length, sum);
            sum.finish();
            return s;
          });
  std::fill(words, words + form.words(), 0);
  for (int64_t i = 0; i < work.count(); ++i) add_words(words, each.get() + i * form.words(), form);
  carry(words, form);
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

}  // namespace gradfuse::cpu
