// Norms of gradients, and plans from them.
//
//   dense_stats     a block per chunk: one read, a Stats into the chunk's slot
//   dense_exact     the same, and adds the chunk's squares to the words of an exact sum
//   merge_slots     a block per gradient: its slots in order, its table row
//   finish          one block: all gradients in order, the plan, the norm
//   merge_few       one block, instead of these two, for few short gradients
//
// Assumes element-aligned data; reads 16 bytes at a time from the first 16-byte boundary on.
// Results do not depend on the order of the blocks.

#include <algorithm>

#include "../ops/clip.h"
#include "gradient_launches.cuh"
#include "limbs.cuh"
#include "stats.cuh"

namespace gradfuse::cuda {
namespace {

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

// The same, and adds the chunk's squares to the words of an exact sum.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    dense_exact(const __grid_constant__ ManyDense batch, NormSpec spec,
                Stats* slots,  // [all chunks]
                int64_t* words) {
  using Limbs = BlockLimbs<kWide>;
  __shared__ typename Limbs::Storage storage;
  Limbs limbs(storage);
  const BlockChunk c = chunk_of_block(batch, blockIdx.x);
  const T* x = static_cast<const T*>(batch.data[c.run]) + c.start;
  const Stats mine = thread_stats<T, kThreads, 1, Sums::Squares>(
      x, c.length, spec, [&](typename Limbs::Element value) { limbs.add_square(value); });
  const Stats total = block_merge<kThreads>(mine, spec.p);
  if (threadIdx.x == 0) slots[batch.first_slot + blockIdx.x] = total;
  limbs.add_to(words);
}

// The square of a complex element's modulus is the sum of those of its parts.
template <bool kWide>
__global__ void __launch_bounds__(kThreads)
    strided_exact(const __grid_constant__ StridedRun run, int64_t chunk, NormSpec spec,
                  Stats* slots,  // [chunks of this run]
                  int64_t* words) {
  using Limbs = BlockLimbs<kWide>;
  __shared__ typename Limbs::Storage storage;
  Limbs limbs(storage);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * chunk;
  const int64_t end = start + chunk < run.numel ? start + chunk : run.numel;
  const Stats mine = strided_thread_stats<kThreads, Sums::Magnitudes>(
      run, 0, start, end, spec,
      [&](double part) { limbs.add_square(static_cast<typename Limbs::Element>(part)); });
  const Stats total = block_merge<kThreads>(mine, spec.p);
  if (threadIdx.x == 0) slots[blockIdx.x] = total;
  limbs.add_to(words);
}

__global__ void __launch_bounds__(kMostWords + 19) clear_words(int64_t* words, int32_t count) {
  if (threadIdx.x < count) words[threadIdx.x] = 0;
}

__global__ void carry_words(int64_t* words, LimbForm form) { carry(words, form); }

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

__device__ LossScale loss_of(const NormCall& call) {
  return {call.scale ? *call.scale : 1.0, call.found_inf && *call.found_inf != 0.0f};
}

__device__ void write_plan(const Stats& total, const NormCall& call) {
  write_plan(unscaled_plan(sum_of(total, call.spec), call.spec, call.max_norm, call.nonfinite,
                           loss_of(call)),
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

__global__ void plan_of_words(const int64_t* words, LimbForm form,
                              const __grid_constant__ NormCall call) {
  int64_t carried[kMostWords];
  for (int32_t i = 0; i < form.words(); ++i) carried[i] = words[i];
  carry(carried, form);
  const LossScale loss = loss_of(call);
  const ClipPlan plan = plan_of_limbs(carried, form, call.max_norm, call.nonfinite, loss);
  write_plan(plan, call);
  if (!call.norm_is_double)
    *static_cast<float*>(call.norm) = float_norm(carried, form, plan, loss.value);
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

// Calls dense(T, batch, blocks, slots) and strided(run, blocks, chunk, slots) for all chunks, and
// merges what they write.
template <class Dense, class Strided>
void measure(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows,
             const NormCall& call, void* scratch, Stream stream, Dense dense, Strided strided) {
  const int64_t chunk = chunk_elements(grads);
  const int64_t count = static_cast<int64_t>(grads.size());
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
        dense(type, batch, blocks, slots);
      },
      [&](const StridedRun& run, unsigned blocks, int64_t slot, size_t) {
        strided(run, blocks, chunk, slots + slot);
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
    merge_slots<<<grid(n), kThreads, 0, stream>>>(batch, slots, call.spec.p, call.scale,
                                                  per_grad + first, call.stats);
    check_launch("merge_slots");
  }
  finish<<<1, kThreads, 0, stream>>>(per_grad, count, call);
  check_launch("finish");
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
  const NormSpec spec = call.spec;
  measure(
      grads, rows, call, scratch, stream,
      [&](auto type, const ManyDense& batch, unsigned blocks, Stats* slots) {
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
      [&](const StridedRun& run, unsigned blocks, int64_t chunk, Stats* slots) {
        if (spec.kind == NormKind::P)
          strided_stats<Sums::Powers><<<blocks, kThreads, 0, stream>>>(run, chunk, spec, slots);
        else
          strided_stats<Sums::Magnitudes><<<blocks, kThreads, 0, stream>>>(run, chunk, spec, slots);
        check_launch("strided_stats");
      });
}

void exact_limbs(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows, LimbForm form,
                 int64_t* words, const NormCall& call, void* scratch, Stream stream) {
  const NormSpec spec = call.spec;
  const bool is_wide = form.limbs == kWideLimbs.limbs;
  clear_words<<<1, kMostWords + 19, 0, stream>>>(words, form.words());
  check_launch("clear_words");
  measure(
      grads, rows, call, scratch, stream,
      [&](auto type, const ManyDense& batch, unsigned blocks, Stats* slots) {
        using T = typename decltype(type)::type;
        if (is_wide)
          dense_exact<T, true><<<blocks, kThreads, 0, stream>>>(batch, spec, slots, words);
        else if constexpr (!std::is_same_v<T, double>)
          dense_exact<T, false><<<blocks, kThreads, 0, stream>>>(batch, spec, slots, words);
        check_launch("dense_exact");
      },
      [&](const StridedRun& run, unsigned blocks, int64_t chunk, Stats* slots) {
        const auto sweep = is_wide ? strided_exact<true> : strided_exact<false>;
        sweep<<<blocks, kThreads, 0, stream>>>(run, chunk, spec, slots, words);
        check_launch("strided_exact");
      });
  carry_words<<<1, 1, 0, stream>>>(words, form);
  check_launch("carry_words");
}

void exact_plan(const int64_t* words, LimbForm form, const NormCall& call, Stream stream) {
  plan_of_words<<<1, 1, 0, stream>>>(words, form, call);
  check_launch("plan_of_words");
}

void plan_of_sums(const RankSum* sums, int64_t ranks, const NormCall& call, Stream stream) {
  plan_of_rank_sums<<<1, 1, 0, stream>>>(sums, ranks, call);
  check_launch("plan_of_rank_sums");
}

void plan(const double* norm, double max_norm, ClipPlan* plan, Stream stream) {
  plan_of_norm<<<1, 1, 0, stream>>>(norm, max_norm, plan);
  check_launch("plan_of_norm");
}

}  // namespace gradfuse::cuda
