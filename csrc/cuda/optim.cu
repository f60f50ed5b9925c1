// One step of an optimizer, for any number of parameters in a handful of launches.
//
//   ratio_sums      a block per chunk, of update clipping: gradient and exp_avg_sq are read, the
//                   sum of adamw_ratio goes into the chunk's slot
//   merge_ratios    a block per parameter: its slots in order, the factor of its learning rate
//   optim_update    a block per chunk: returns at once if the plan says Skip, else reads and writes
//                   every stream once
//   advance_steps   a thread per parameter: its step counter, after all launches have read it
//
// Assumes element-aligned data; a parameter whose streams all begin at a 16-byte boundary, as
// torch's do, is read and written 16 bytes at a time. Results do not depend on the order of blocks.

#include "../ops/optim.h"

#include <algorithm>

#include "common.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace gradfuse::cuda {
namespace {

GRADFUSE_HD float square_root(float v) { return std::sqrt(v); }
GRADFUSE_HD double square_root(double v) { return std::sqrt(v); }

#include "../math/updates.h"

// Parameters of one group and one triple of types.
struct ParamBatch {
  static constexpr int kCapacity = 320;
  void* param[kCapacity];
  const void* grad[kCapacity];
  void* exp_avg[kCapacity];
  void* exp_avg_sq[kCapacity];
  void* max_exp_avg_sq[kCapacity];
  float* master[kCapacity];
  float* step[kCapacity];
  int64_t numel[kCapacity];
  int32_t first_block[kCapacity];
  int32_t row[kCapacity];
  bool aligned[kCapacity];
  int64_t first_slot;  // of update clipping
  int64_t first_param;  // among the step's parameters
  int64_t chunk;
  int32_t count;
};
static_assert(sizeof(ParamBatch) + sizeof(GroupOptions) <= kMostParameterBytes,
              "a kernel's parameters are limited");

// Values shared by all elements of a parameter.
template <Rule kRule, class W>
struct Prepared {
  std::conditional_t<kRule == Rule::AdamW, AdamWFactors<W>, SgdFactors<W>> rule;
  W first, second, third, bound;  // of the gradient
  Rounding rounding;
};

// `lr_scale` is update clipping's factor of the learning rate.
template <Rule kRule, class W>
__device__ Prepared<kRule, W> prepare(const ParamBatch& batch, int run, const GroupOptions& group,
                                      const GradientUse& use, DType dtype, bool stochastic,
                                      double lr_scale) {
  Prepared<kRule, W> out;
  const double taken = batch.step[run] ? *batch.step[run] : 0.0;
  const double lr = (group.lr_value ? *group.lr_value : group.lr) * lr_scale;
  if constexpr (kRule == Rule::AdamW)
    out.rule = narrowed<W>(adamw_factors(group.adamw, lr, taken + 1.0));
  else
    out.rule = narrowed<W>(sgd_factors(group.sgd, lr, taken == 0.0));
  const ElementFactor f =
      element_factor(use.factor_of_row(batch.row[run]), dtype, use.bound, group.maximize);
  out.first = static_cast<W>(f.first);
  out.second = static_cast<W>(f.second);
  out.third = static_cast<W>(f.third);
  out.bound = static_cast<W>(f.bound);
  out.rounding = rounding_of(stochastic, batch.row[run], taken);
  return out;
}

// clamp(gradient * factor, -bound, bound); NaN stays.
template <class P, class W>
__device__ W gradient(const P& with, W g) {
  g = g * with.first * with.second * with.third;
  g = (g > with.bound) ? with.bound : g;
  return (g < -with.bound) ? -with.bound : g;
}

template <class T, class W>
__device__ T rounded(W v, int64_t element, const Rounding& rounding, uint32_t stream) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const uint32_t bits = __float_as_uint(v);
    if (rounding.stochastic && (bits & 0x7f800000u) != 0x7f800000u) {
      const uint32_t key = rounding.key + static_cast<uint32_t>(element >> 32) + stream;
      const uint32_t noise = hashed(static_cast<uint32_t>(element) ^ key) >> 16;
      return Element<T>::narrow(__uint_as_float((bits + noise) & 0xffff0000u));
    }
  }
  return Element<T>::narrow(static_cast<typename Element<T>::Wide>(v));
}

// kCount consecutive elements of a stream, in the compute type. kWhole: in 16-byte accesses from an
// aligned address.
template <int kCount, bool kWhole, class T, class W>
__device__ void get(const T* p, W (&x)[kCount]) {
  if constexpr (kWhole) {
    constexpr int kPer = kPer16Bytes<T>;
    static_assert(kCount % kPer == 0, "whole words");
#pragma unroll
    for (int w = 0; w < kCount / kPer; ++w) {
      const Word<T> word = load_word(p + w * kPer);
#pragma unroll
      for (int k = 0; k < kPer; ++k) x[w * kPer + k] = Element<T>::widen(word.element[k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = Element<T>::widen(p[k]);
  }
}
template <int kCount, bool kWhole, class T, class W>
__device__ void put(T* p, const W (&x)[kCount], int64_t element, const Rounding& rounding,
                    uint32_t stream) {
  if constexpr (kWhole) {
    constexpr int kPer = kPer16Bytes<T>;
#pragma unroll
    for (int w = 0; w < kCount / kPer; ++w) {
      Word<T> word;
#pragma unroll
      for (int k = 0; k < kPer; ++k)
        word.element[k] = rounded<T>(x[w * kPer + k], element + w * kPer + k, rounding, stream);
      store_word(p + w * kPer, word);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) p[k] = rounded<T>(x[k], element + k, rounding, stream);
  }
}

// The streams of one parameter.
template <class T, class S, class G>
struct Streams {
  T* param;
  const G* grad;
  S* exp_avg;
  S* exp_avg_sq;
  S* max_exp_avg_sq;
  float* master;

  __device__ Streams(const ParamBatch& batch, int run)
      : param(static_cast<T*>(batch.param[run])),
        grad(static_cast<const G*>(batch.grad[run])),
        exp_avg(static_cast<S*>(batch.exp_avg[run])),
        exp_avg_sq(static_cast<S*>(batch.exp_avg_sq[run])),
        max_exp_avg_sq(static_cast<S*>(batch.max_exp_avg_sq[run])),
        master(sizeof(T) == 2 ? batch.master[run] : nullptr) {}
};

// x, a master, becomes the parameter's value where that is not the master's rounding: someone wrote
// the parameter since the last step.
template <class T>
__device__ void yield_to(T param, float& x) {
  const float now = Element<T>::widen(param);
  if (__float_as_uint(Element<T>::widen(Element<T>::narrow(x))) != __float_as_uint(now)) x = now;
}

// The parameter's values: the masters', where the parameter still is their rounding. Holds the
// parameter as it is stored, because registers are scarce.
template <int kCount, bool kWhole, class T>
__device__ void get_from_master(const T* param, const float* master, float (&x)[kCount]) {
  get<kCount, kWhole>(master, x);
  if constexpr (kWhole) {
    constexpr int kPer = kPer16Bytes<T>;
#pragma unroll
    for (int w = 0; w < kCount / kPer; ++w) {
      const Word<T> word = load_word(param + w * kPer);
#pragma unroll
      for (int k = 0; k < kPer; ++k) yield_to(word.element[k], x[w * kPer + k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) yield_to(param[k], x[k]);
  }
}

template <Rule kRule, int kCount, bool kWhole, class T, class S, class G, class W>
__device__ void update(const Streams<T, S, G>& s, int64_t i, const Prepared<kRule, W>& with) {
  W x[kCount], g[kCount], m[kCount], v[kCount], top[kCount];
  bool from_master = false;
  if constexpr (sizeof(T) == 2) {
    from_master = s.master;
    if (from_master) get_from_master<kCount, kWhole>(s.param + i, s.master + i, x);
  }
  if (!from_master) get<kCount, kWhole>(s.param + i, x);
  get<kCount, kWhole>(s.grad + i, g);
  if (s.exp_avg) get<kCount, kWhole>(s.exp_avg + i, m);
  if constexpr (kRule == Rule::AdamW) {
    get<kCount, kWhole>(s.exp_avg_sq + i, v);
    if (s.max_exp_avg_sq) get<kCount, kWhole>(s.max_exp_avg_sq + i, top);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if constexpr (kRule == Rule::AdamW)
      adamw_update(x[k], gradient(with, g[k]), m[k], v[k], s.max_exp_avg_sq ? &top[k] : nullptr,
                   with.rule);
    else
      sgd_update(x[k], gradient(with, g[k]), s.exp_avg ? &m[k] : nullptr, with.rule);
  }
  if constexpr (sizeof(T) == 2)
    if (from_master) put<kCount, kWhole>(s.master + i, x, i, with.rounding, 0);
  put<kCount, kWhole>(s.param + i, x, i, with.rounding, 0);
  if (s.exp_avg) put<kCount, kWhole>(s.exp_avg + i, m, i, with.rounding, 1);
  if constexpr (kRule == Rule::AdamW) {
    put<kCount, kWhole>(s.exp_avg_sq + i, v, i, with.rounding, 2);
    if (s.max_exp_avg_sq) put<kCount, kWhole>(s.max_exp_avg_sq + i, top, i, with.rounding, 3);
  }
}

// Calls many(i) for aligned groups of kCount elements of the chunk, one(i) for the rest.
template <int kCount, class Many, class One>
__device__ void for_each_group(const ParamBatch& batch, const BlockChunk& c, Many many, One one) {
  const int64_t begin = c.start, end = c.start + c.length;
  int64_t whole = begin;
  if (batch.aligned[c.run]) whole = begin + (end - begin) / kCount * kCount;
  for (int64_t i = begin + threadIdx.x * kCount; i < whole; i += kThreads * kCount) many(i);
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) one(i);
}

// As many blocks on a multiprocessor as ptxas finds registers for: more of them would spill.
template <Rule kRule, class T, class S, class G>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    optim_update(const __grid_constant__ ParamBatch batch,
                 const __grid_constant__ GroupOptions group, GradientUse use, DType dtype,
                 bool stochastic,
                 const double* lr_scale) {  // [params], or null
  using W = typename Element<T>::Wide;
  constexpr int kCount = kPer16Bytes<T>;
  if (use.is_refused()) return;
  const BlockChunk chunk = chunk_of_block(batch, block_from_last());
  const int run = chunk.run;
  __shared__ Prepared<kRule, W> with;
  if (threadIdx.x == 0)
    with = prepare<kRule, W>(batch, run, group, use, dtype, stochastic,
                             lr_scale ? lr_scale[batch.first_param + run] : 1.0);
  __syncthreads();
  const Streams<T, S, G> streams(batch, run);
  const Prepared<kRule, W> mine = with;
  for_each_group<kCount>(
      batch, chunk, [&](int64_t i) { update<kRule, kCount, true>(streams, i, mine); },
      [&](int64_t i) { update<kRule, 1, false>(streams, i, mine); });
}

template <class T, class S, class G>
__global__ void __launch_bounds__(kThreads)
    ratio_sums(const __grid_constant__ ParamBatch batch, const __grid_constant__ GroupOptions group,
               GradientUse use, DType dtype,
               double* slots) {  // [all chunks]
  using W = typename Element<T>::Wide;
  constexpr int kCount = kPer16Bytes<T>;
  // A float64 division is a call, around which ptxas spills what two of them at once keep.
  constexpr int kAtOnce = sizeof(W) == 8 ? 1 : kCount;
  if (use.is_refused()) return;
  const BlockChunk chunk = chunk_of_block(batch, blockIdx.x);
  const int run = chunk.run;
  __shared__ Prepared<Rule::AdamW, W> with;
  if (threadIdx.x == 0) with = prepare<Rule::AdamW, W>(batch, run, group, use, dtype, false, 1.0);
  __syncthreads();
  const Streams<T, S, G> s(batch, run);
  const Prepared<Rule::AdamW, W> mine = with;
  double sum = 0.0;
  for_each_group<kCount>(
      batch, chunk,
      [&](int64_t i) {
        W g[kCount], v[kCount], part = 0;
        get<kCount, true>(s.grad + i, g);
        get<kCount, true>(s.exp_avg_sq + i, v);
#pragma unroll kAtOnce
        for (int k = 0; k < kCount; ++k) part += adamw_ratio(gradient(mine, g[k]), v[k], mine.rule);
        sum += part;
      },
      [&](int64_t i) {
        W g[1], v[1];
        get<1, false>(s.grad + i, g);
        get<1, false>(s.exp_avg_sq + i, v);
        sum += adamw_ratio(gradient(mine, g[0]), v[0], mine.rule);
      });
  const double total = block_reduce<kThreads>(sum, Plus());
  if (threadIdx.x == 0) slots[batch.first_slot + blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    merge_ratios(const __grid_constant__ ParamBatch batch, GradientUse use,
                 const double* slots,  // [all chunks]
                 double* lr_scale) {  // [params]
  if (use.is_refused()) return;
  const int64_t numel = batch.numel[blockIdx.x];
  const int64_t count = divided_up(numel, batch.chunk);
  const double* mine = slots + batch.first_slot + batch.first_block[blockIdx.x];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += mine[i];
  const double total = block_reduce<kThreads>(sum, Plus());
  if (threadIdx.x == 0)
    lr_scale[batch.first_param + blockIdx.x] =
        update_clip_factor(total / static_cast<double>(numel));
}

struct StepBatch {
  static constexpr int kCapacity = kThreads;
  float* step[kCapacity];
};

__global__ void __launch_bounds__(kThreads)
    advance_steps(const __grid_constant__ StepBatch batch, int count, GradientUse use) {
  if (use.is_refused() || threadIdx.x >= count) return;
  *batch.step[threadIdx.x] += 1.0f;
}

bool is_aligned(const ParamRef& p) {
  const void* streams[] = {p.param, p.grad, p.exp_avg, p.exp_avg_sq, p.max_exp_avg_sq, p.master};
  return std::all_of(std::begin(streams), std::end(streams),
                     [](const void* s) { return reinterpret_cast<uintptr_t>(s) % 16 == 0; });
}

// Whether two parameters go into one batch.
bool go_together(const ParamRef& a, const ParamRef& b) {
  return a.dtype == b.dtype && a.state_dtype == b.state_dtype && a.grad_dtype == b.grad_dtype &&
         a.group == b.group;
}

// Calls launch(batch, like, blocks) for the parameters of each group and triple of types, up to
// kCapacity at a time; `like` is one of them. Empty parameters take a place but no block.
template <class Launch>
void for_each_batch(const OptimStep& step, Launch launch) {
  const int64_t chunk = chunk_elements(step.params);
  const auto launch_like = [&](const ParamBatch& batch, unsigned blocks) {
    launch(batch, step.params[batch.first_param], blocks);
  };
  Launches<ParamBatch, decltype(launch_like)> launches(launch_like);
  launches.batch().chunk = chunk;
  for (size_t i = 0; i < step.params.size(); ++i) {
    const ParamRef& p = step.params[i];
    if (i > 0 && !go_together(step.params[i - 1], p)) launches.flush();
    const int k = launches.add(divided_up(p.numel, chunk));
    ParamBatch& batch = launches.batch();
    if (k == 0) batch.first_param = static_cast<int64_t>(i);
    batch.param[k] = p.param;
    batch.grad[k] = p.grad;
    batch.exp_avg[k] = p.exp_avg;
    batch.exp_avg_sq[k] = p.exp_avg_sq;
    batch.max_exp_avg_sq[k] = p.max_exp_avg_sq;
    batch.master[k] = p.master;
    batch.step[k] = p.step;
    batch.numel[k] = p.numel;
    batch.row[k] = p.row;
    batch.aligned[k] = is_aligned(p);
  }
  launches.flush();
}

}  // namespace

int64_t optim_scratch_bytes(const OptimStep& step) {
  if (!step.update_clip) return 0;
  const int64_t chunk = chunk_elements(step.params);
  int64_t slots = static_cast<int64_t>(step.params.size());
  for (const ParamRef& p : step.params) slots += divided_up(p.numel, chunk);
  return slots * static_cast<int64_t>(sizeof(double));
}

void optim_step(const OptimStep& step, void* scratch, Stream stream) {
  // Scratch, of update clipping: a factor for each parameter, then the chunks' slots.
  double* const lr_scale = step.update_clip ? static_cast<double*>(scratch) : nullptr;
  double* const slots = step.update_clip ? lr_scale + step.params.size() : nullptr;
  for_each_batch(step, [&](const ParamBatch& batch, const ParamRef& like, unsigned blocks) {
    const GroupOptions& group = step.groups[like.group];
    const auto launch = [&](auto type, auto state, auto grad) {
      using T = typename decltype(type)::type;
      using S = typename decltype(state)::type;
      using G = typename decltype(grad)::type;
      if (step.rule == Rule::Sgd) {
        optim_update<Rule::Sgd, T, S, G><<<blocks, kThreads, 0, stream>>>(
            batch, group, step.use, like.dtype, step.stochastic_rounding, nullptr);
        return check_launch("optim_update");
      }
      if (step.update_clip) {
        ratio_sums<T, S, G>
            <<<blocks, kThreads, 0, stream>>>(batch, group, step.use, like.dtype, slots);
        check_launch("ratio_sums");
        merge_ratios<<<grid(batch.count), kThreads, 0, stream>>>(batch, step.use, slots, lr_scale);
        check_launch("merge_ratios");
      }
      optim_update<Rule::AdamW, T, S, G><<<blocks, kThreads, 0, stream>>>(
          batch, group, step.use, like.dtype, step.stochastic_rounding, lr_scale);
      check_launch("optim_update");
    };
    if (blocks)
      with_types<__half, __nv_bfloat16>(like.dtype, like.state_dtype, like.grad_dtype, launch);
  });
  StepBatch steps;
  int count = 0;
  const auto advance = [&] {
    if (count == 0) return;
    advance_steps<<<1, kThreads, 0, stream>>>(steps, count, step.use);
    check_launch("advance_steps");
    count = 0;
  };
  for (const ParamRef& p : step.params) {
    if (!p.step) continue;
    if (count == StepBatch::kCapacity) advance();
    steps.step[count++] = p.step;
  }
  advance();
}

}  // namespace gradfuse::cuda
