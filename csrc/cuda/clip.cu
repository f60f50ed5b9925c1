// Gradient clipping by a plan and by value.
//
//   dense_apply     a block per chunk: returns at once if the plan says Keep, else reads and writes
//   dense_clamp     a block per chunk: reads, writes the words that change
//
// Assumes element-aligned data; reads 16 bytes at a time from the first 16-byte boundary on.

#include "../ops/clip.h"
#include "gradient_launches.cuh"
#include "stats.cuh"

namespace gradfuse::cuda {
namespace {

// `own` is a gradient's coefficient on top of the plan's factor, or null.
__device__ Factor factor_in(const ClipPlan& plan, const double* own) {
  return factor_of({plan.factor.value * (own ? *own : 1.0), plan.factor.exponent});
}

// Whether gradients stay unchanged.
__device__ bool keeps(const ClipPlan& plan, const double* coefficients) {
  if (plan.action() == Action::Keep) return !coefficients && plan.factor.value == 1.0;
  return plan.is_refused();
}

template <class T>
__device__ void zero_run(T* x, int64_t n) {
  constexpr int kPer = kPer16Bytes<T>;
  const int64_t head = unaligned_head(x, n);
  const int64_t whole = (n - head) / kPer;
  if (threadIdx.x < head) x[threadIdx.x] = Element<T>::narrow(0);
  for (int64_t w = threadIdx.x; w < whole; w += kThreads)
    store_word(x + head + w * kPer, Word<T>());
  const int64_t tail = head + whole * kPer + threadIdx.x;
  if (tail < n) x[tail] = Element<T>::narrow(0);
}

template <class T, int kRuns>
__global__ void __launch_bounds__(kThreads)
    dense_apply(const __grid_constant__ DenseBatch<kRuns> batch, const ClipPlan* plan,
                const double* coefficients) {  // [rows] or null
  if (keeps(*plan, coefficients)) return;
  const BlockChunk c = chunk_of_block(batch, block_from_last());
  T* x = static_cast<T*>(batch.data[c.run]) + c.start;
  if (plan->action() == Action::Zero) return zero_run(x, c.length);
  const double* own = coefficients ? coefficients + batch.row[c.run] : nullptr;
  const Factor factor = factor_in(*plan, own);
  if (factor.whole != 1.0) scale_run<T, kThreads>(x, c.length, factor);
}

__global__ void __launch_bounds__(kThreads)
    strided_apply(const __grid_constant__ StridedRun run, int64_t chunk, const ClipPlan* plan,
                  const double* own) {  // [] or null
  if (keeps(*plan, own)) return;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * chunk;
  const int64_t end = start + chunk < run.numel ? start + chunk : run.numel;
  if (plan->action() != Action::Zero)
    return scale_strided<kThreads>(run, 0, start, end, factor_in(*plan, own));
  const int parts = run.is_complex ? 2 : 1;
  for (int64_t i = start + threadIdx.x; i < end; i += kThreads)
    for (int k = 0; k < parts; ++k)
      with_type(run.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        static_cast<T*>(run.data)[parts * strided_offset(run, i) + k] = Element<T>::narrow(0);
      });
}

// The bound rounded to T, as torch's clamp_ rounds it.
template <class T>
__device__ typename Element<T>::Wide rounded_bound(double bound) {
  using E = Element<T>;
  return E::widen(E::narrow(static_cast<typename E::Wide>(bound)));
}

// Clamps x; returns whether it changed. NaN stays: both comparisons are false.
template <class T>
__device__ bool clamp_element(T& x, typename Element<T>::Wide bound) {
  const typename Element<T>::Wide wide = Element<T>::widen(x);
  if (wide > bound)
    x = Element<T>::narrow(bound);
  else if (wide < -bound)
    x = Element<T>::narrow(-bound);
  else
    return false;
  return true;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dense_clamp(const __grid_constant__ ManyDense batch, double wide_bound) {
  constexpr int kPer = kPer16Bytes<T>;
  constexpr int kUnroll = 4;
  const auto bound = rounded_bound<T>(wide_bound);
  const BlockChunk c = chunk_of_block(batch, blockIdx.x);
  T* x = static_cast<T*>(batch.data[c.run]) + c.start;
  auto update = [=](int64_t i, Word<T> w) {
    bool changed = false;
#pragma unroll
    for (int k = 0; k < kPer; ++k) changed |= clamp_element(w.element[k], bound);
    if (changed) store_word(x + i, w);
  };
  visit_run<T, kThreads, kUnroll>(
      x, c.length,
      [=](int64_t i) {
        T value = x[i];
        if (clamp_element(value, bound)) x[i] = value;
      },
      [=](int64_t i, const Word<T>(&words)[kUnroll]) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) update(i + u * kThreads * kPer, words[u]);
      },
      [=](int64_t i, const Word<T>& w) { update(i, w); });
}

__global__ void __launch_bounds__(kThreads)
    strided_clamp(const __grid_constant__ StridedRun run, int64_t chunk, double wide_bound) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * chunk;
  const int64_t end = start + chunk < run.numel ? start + chunk : run.numel;
  for (int64_t i = start + threadIdx.x; i < end; i += kThreads)
    with_type(run.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      T* x = static_cast<T*>(run.data) + strided_offset(run, i);
      T value = *x;
      if (clamp_element(value, rounded_bound<T>(wide_bound))) *x = value;
    });
}

}  // namespace

void apply(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,
           const ClipPlan* plan, const double* coefficients, Stream stream) {
  const int64_t chunk = chunk_elements(grads);
  for_each_launch(
      grads, nullptr, &rows,
      [&](auto type, const ManyDense& batch, unsigned blocks) {
        using T = typename decltype(type)::type;
        if (batch.count <= kFewRuns)
          dense_apply<T><<<blocks, kThreads, 0, stream>>>(few(batch), plan, coefficients);
        else
          dense_apply<T><<<blocks, kThreads, 0, stream>>>(batch, plan, coefficients);
        check_launch("dense_apply");
      },
      [&](const StridedRun& run, unsigned blocks, int64_t, size_t i) {
        const double* own = coefficients ? coefficients + rows[i] : nullptr;
        strided_apply<<<blocks, kThreads, 0, stream>>>(run, chunk, plan, own);
        check_launch("strided_apply");
      });
}

void clamp(const std::vector<GradRef>& grads, double bound, Stream stream) {
  const int64_t chunk = chunk_elements(grads);
  for_each_launch(
      grads, nullptr, nullptr,
      [&](auto type, const ManyDense& batch, unsigned blocks) {
        using T = typename decltype(type)::type;
        dense_clamp<T><<<blocks, kThreads, 0, stream>>>(batch, bound);
        check_launch("dense_clamp");
      },
      [&](const StridedRun& run, unsigned blocks, int64_t, size_t) {
        strided_clamp<<<blocks, kThreads, 0, stream>>>(run, chunk, bound);
        check_launch("strided_clamp");
      });
}

}  // namespace gradfuse::cuda
