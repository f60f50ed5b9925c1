// Gradient clipping by norm and by value, for any number of gradients in a handful of launches.
//
//   dense_stats     a block per chunk: one read, a Stats into the chunk's slot
//   merge_slots     a block per gradient: its slots in order, its table row
//   finish          one block: all gradients in order, the plan, the norm
//   merge_few       one block, instead of these two, for few short gradients
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
template <int kRuns>
struct DenseBatch {
  static constexpr int kCapacity = kRuns;
  void* data[kCapacity];
  int64_t numel[kCapacity];
  int32_t first_block[kCapacity];
  int32_t row[kCapacity];  // of each run, in the caller's list
  int64_t first_slot;
  int64_t chunk;
  int32_t count;
};
using ManyDense = DenseBatch<kManyRuns>;
using FewDense = DenseBatch<kFewRuns>;

FewDense few(const ManyDense& many) {
  FewDense batch;
  std::copy_n(many.data, many.count, batch.data);
  std::copy_n(many.numel, many.count, batch.numel);
  std::copy_n(many.first_block, many.count, batch.first_block);
  std::copy_n(many.row, many.count, batch.row);
  batch.first_slot = many.first_slot;
  batch.chunk = many.chunk;
  batch.count = many.count;
  return batch;
}

// Without the number of blocks, ptxas spills some registers for more of them.
template <class T, Sums kSums, int kRuns>
__global__ void __launch_bounds__(kThreads, kSums == Sums::Squares ? 4 : 2)
    dense_stats(const __grid_constant__ DenseBatch<kRuns> batch, NormSpec spec,
                Stats* slots) {  // [all chunks]
  constexpr int kUnroll = kSums == Sums::Powers ? 1 : 4;  // they take many registers
  const BlockChunk c = chunk_of_block(batch, blockIdx.x);
  const T* x = static_cast<const T*>(batch.data[c.run]) + c.start;
  const Stats mine = thread_stats<T, kThreads, kUnroll, kSums>(x, c.length, spec);
  const Stats total = block_merge<kThreads>(mine, spec.p);
  if (threadIdx.x == 0) slots[batch.first_slot + blockIdx.x] = total;
}

template <Sums kSums>
__global__ void __launch_bounds__(kThreads)
    strided_stats(const __grid_constant__ StridedRun run, int64_t chunk, NormSpec spec,
                  Stats* slots) {  // [chunks of this run]
  const int64_t start = static_cast<int64_t>(blockIdx.x) * chunk;
  const int64_t end = start + chunk < run.numel ? start + chunk : run.numel;
  const Stats mine = strided_thread_stats<kThreads, kSums>(run, 0, start, end, spec);
  const Stats total = block_merge<kThreads>(mine, spec.p);
  if (threadIdx.x == 0) slots[blockIdx.x] = total;
}

// The slots of many gradients.
template <int kGrads>
struct SlotBatch {
  static constexpr int kCapacity = kGrads;
  int64_t first_slot[kCapacity];
  int64_t numel[kCapacity];
  int32_t slots[kCapacity];
  int32_t row[kCapacity];
};
static_assert(sizeof(SlotBatch<kManyRuns>) <= kMostParameterBytes,
              "a kernel's parameters are limited");

__device__ TensorStats row_of(const Stats& total, int64_t numel, const float* scale) {
  TensorStats row = tensor_stats(total, static_cast<double>(numel));
  if (scale) unscale(row, *scale);
  return row;
}

__device__ void write_plan(const ClipPlan& plan, const NormCall& call) {
  *call.plan = plan;
  if (call.norm_is_double)
    *static_cast<double*>(call.norm) = plan.norm;
  else
    *static_cast<float*>(call.norm) = static_cast<float>(plan.norm);
}

__device__ void write_plan(const Stats& total, const NormCall& call) {
  const LossScale loss = {call.scale ? *call.scale : 1.0,
                          call.found_inf && *call.found_inf != 0.0f};
  write_plan(
      unscaled_plan(sum_of(total, call.spec), call.spec, call.max_norm, call.nonfinite, loss),
      call);
}

__global__ void __launch_bounds__(kThreads)
    merge_slots(const __grid_constant__ SlotBatch<kManyRuns> batch, const Stats* slots, double p,
                const float* scale,  // [] or null
                Stats* per_grad,  // [gradients of this batch]
                TensorStats* stats) {  // [rows]
  const Stats* mine = slots + batch.first_slot[blockIdx.x];
  Stats sum = {};
  for (int i = threadIdx.x; i < batch.slots[blockIdx.x]; i += kThreads)
    sum = merge(sum, mine[i], p);
  const Stats total = block_merge<kThreads>(sum, p);
  if (threadIdx.x == 0) {
    per_grad[blockIdx.x] = total;
    stats[batch.row[blockIdx.x]] = row_of(total, batch.numel[blockIdx.x], scale);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    finish(const Stats* per_grad, int64_t count, const __grid_constant__ NormCall call) {
  Stats sum = {};
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    sum = merge(sum, per_grad[i], call.spec.p);
  const Stats total = block_merge<kThreads>(sum, call.spec.p);
  if (threadIdx.x == 0) write_plan(total, call);
}

// Both at once: kTeam threads merge a gradient's slots.
constexpr int kTeam = 4;
constexpr int kFewGrads = kThreads / kTeam;
constexpr int kFewSlots = 64 * kTeam;

__global__ void __launch_bounds__(kThreads, 1)
    merge_few(const __grid_constant__ SlotBatch<kFewGrads> batch, int count, const Stats* slots,
              const __grid_constant__ NormCall call) {
  const int grad = threadIdx.x / kTeam, member = threadIdx.x % kTeam;
  const double p = call.spec.p;
  Stats sum = {};
  if (grad < count)
    for (int i = member; i < batch.slots[grad]; i += kTeam)
      sum = merge(sum, slots[batch.first_slot[grad] + i], p);
  __shared__ Stats of_member[kThreads];
  of_member[threadIdx.x] = sum;
  __syncthreads();
  if (member == 0) {
    for (int k = 1; k < kTeam; ++k) sum = merge(sum, of_member[threadIdx.x + k], p);
    if (grad < count) call.stats[batch.row[grad]] = row_of(sum, batch.numel[grad], call.scale);
  } else {
    sum = {};
  }
  const Stats total = block_merge<kThreads>(sum, p);
  if (threadIdx.x == 0) write_plan(total, call);
}

__global__ void plan_of_rank_sums(const RankSum* sums, int64_t ranks,
                                  const __grid_constant__ NormCall call) {
  const double scale = call.scale ? *call.scale : 1.0;
  write_plan(plan_of_sums(sums, ranks, call.spec, call.max_norm, call.nonfinite, scale), call);
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

// Elements of a chunk: as many bytes of each type, because a chunk ends with a merge over its
// block.
int64_t chunk_of(DType dtype, int64_t chunk) {
  return chunk * element_bytes(DType::Float) / element_bytes(dtype);
}
int64_t chunk_of(const GradRef& g, int64_t chunk) {
  return is_batched(g) ? chunk_of(g.dtype, chunk) : chunk;
}

// Cuts the gradients into launches: dense(T, batch, blocks) for up to kCapacity dense runs of one
// type, strided(run, blocks, first slot, gradient) for each other gradient. Slots follow launch
// order; `slot_of` receives each gradient's first. `rows` holds their rows. Both may be null.
template <class Dense, class Strided>
void for_each_launch(const std::vector<GradRef>& grads, std::vector<int64_t>* slot_of,
                     const std::vector<int64_t>* rows, Dense dense, Strided strided) {
  const int64_t chunk = chunk_elements(grads);
  DType dtype = DType::Half;
  const auto launch = [&](const ManyDense& batch, unsigned blocks) {
    with_type(dtype, [&](auto type) { dense(type, batch, blocks); });
  };
  Launches<ManyDense, decltype(launch)> launches(launch);
  for (DType each : {DType::Half, DType::BFloat16, DType::Float, DType::Double}) {
    dtype = each;
    launches.batch().chunk = chunk_of(dtype, chunk);
    for (size_t i = 0; i < grads.size(); ++i) {
      const GradRef& g = grads[i];
      if (g.dtype != dtype || !is_batched(g)) continue;
      if (slot_of) (*slot_of)[i] = launches.next_slot();
      if (g.numel == 0) continue;
      const int k = launches.add(divided_up(g.numel, launches.batch().chunk));
      ManyDense& batch = launches.batch();
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
  for (const GradRef& g : grads) slots += divided_up(g.numel, chunk_of(g, chunk));
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
      [&](auto type, const ManyDense& batch, unsigned blocks) {
        using T = typename decltype(type)::type;
        if (spec.kind == NormKind::P)
          dense_stats<T, Sums::Powers><<<blocks, kThreads, 0, stream>>>(batch, spec, slots);
        else if (spec.kind == NormKind::L1)
          dense_stats<T, Sums::Magnitudes><<<blocks, kThreads, 0, stream>>>(batch, spec, slots);
        else if (batch.count <= kFewRuns)
          dense_stats<T, Sums::Squares><<<blocks, kThreads, 0, stream>>>(few(batch), spec, slots);
        else
          dense_stats<T, Sums::Squares><<<blocks, kThreads, 0, stream>>>(batch, spec, slots);
        check_launch("dense_stats");
      },
      [&](const StridedRun& run, unsigned blocks, int64_t slot, size_t) {
        if (spec.kind == NormKind::P)
          strided_stats<Sums::Powers>
              <<<blocks, kThreads, 0, stream>>>(run, chunk, spec, slots + slot);
        else
          strided_stats<Sums::Magnitudes>
              <<<blocks, kThreads, 0, stream>>>(run, chunk, spec, slots + slot);
        check_launch("strided_stats");
      });
  const auto slots_of = [&](int64_t i) {
    return static_cast<int32_t>(divided_up(grads[i].numel, chunk_of(grads[i], chunk)));
  };
  const auto fill = [&](auto& batch, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      batch.first_slot[i] = slot_of[first + i];
      batch.numel[i] = grads[first + i].numel;
      batch.slots[i] = slots_of(first + i);
      batch.row[i] = static_cast<int32_t>(rows[first + i]);
    }
  };
  bool is_few = count <= kFewGrads;
  for (int64_t i = 0; is_few && i < count; ++i) is_few = slots_of(i) <= kFewSlots;
  if (is_few) {
    SlotBatch<kFewGrads> batch;
    fill(batch, 0, count);
    merge_few<<<1, kThreads, 0, stream>>>(batch, static_cast<int>(count), slots, call);
    return check_launch("merge_few");
  }
  for (int64_t first = 0; first < count; first += kManyRuns) {
    const int64_t n = std::min<int64_t>(count - first, kManyRuns);
    SlotBatch<kManyRuns> batch;
    fill(batch, first, n);
    merge_slots<<<grid(n), kThreads, 0, stream>>>(batch, slots, spec.p, call.scale,
                                                  per_grad + first, call.stats);
    check_launch("merge_slots");
  }
  finish<<<1, kThreads, 0, stream>>>(per_grad, count, call);
  check_launch("finish");
}

void plan_of_sums(const RankSum* sums, int64_t ranks, const NormCall& call, Stream stream) {
  plan_of_rank_sums<<<1, 1, 0, stream>>>(sums, ranks, call);
  check_launch("plan_of_rank_sums");
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
