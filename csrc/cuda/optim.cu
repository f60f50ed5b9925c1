// One step of an optimizer, for any number of parameters in a handful of launches.
//
//   ratio_sums      a block per chunk, of update clipping: gradient and exp_avg_sq are read, the
//                   sum of adamw_ratio goes into the chunk's slot
//   lamb_sums       the same for LAMB: all streams are read, the sums of squares of the parameter
//                   and of its update go into two slots
//   merge_sums      a block per parameter: its slots in order, the factor of its learning rate
//   optim_update    a block per chunk: returns at once if the plan says Skip, else reads and writes
//                   every stream once
//   advance_means   a thread per parameter: the mean of a schedule-free one, after optim_update
//   advance_steps   a thread per parameter: its step counter, after all launches have read it
//
// Assumes element-aligned data; a parameter whose streams all begin at a 16-byte boundary, as
// torch's do, is read and written 16 bytes at a time. Results do not depend on the order of blocks.

#include "../ops/optim.h"

#include <algorithm>
#include <type_traits>

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
  double* weight_sum[kCapacity];
  double* lr_max[kCapacity];
  int64_t numel[kCapacity];
  int32_t first_block[kCapacity];
  int32_t row[kCapacity];
  bool aligned[kCapacity];
  int64_t first_slot;  // of an LrScale
  int64_t first_param;  // among the step's parameters
  int64_t chunk;
  int32_t count;
};
static_assert(sizeof(ParamBatch) + sizeof(GroupOptions) <= kMostParameterBytes,
              "a kernel's parameters are limited");

// What the updates of all parameters have in common.
struct StepFlags {
  bool stochastic_rounding, eps_follows_clip, atan2;
  double smallest;  // normal number of the moments' type
};

// Values shared by all elements of a parameter.
template <Rule kRule, class W>
struct FactorsOf {
  using Type = AdamWFactors<W>;
};
template <class W>
struct FactorsOf<Rule::Sgd, W> {
  using Type = SgdFactors<W>;
};
template <class W>
struct FactorsOf<Rule::Lion, W> {
  using Type = LionFactors<W>;
};
template <class W>
struct FactorsOf<Rule::ScheduleFree, W> {
  using Type = ScheduleFreeFactors<W>;
};
template <Rule kRule, class W>
struct Prepared {
  typename FactorsOf<kRule, W>::Type rule;
  W first, second, third, bound;  // of the gradient
  Rounding rounding;
};

__device__ double taken_by(const ParamBatch& batch, int run) {
  return batch.step[run] ? *batch.step[run] : 0.0;
}
__device__ double lr_of(const GroupOptions& group) {
  return group.lr_value ? *group.lr_value : group.lr;
}
__device__ ScheduleFreeStep schedule_free_of(const ParamBatch& batch, int run,
                                             const GroupOptions& group, double eps) {
  ScheduleFreeOptions options = group.schedule_free;
  options.eps = eps;
  return schedule_free_step(options, lr_of(group), taken_by(batch, run) + 1.0,
                            {*batch.weight_sum[run], *batch.lr_max[run]});
}

// `lr_scale` multiplies the learning rate.
template <Rule kRule, class W>
__device__ Prepared<kRule, W> prepare(const ParamBatch& batch, int run, const GroupOptions& group,
                                      const GradientUse& use, DType dtype, StepFlags flags,
                                      double lr_scale) {
  Prepared<kRule, W> out;
  const double taken = taken_by(batch, run);
  const double lr = lr_of(group) * lr_scale;
  const int32_t row = batch.row[run];
  const auto eps = [&](const auto& options) {
    if (!flags.eps_follows_clip) return options.eps;
    return followed_eps(options.eps, options.beta2, use.coefficient_of_row(row), flags.smallest);
  };
  if constexpr (kRule == Rule::AdamW) {
    AdamWOptions options = group.adamw;
    options.eps = eps(options);
    out.rule = narrowed<W>(adamw_factors(options, lr, taken + 1.0, flags.atan2));
  } else if constexpr (kRule == Rule::Sgd) {
    out.rule = narrowed<W>(sgd_factors(group.sgd, lr, taken == 0.0));
  } else if constexpr (kRule == Rule::Lion) {
    out.rule = narrowed<W>(lion_factors(group.lion, lr));
  } else {
    out.rule = narrowed<W>(schedule_free_of(batch, run, group, eps(group.schedule_free)).factors);
  }
  const ElementFactor f = element_factor(use.factor_of_row(row), dtype, use.bound, group.maximize);
  out.first = static_cast<W>(f.first);
  out.second = static_cast<W>(f.second);
  out.third = static_cast<W>(f.third);
  out.bound = static_cast<W>(f.bound);
  out.rounding = rounding_of(flags.stochastic_rounding, row, taken);
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

// The parameter's values, from its master where it has one. Returns whether it has.
template <int kCount, bool kWhole, class T, class S, class G, class W>
__device__ bool get_param(const Streams<T, S, G>& s, int64_t i, W (&x)[kCount]) {
  if constexpr (sizeof(T) == 2) {
    if (s.master) {
      get_from_master<kCount, kWhole>(s.param + i, s.master + i, x);
      return true;
    }
  }
  get<kCount, kWhole>(s.param + i, x);
  return false;
}

template <Rule kRule, int kCount, bool kWhole, class T, class S, class G, class W>
__device__ void update(const Streams<T, S, G>& s, int64_t i, const Prepared<kRule, W>& with) {
  W x[kCount], g[kCount], m[kCount], v[kCount], top[kCount];
  const bool from_master = get_param<kCount, kWhole>(s, i, x);
  get<kCount, kWhole>(s.grad + i, g);
  if (s.exp_avg) get<kCount, kWhole>(s.exp_avg + i, m);
  if constexpr (kRule == Rule::AdamW || kRule == Rule::ScheduleFree)
    get<kCount, kWhole>(s.exp_avg_sq + i, v);
  if constexpr (kRule == Rule::AdamW)
    if (s.max_exp_avg_sq) get<kCount, kWhole>(s.max_exp_avg_sq + i, top);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const W now = gradient(with, g[k]);
    if constexpr (kRule == Rule::AdamW)
      adamw_update(x[k], now, m[k], v[k], s.max_exp_avg_sq ? &top[k] : nullptr, with.rule);
    else if constexpr (kRule == Rule::Sgd)
      sgd_update(x[k], now, s.exp_avg ? &m[k] : nullptr, with.rule);
    else if constexpr (kRule == Rule::Lion)
      lion_update(x[k], now, m[k], with.rule);
    else
      schedule_free_update(x[k], now, m[k], v[k], with.rule);
  }
  if constexpr (sizeof(T) == 2)
    if (from_master) put<kCount, kWhole>(s.master + i, x, i, with.rounding, 0);
  put<kCount, kWhole>(s.param + i, x, i, with.rounding, 0);
  if (s.exp_avg) put<kCount, kWhole>(s.exp_avg + i, m, i, with.rounding, 1);
  if constexpr (kRule == Rule::AdamW || kRule == Rule::ScheduleFree)
    put<kCount, kWhole>(s.exp_avg_sq + i, v, i, with.rounding, 2);
  if constexpr (kRule == Rule::AdamW)
    if (s.max_exp_avg_sq) put<kCount, kWhole>(s.max_exp_avg_sq + i, top, i, with.rounding, 3);
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
                 StepFlags flags,
                 const double* lr_scale) {  // [rows], or null
  using W = typename Element<T>::Wide;
  constexpr int kCount = kPer16Bytes<T>;
  if (use.is_refused()) return;
  const BlockChunk chunk = chunk_of_block(batch, block_from_last());
  const int run = chunk.run;
  __shared__ Prepared<kRule, W> with;
  if (threadIdx.x == 0)
    with = prepare<kRule, W>(batch, run, group, use, dtype, flags,
                             lr_scale ? lr_scale[batch.row[run]] : 1.0);
  __syncthreads();
  const Streams<T, S, G> streams(batch, run);
  const Prepared<kRule, W> mine = with;
  for_each_group<kCount>(
      batch, chunk, [&](int64_t i) { update<kRule, kCount, true>(streams, i, mine); },
      [&](int64_t i) { update<kRule, 1, false>(streams, i, mine); });
}

// Elements that a thread sums at once. A float64 division is a call, around which ptxas spills what
// two of them keep.
template <class T>
constexpr int kSummed = sizeof(T) == 8 ? 1 : kPer16Bytes<T>;

template <int kCount, bool kWhole, class T, class S, class G, class W>
__device__ void add_ratios(const Streams<T, S, G>& s, int64_t i,
                           const Prepared<Rule::AdamW, W>& with, double& sum) {
  W g[kCount], v[kCount], part = 0;
  get<kCount, kWhole>(s.grad + i, g);
  get<kCount, kWhole>(s.exp_avg_sq + i, v);
#pragma unroll
  for (int k = 0; k < kCount; ++k) part += adamw_ratio(gradient(with, g[k]), v[k], with.rule);
  sum += part;
}

template <class T, class S, class G>
__global__ void __launch_bounds__(kThreads)
    ratio_sums(const __grid_constant__ ParamBatch batch, const __grid_constant__ GroupOptions group,
               GradientUse use, DType dtype, StepFlags flags,
               double* slots) {  // [all chunks]
  using W = typename Element<T>::Wide;
  constexpr int kCount = kSummed<T>;
  if (use.is_refused()) return;
  const BlockChunk chunk = chunk_of_block(batch, blockIdx.x);
  const int run = chunk.run;
  __shared__ Prepared<Rule::AdamW, W> with;
  if (threadIdx.x == 0) with = prepare<Rule::AdamW, W>(batch, run, group, use, dtype, flags, 1.0);
  __syncthreads();
  const Streams<T, S, G> s(batch, run);
  const Prepared<Rule::AdamW, W>& mine = with;  // in registers it would spill around calls
  double sum = 0.0;
  for_each_group<kCount>(
      batch, chunk, [&](int64_t i) { add_ratios<kCount, (kCount > 1)>(s, i, mine, sum); },
      [&](int64_t i) { add_ratios<1, false>(s, i, mine, sum); });
  const double total = block_reduce<kThreads>(sum, Plus());
  if (threadIdx.x == 0) slots[batch.first_slot + blockIdx.x] = total;
}

// The sums of squares of kCount elements and of their updates. In float64: the squares of float32
// numbers may be beyond float32.
struct Squares {
  double param, update;
};
__device__ Squares operator+(Squares a, Squares b) {
  return {a.param + b.param, a.update + b.update};
}

template <int kCount, bool kWhole, class T, class S, class G, class W>
__device__ void add_squares(const Streams<T, S, G>& s, int64_t i,
                            const Prepared<Rule::AdamW, W>& with, W weight_decay, Squares& sum) {
  W x[kCount], g[kCount], m[kCount], v[kCount];
  get_param<kCount, kWhole>(s, i, x);
  get<kCount, kWhole>(s.grad + i, g);
  get<kCount, kWhole>(s.exp_avg + i, m);
  get<kCount, kWhole>(s.exp_avg_sq + i, v);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const double update =
        lamb_direction(x[k], gradient(with, g[k]), m[k], v[k], weight_decay, with.rule);
    const double param = x[k];
    sum.param += param * param;
    sum.update += update * update;
  }
}

template <class T, class S, class G>
__global__ void __launch_bounds__(kThreads)
    lamb_sums(const __grid_constant__ ParamBatch batch, const __grid_constant__ GroupOptions group,
              GradientUse use, DType dtype, StepFlags flags,
              Squares* slots) {  // [all chunks]
  using W = typename Element<T>::Wide;
  constexpr int kCount = kSummed<T>;
  if (use.is_refused()) return;
  const BlockChunk chunk = chunk_of_block(batch, blockIdx.x);
  const int run = chunk.run;
  __shared__ Prepared<Rule::AdamW, W> with;
  if (threadIdx.x == 0) with = prepare<Rule::AdamW, W>(batch, run, group, use, dtype, flags, 1.0);
  __syncthreads();
  const Streams<T, S, G> s(batch, run);
  const Prepared<Rule::AdamW, W>& mine = with;  // in registers it would spill around calls
  const W decay = static_cast<W>(group.adamw.weight_decay);
  Squares sum = {0.0, 0.0};
  for_each_group<kCount>(
      batch, chunk, [&](int64_t i) { add_squares<kCount, (kCount > 1)>(s, i, mine, decay, sum); },
      [&](int64_t i) { add_squares<1, false>(s, i, mine, decay, sum); });
  const Squares total = block_reduce<kThreads>(sum, Plus());
  if (threadIdx.x == 0) slots[batch.first_slot + blockIdx.x] = total;
}

// Sum: a double of update clipping, or Squares of LAMB.
template <class Sum>
__global__ void __launch_bounds__(kThreads)
    merge_sums(const __grid_constant__ ParamBatch batch, TrustOptions trust, GradientUse use,
               const Sum* slots,  // [all chunks]
               double* lr_scale,  // [rows]
               double* lr_sums) {  // [rows, 2], written in place of lr_scale; or null
  if (use.is_refused()) return;
  const int64_t numel = batch.numel[blockIdx.x];
  const int64_t count = divided_up(numel, batch.chunk);
  const Sum* mine = slots + batch.first_slot + batch.first_block[blockIdx.x];
  Sum sum = {};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum = sum + mine[i];
  const Sum total = block_reduce<kThreads>(sum, Plus());
  if (threadIdx.x) return;
  const int32_t row = batch.row[blockIdx.x];
  if (lr_sums) {
    if constexpr (std::is_same_v<Sum, Squares>) {
      lr_sums[2 * row] = total.param;
      lr_sums[2 * row + 1] = total.update;
    } else {
      lr_sums[2 * row] = total;
    }
    return;
  }
  double& scale = lr_scale[row];
  if constexpr (std::is_same_v<Sum, Squares>)
    scale = trust_ratio(total.param, total.update, trust);
  else
    scale = update_clip_factor(total / static_cast<double>(numel));
}

__global__ void __launch_bounds__(kThreads)
    advance_means(const __grid_constant__ ParamBatch batch,
                  const __grid_constant__ GroupOptions group, GradientUse use) {
  if (use.is_refused()) return;
  for (int run = threadIdx.x; run < batch.count; run += kThreads) {
    const Averaging after = schedule_free_of(batch, run, group, group.schedule_free.eps).after;
    *batch.weight_sum[run] = after.weight_sum;
    *batch.lr_max[run] = after.lr_max;
  }
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
    batch.weight_sum[k] = p.weight_sum;
    batch.lr_max[k] = p.lr_max;
    batch.numel[k] = p.numel;
    batch.row[k] = p.row;
    batch.aligned[k] = is_aligned(p);
  }
  launches.flush();
}

template <Rule kRule>
using RuleTag = std::integral_constant<Rule, kRule>;

// The factors of learning rates that are found here.
int64_t lr_scale_rows(const OptimStep& step) {
  int64_t rows = 0;
  for (const ParamRef& p : step.params) rows = std::max<int64_t>(rows, p.row + 1);
  return rows;
}

}  // namespace

int64_t optim_scratch_bytes(const OptimStep& step) {
  if (step.lr_scale == LrScale::None || step.lr_scales) return 0;
  const int64_t chunk = chunk_elements(step.params);
  int64_t chunks = 0;
  for (const ParamRef& p : step.params) chunks += divided_up(p.numel, chunk);
  const bool is_trust = step.lr_scale == LrScale::TrustRatio;
  const size_t slot = is_trust ? sizeof(Squares) : sizeof(double);
  return lr_scale_rows(step) * static_cast<int64_t>(sizeof(double)) +
         chunks * static_cast<int64_t>(slot);
}

void optim_step(const OptimStep& step, void* scratch, Stream stream) {
  // Scratch, of an LrScale: a factor for each row, then the chunks' slots.
  const bool sums = step.lr_scale != LrScale::None && !step.lr_scales;
  double* const lr_scale = sums ? static_cast<double*>(scratch) : nullptr;
  double* const slots = sums ? lr_scale + lr_scale_rows(step) : nullptr;
  for_each_batch(step, [&](const ParamBatch& batch, const ParamRef& like, unsigned blocks) {
    const GroupOptions& group = step.groups[like.group];
    const StepFlags flags = {step.stochastic_rounding, step.eps_follows_clip, step.atan2,
                             smallest_normal(like.state_dtype)};
    const auto launch = [&](auto type, auto state, auto grad) {
      using T = typename decltype(type)::type;
      using S = typename decltype(state)::type;
      using G = typename decltype(grad)::type;
      const auto update = [&](auto rule, const double* scales) {
        optim_update<decltype(rule)::value, T, S, G>
            <<<blocks, kThreads, 0, stream>>>(batch, group, step.use, like.dtype, flags, scales);
        check_launch("optim_update");
      };
      switch (arithmetic_of(step.rule)) {
        case Rule::Sgd: return update(RuleTag<Rule::Sgd>(), nullptr);
        case Rule::Lion: return update(RuleTag<Rule::Lion>(), nullptr);
        case Rule::ScheduleFree: return update(RuleTag<Rule::ScheduleFree>(), nullptr);
        default: break;
      }
      if (sums && step.lr_scale == LrScale::UpdateClip) {
        ratio_sums<T, S, G>
            <<<blocks, kThreads, 0, stream>>>(batch, group, step.use, like.dtype, flags, slots);
        check_launch("ratio_sums");
        merge_sums<double><<<grid(batch.count), kThreads, 0, stream>>>(
            batch, group.trust, step.use, slots, lr_scale, step.lr_sums);
        check_launch("merge_sums");
      }
      const bool adapts = step.lr_scale == LrScale::TrustRatio && group.trust.adapts;
      if (sums && adapts) {
        Squares* const squares = reinterpret_cast<Squares*>(slots);
        lamb_sums<T, S, G>
            <<<blocks, kThreads, 0, stream>>>(batch, group, step.use, like.dtype, flags, squares);
        check_launch("lamb_sums");
        merge_sums<Squares><<<grid(batch.count), kThreads, 0, stream>>>(
            batch, group.trust, step.use, squares, lr_scale, step.lr_sums);
        check_launch("merge_sums");
      }
      if (step.lr_sums) return;
      const double* const scales = step.lr_scales ? step.lr_scales : lr_scale;
      const bool scaled = adapts || step.lr_scale == LrScale::UpdateClip;
      update(RuleTag<Rule::AdamW>(), scaled ? scales : nullptr);
    };
    if (blocks)
      with_types<__half, __nv_bfloat16>(like.dtype, like.state_dtype, like.grad_dtype, launch);
    if (step.rule == Rule::ScheduleFree) {
      advance_means<<<1, kThreads, 0, stream>>>(batch, group, step.use);
      check_launch("advance_means");
    }
  });
  if (step.lr_sums) return;
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
