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

#include <algorithm>

#include "stats.cuh"

namespace gradfuse::cuda {
namespace {

template <class T, bool kPower>
__global__ void __launch_bounds__(kThreads)
    dense_stats(const __grid_constant__ DenseBatch batch, NormSpec spec,
                Stats* slots) {  // [all chunks]
  constexpr int kUnroll = kPower ? 1 : 4;  // powers take many registers
  const int run = find_run(batch.first_block, batch.count, blockIdx.x);
  const int64_t start = (blockIdx.x - batch.first_block[run]) * batch.chunk;
  const int64_t rest = batch.numel[run] - start;
  const T* x = static_cast<const T*>(batch.data[run]) + start;
  const Stats mine =
      thread_stats<T, kThreads, kUnroll, kPower>(x, rest < batch.chunk ? rest : batch.chunk, spec);
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
static_assert(sizeof(SlotBatch) <= 32000, "kernel parameters end at 32,764 bytes");

__global__ void __launch_bounds__(kThreads)
    merge_slots(const __grid_constant__ SlotBatch batch, const Stats* slots, double p,
                const float* scale,  // [] or null
                Stats* per_grad,  // [gradients of this batch]
                double* table) {  // [rows, kTableColumns]
  const int64_t numel = batch.numel[blockIdx.x];
  const int64_t count = (numel + batch.chunk - 1) / batch.chunk;
  const Stats* mine = slots + batch.first_slot[blockIdx.x];
  Stats sum = {};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum = merge(sum, mine[i], p);
  const Stats total = block_merge<kThreads>(sum, p);
  if (threadIdx.x == 0) {
    per_grad[blockIdx.x] = total;
    double* row = table + batch.row[blockIdx.x] * kTableColumns;
    write_table_row(total, static_cast<double>(numel), row);
    if (scale) unscale_table_row(row, *scale);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    finish(const Stats* per_grad, int64_t count, NormSpec spec, double max_norm, NonFinite policy,
           double* totals, void* norm, bool norm_is_double, const float* scale,
           const float* found_inf) {
  Stats sum = {};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum = merge(sum, per_grad[i], spec.p);
  const Stats total = block_merge<kThreads>(sum, spec.p);
  if (threadIdx.x != 0) return;
  const LossScale loss = {scale ? *scale : 1.0, found_inf && *found_inf != 0.0f};
  const ClipPlan plan = unscaled_plan(norm_of(sum_of(total, spec), spec), max_norm, policy, loss);
  write_totals(plan, sum_of(total, spec), totals);
  if (norm_is_double)
    *static_cast<double*>(norm) = plan.norm;
  else
    *static_cast<float*>(norm) = static_cast<float>(plan.norm);
}

__global__ void plan_of_norm(const double* norm, double max_norm, double* totals) {
  write_totals(clip_plan({*norm, 0}, max_norm, NonFinite::Propagate), {*norm, 0}, totals);
}

// Rows are marked absent first; those of gradients are written later.
__global__ void __launch_bounds__(kThreads) mark_absent(double* table, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < rows) write_table_row(Stats{}, -1.0, table + row * kTableColumns);
}

__device__ Action action_of(const double* totals) {
  return static_cast<Action>(static_cast<int32_t>(totals[3]));
}

// `own` is a gradient's coefficient on top of the totals' factor, or null.
__device__ Factor factor_in(const double* totals, const double* own) {
  return factor_of({totals[6] * (own ? *own : 1.0), totals[7]});
}

// Whether gradients stay as they are.
__device__ bool keeps(const double* totals, const double* coefficients) {
  const Action action = action_of(totals);
  if (action == Action::Keep) return !coefficients && totals[6] == 1.0;
  return action == Action::Refuse || action == Action::Skip;
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
    dense_apply(const __grid_constant__ DenseBatch batch, const double* totals,
                const double* coefficients) {  // [rows] or null
  if (keeps(totals, coefficients)) return;
  const int run = find_run(batch.first_block, batch.count, blockIdx.x);
  const int64_t start = (blockIdx.x - batch.first_block[run]) * batch.chunk;
  const int64_t rest = batch.numel[run] - start;
  const int64_t n = rest < batch.chunk ? rest : batch.chunk;
  T* x = static_cast<T*>(batch.data[run]) + start;
  if (action_of(totals) == Action::Zero) return zero_run(x, n);
  const double* own = coefficients ? coefficients + batch.row[run] : nullptr;
  const Factor factor = factor_in(totals, own);
  if (factor.whole != 1.0) scale_run<T, kThreads>(x, n, factor);
}

__global__ void __launch_bounds__(kThreads)
    strided_apply(const __grid_constant__ StridedRun run, int64_t chunk, const double* totals,
                  const double* own) {  // [] or null
  if (keeps(totals, own)) return;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * chunk;
  const int64_t end = start + chunk < run.numel ? start + chunk : run.numel;
  if (action_of(totals) != Action::Zero)
    return scale_strided<kThreads>(run, 0, start, end, factor_in(totals, own));
  const int parts = run.is_complex ? 2 : 1;
  for (int64_t i = start + threadIdx.x; i < end; i += kThreads)
    for (int k = 0; k < parts; ++k)
      with_type(run.dtype, [&](auto type) {
        using T = decltype(type);
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
  const int run = find_run(batch.first_block, batch.count, blockIdx.x);
  const int64_t start = (blockIdx.x - batch.first_block[run]) * batch.chunk;
  const int64_t rest = batch.numel[run] - start;
  T* x = static_cast<T*>(batch.data[run]) + start;
  auto update = [=](int64_t i, Word<T> w) {
    bool changed = false;
#pragma unroll
    for (int k = 0; k < kPer; ++k) changed |= clamp_element(w.element[k], bound);
    if (changed) store_word(x + i, w);
  };
  visit_run<T, kThreads, kUnroll>(
      x, rest < batch.chunk ? rest : batch.chunk,
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
      using T = decltype(type);
      T* x = static_cast<T*>(run.data) + strided_offset(run, i);
      T value = *x;
      if (clamp_element(value, rounded_bound<T>(wide_bound))) *x = value;
    });
}

int64_t chunks_of(const GradRef& g, int64_t chunk) { return (g.numel + chunk - 1) / chunk; }

// Blocks of a launch. The grid's limit is 2^31 - 1, which 16,384 chunks and 1,024 runs stay below.
unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }

// Cuts the gradients into launches: plain(T, batch, blocks) for up to kCapacity dense runs of one
// type, strided(run, blocks, first slot, gradient) for each other one. Slots follow launch order;
// `slot_of`, if given, receives each gradient's first; `rows`, if given, says the batches' rows.
template <class Plain, class Strided>
void for_each_launch(const std::vector<GradRef>& grads, std::vector<int64_t>* slot_of,
                     const std::vector<int64_t>* rows, Plain plain, Strided strided) {
  const int64_t chunk = chunk_elements(grads);
  int64_t slot = 0;
  for (DType dtype : {DType::Half, DType::BFloat16, DType::Float, DType::Double}) {
    DenseBatch batch;
    batch.count = 0;
    batch.chunk = chunk;
    int64_t blocks = 0;
    auto flush = [&] {
      if (batch.count) with_type(dtype, [&](auto type) { plain(type, batch, grid(blocks)); });
      slot += blocks;
      blocks = batch.count = 0;
    };
    for (size_t i = 0; i < grads.size(); ++i) {
      const GradRef& g = grads[i];
      if (g.dtype != dtype || !is_plain(g)) continue;
      if (batch.count == DenseBatch::kCapacity) flush();
      if (slot_of) (*slot_of)[i] = slot + blocks;
      if (g.numel == 0) continue;
      batch.first_slot = slot;
      batch.data[batch.count] = g.data;
      batch.row[batch.count] = rows ? static_cast<int32_t>((*rows)[i]) : 0;
      batch.numel[batch.count] = g.numel;
      batch.first_block[batch.count++] = blocks;
      blocks += chunks_of(g, chunk);
    }
    flush();
  }
  for (size_t i = 0; i < grads.size(); ++i) {
    const GradRef& g = grads[i];
    if (is_plain(g)) continue;
    if (slot_of) (*slot_of)[i] = slot;
    if (g.numel == 0) continue;
    const int64_t blocks = chunks_of(g, chunk);
    strided(strided_run(g), grid(blocks), slot, i);
    slot += blocks;
  }
}

}  // namespace

int64_t stats_scratch_bytes(const std::vector<GradRef>& grads) {
  const int64_t chunk = chunk_elements(grads);
  int64_t slots = static_cast<int64_t>(grads.size());
  for (const GradRef& g : grads) slots += chunks_of(g, chunk);
  return slots * static_cast<int64_t>(sizeof(Stats));
}

void stats(const std::vector<GradRef>& grads, const std::vector<int64_t>& rows, int64_t table_rows,
           NormSpec spec, double max_norm, NonFinite policy, void* scratch, double* table,
           double* totals, void* norm, bool norm_is_double, const float* scale,
           const float* found_inf, cudaStream_t stream) {
  const int64_t chunk = chunk_elements(grads);
  const int64_t count = static_cast<int64_t>(grads.size());
  Stats* const per_grad = static_cast<Stats*>(scratch);
  Stats* const slots = per_grad + count;

  if (table_rows != count) {
    mark_absent<<<grid((table_rows + kThreads - 1) / kThreads), kThreads, 0, stream>>>(table,
                                                                                       table_rows);
    check_launch("mark_absent");
  }
  std::vector<int64_t> slot_of(grads.size());
  for_each_launch(
      grads, &slot_of, nullptr,
      [&](auto type, const DenseBatch& batch, unsigned blocks) {
        using T = decltype(type);
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
    merge_slots<<<grid(n), kThreads, 0, stream>>>(batch, slots, spec.p, scale, per_grad + first,
                                                  table);
    check_launch("merge_slots");
  }
  finish<<<1, kThreads, 0, stream>>>(per_grad, count, spec, max_norm, policy, totals, norm,
                                     norm_is_double, scale, found_inf);
  check_launch("finish");
}

void plan(const double* norm, double max_norm, double* totals, cudaStream_t stream) {
  plan_of_norm<<<1, 1, 0, stream>>>(norm, max_norm, totals);
  check_launch("plan_of_norm");
}

void apply(const std::vector<GradRef>& grads, const double* totals, const double* coefficients,
           const std::vector<int64_t>& rows, cudaStream_t stream) {
  const int64_t chunk = chunk_elements(grads);
  for_each_launch(
      grads, nullptr, &rows,
      [&](auto type, const DenseBatch& batch, unsigned blocks) {
        dense_apply<decltype(type)><<<blocks, kThreads, 0, stream>>>(batch, totals, coefficients);
        check_launch("dense_apply");
      },
      [&](const StridedRun& run, unsigned blocks, int64_t, size_t i) {
        const double* own = coefficients ? coefficients + rows[i] : nullptr;
        strided_apply<<<blocks, kThreads, 0, stream>>>(run, chunk, totals, own);
        check_launch("strided_apply");
      });
}

void clamp(const std::vector<GradRef>& grads, double bound, cudaStream_t stream) {
  const int64_t chunk = chunk_elements(grads);
  for_each_launch(
      grads, nullptr, nullptr,
      [&](auto type, const DenseBatch& batch, unsigned blocks) {
        dense_clamp<decltype(type)><<<blocks, kThreads, 0, stream>>>(batch, bound);
        check_launch("dense_clamp");
      },
      [&](const StridedRun& run, unsigned blocks, int64_t, size_t) {
        strided_clamp<<<blocks, kThreads, 0, stream>>>(run, chunk, bound);
        check_launch("strided_clamp");
      });
}

}  // namespace gradfuse::cuda
