// Gradient clipping by norm and by value, for any number of gradients in a handful of launches.
//
//   dense_stats     a block per chunk: one read, a Stats into the chunk's slot
//   merge_slots     a block per gradient: its slots in order, its table row
//   finish          one block: all gradients in order, the plan, the norm
//   dense_apply     a block per chunk: returns at once if the plan says Keep, else reads and writes
//
// Assumes element-aligned data; reads 16 bytes at a time from the first 16-byte boundary on.
// Strided and complex gradients take a launch each. Results do not depend on the order of the
// blocks.

#include "../ops/clip.h"

#include <algorithm>

#include "launch.cuh"
#include "stats.cuh"

namespace gradfuse::cuda {
namespace {

// Many dense runs of one type.
struct DenseBatch {
  static constexpr int kCapacity = 1024;
  void* data[kCapacity];
  int64_t numel[kCapacity];
  int64_t first_block[kCapacity];
  int32_t row[kCapacity];  // of each run, in the caller's list
  int64_t first_slot;
  int64_t chunk;
  int32_t count;
};

template <class T, bool kPower>
__global__ void __launch_bounds__(kThreads)
    dense_stats(const __grid_constant__ DenseBatch batch, NormSpec spec,
                Stats* slots) {  // [all chunks]
  constexpr int kUnroll = kPower ? 1 : 4;  // powers take many registers
  const BlockChunk c = chunk_of_block(batch);
  const T* x = static_cast<const T*>(batch.data[c.run]) + c.start;
  const Stats mine = thread_stats<T, kThreads, kUnroll, kPower>(x, c.length, spec);
  const Stats total = block_merge<kThreads>(mine, spec.p);
  if (threadIdx.x == 0) slots[batch.first_slot + blockIdx.x] = total;
}

template <bool kPower>
__global__ void __launch_bounds__(kThreads)
    strided_stats(const __grid_constant__ StridedRun run, int64_t chunk, NormSpec spec,
                  Stats* slots) {  // [chunks of this run]
  const int64_t start = static_cast<int64_t>(blockIdx.x) * chunk;
  const int64_t end = start + chunk < run.numel ? start + chunk : run.numel;
  const Stats mine = strided_thread_stats<kThreads, kPower>(run, 0, start, end, spec);
  const Stats total = block_merge<kThreads>(mine, spec.p);
  if (threadIdx.x == 0) slots[blockIdx.x] = total;
}

// The slots of many gradients.
struct SlotBatch {
  static constexpr int kCapacity = 1024;
  int64_t first_slot[kCapacity];
  int64_t numel[kCapacity];
  int64_t row[kCapacity];
  int64_t chunk;
};
static_assert(sizeof(SlotBatch) <= kMostParameterBytes, "a kernel's parameters are limited");

__global__ void __launch_bounds__(kThreads)
    merge_slots(const __grid_constant__ SlotBatch batch, const Stats* slots, double p,
                const float* scale,  // [] or null
                Stats* per_grad,  // [gradients of this batch]
                TensorStats* stats) {  // [rows]
  const int64_t numel = batch.numel[blockIdx.x];
  const int64_t count = (numel + batch.chunk - 1) / batch.chunk;
  const Stats* mine = slots + batch.first_slot[blockIdx.x];
  Stats sum = {};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum = merge(sum, mine[i], p);
  const Stats total = block_merge<kThreads>(sum, p);
  if (threadIdx.x == 0) {
    per_grad[blockIdx.x] = total;
    TensorStats row = tensor_stats(total, static_cast<double>(numel));
    if (scale) unscale(row, *scale);
    stats[batch.row[blockIdx.x]] = row;
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    finish(const Stats* per_grad, int64_t count, const __grid_constant__ NormCall call) {
  const NormSpec spec = call.spec;
  Stats sum = {};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum = merge(sum, per_grad[i], spec.p);
  const Stats total = block_merge<kThreads>(sum, spec.p);
  if (threadIdx.x != 0) return;
  const LossScale loss = {call.scale ? *call.scale : 1.0,
                          call.found_inf && *call.found_inf != 0.0f};
  const ClipPlan plan =
      unscaled_plan(sum_of(total, spec), spec, call.max_norm, call.nonfinite, loss);
  *call.plan = plan;
  if (call.norm_is_double)
    *static_cast<double*>(call.norm) = plan.norm;
  else
    *static_cast<float*>(call.norm) = static_cast<float>(plan.norm);
}

__global__ void plan_of_norm(const double* norm, double max_norm, ClipPlan* plan) {
  ClipPlan made = clip_plan({*norm, 0}, max_norm, NonFinite::Propagate);
  made.sum = {*norm, 0};
  *plan = made;
}

// All rows are marked absent first; those of gradients are written later.
__global__ void __launch_bounds__(kThreads) mark_absent(TensorStats* stats, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < rows) stats[row] = absent_stats();
}

// `own` is a gradient's coefficient on top of the plan's factor, or null.
__device__ Factor factor_in(const ClipPlan& plan, const double* own) {
  return factor_of({plan.factor.value * (own ? *own : 1.0), plan.factor.exponent});
}

// Whether gradients stay as they are.
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

template <class T>
__global__ void __launch_bounds__(kThreads)
    dense_apply(const __grid_constant__ DenseBatch batch, const ClipPlan* plan,
                const double* coefficients) {  // [rows] or null
  if (keeps(*plan, coefficients)) return;
  const BlockChunk c = chunk_of_block(batch);
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

// The bound as T holds it, as torch's clamp_ rounds it.
template <class T>
__device__ typename Element<T>::Wide rounded_bound(double bound) {
  using E = Element<T>;
  return E::widen(E::narrow(static_cast<typename E::Wide>(bound)));
}

// Whether x changed. NaN stays: both comparisons are false.
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
    dense_clamp(const __grid_constant__ DenseBatch batch, double wide_bound) {
  constexpr int kPer = kPer16Bytes<T>;
  constexpr int kUnroll = 4;
  const auto bound = rounded_bound<T>(wide_bound);
  const BlockChunk c = chunk_of_block(batch);
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

// Cuts the gradients into launches: dense(T, batch, blocks) for up to kCapacity dense runs of one
// type, strided(run, blocks, first slot, gradient) for each other one. Slots follow launch order;
// `slot_of`, if given, receives each gradient's first; `rows`, if given, says the batches' rows.
template <class Dense, class Strided>
void for_each_launch(const std::vector<GradRef>& grads, std::vector<int64_t>* slot_of,
                     const std::vector<int64_t>* rows, Dense dense, Strided strided) {
  const int64_t chunk = chunk_elements(grads);
  DType dtype = DType::Half;
  const auto launch = [&](const DenseBatch& batch, unsigned blocks) {
    with_type(dtype, [&](auto type) { dense(type, batch, blocks); });
  };
  Launches<DenseBatch, decltype(launch)> launches(launch);
  launches.batch().chunk = chunk;
  for (DType each : {DType::Half, DType::BFloat16, DType::Float, DType::Double}) {
    dtype = each;
    for (size_t i = 0; i < grads.size(); ++i) {
      const GradRef& g = grads[i];
      if (g.dtype != dtype || !is_batched(g)) continue;
      if (slot_of) (*slot_of)[i] = launches.next_slot();
      if (g.numel == 0) continue;
      const int k = launches.add(divided_up(g.numel, chunk));
      DenseBatch& batch = launches.batch();
      batch.data[k] = g.data;
      batch.numel[k] = g.numel;
      batch.row[k] = rows ? static_cast<int32_t>((*rows)[i]) : 0;
    }
    launches.flush();
  }
  int64_t slot = launches.next_slot();
  for (size_t i = 0; i < grads.size(); ++i) {
    const GradRef& g = grads[i];
    if (is_batched(g)) continue;
    if (slot_of) (*slot_of)[i] = slot;
    if (g.numel == 0) continue;
    const int64_t blocks = divided_up(g.numel, chunk);
    strided(strided_run(g), grid(blocks), slot, i);
    slot += blocks;
  }
}

}  // namespace

int64_t stats_scratch_bytes(const std::vector<GradRef>& grads) {
  const int64_t chunk = chunk_elements(grads);
  int64_t slots = static_cast<int64_t>(grads.size());
  for (const GradRef& g : grads) slots += divided_up(g.numel, chunk);
  return slots * static_cast<int64_t>(sizeof(Stats));
}

void stats(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,
           const NormCall& call, void* scratch, Stream stream) {
  const int64_t chunk = chunk_elements(grads);
  const int64_t count = static_cast<int64_t>(grads.size());
  const NormSpec spec = call.spec;
  Stats* const per_grad = static_cast<Stats*>(scratch);
  Stats* const slots = per_grad + count;

  if (call.rows != count) {
    mark_absent<<<grid(divided_up(call.rows, kThreads)), kThreads, 0, stream>>>(call.stats,
                                                                                call.rows);
    check_launch("mark_absent");
  }
  std::vector<int64_t> slot_of(grads.size());
  for_each_launch(
      grads, &slot_of, nullptr,
      [&](auto type, const DenseBatch& batch, unsigned blocks) {
        using T = typename decltype(type)::type;
        if (spec.kind == NormKind::P)
          dense_stats<T, true><<<blocks, kThreads, 0, stream>>>(batch, spec, slots);
        else
          dense_stats<T, false><<<blocks, kThreads, 0, stream>>>(batch, spec, slots);
        check_launch("dense_stats");
      },
      [&](const StridedRun& run, unsigned blocks, int64_t slot, size_t) {
        if (spec.kind == NormKind::P)
          strided_stats<true><<<blocks, kThreads, 0, stream>>>(run, chunk, spec, slots + slot);
        else
          strided_stats<false><<<blocks, kThreads, 0, stream>>>(run, chunk, spec, slots + slot);
        check_launch("strided_stats");
      });
  for (int64_t first = 0; first < count; first += SlotBatch::kCapacity) {
    const int64_t n = std::min<int64_t>(count - first, SlotBatch::kCapacity);
    SlotBatch batch;
    batch.chunk = chunk;
    for (int64_t i = 0; i < n; ++i) {
      batch.first_slot[i] = slot_of[first + i];
      batch.numel[i] = grads[first + i].numel;
      batch.row[i] = rows[first + i];
    }
    merge_slots<<<grid(n), kThreads, 0, stream>>>(batch, slots, spec.p, call.scale,
                                                  per_grad + first, call.stats);
    check_launch("merge_slots");
  }
  finish<<<1, kThreads, 0, stream>>>(per_grad, count, call);
  check_launch("finish");
}

void plan(const double* norm, double max_norm, ClipPlan* plan, Stream stream) {
  plan_of_norm<<<1, 1, 0, stream>>>(norm, max_norm, plan);
  check_launch("plan_of_norm");
}

void apply(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,
           const ClipPlan* plan, const double* coefficients, Stream stream) {
  const int64_t chunk = chunk_elements(grads);
  for_each_launch(
      grads, nullptr, &rows,
      [&](auto type, const DenseBatch& batch, unsigned blocks) {
        using T = typename decltype(type)::type;
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
      [&](auto type, const DenseBatch& batch, unsigned blocks) {
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
