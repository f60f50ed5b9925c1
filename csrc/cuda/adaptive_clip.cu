// Adaptive gradient clipping (Brock et al. 2021): a block per unit reads its weights and its
// gradients once, and scales the gradients, read again from cache, only where the unit is clipped.
//
// Units of up to 1,024 elements take blocks of one warp, longer ones of eight. Parameters that are
// strided or complex, whose gradient has another type, or norms of a general order take a launch
// each. A loss scale that the gradients carry is read on the device.

#include "stats.cuh"

namespace gradfuse::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kUnroll = 2;
constexpr int64_t kShortUnit = 1024;

// Many parameters with dense units, of one type.
struct UnitBatch {
  static constexpr int kCapacity = 512;
  const void* weight[kCapacity];
  void* grad[kCapacity];
  int64_t weight_stride[kCapacity];  // elements between units
  int64_t grad_stride[kCapacity];
  int64_t numel[kCapacity];       // of a unit
  int64_t first_unit[kCapacity];  // ascending from 0
  int32_t count;
};
static_assert(sizeof(UnitBatch) <= 32000, "kernel parameters end at 32,764 bytes");

// How much of its weights' norm a unit's gradient may have.
struct UnitLimit {
  double clip_factor, eps;
  const float* scale;  // of the loss, or null
};

// The unit's coefficient, in every thread.
template <int kBlock>
__device__ ScaledNorm shared_coefficient(const Stats& weight, const Stats& grad, UnitLimit limit,
                                         NormSpec spec) {
  __shared__ ScaledNorm coefficient;
  const Stats w = block_merge<kBlock>(weight, spec.p);
  const Stats g = block_merge<kBlock>(grad, spec.p);
  if (threadIdx.x == 0)
    coefficient =
        unit_coefficient(norm_of(sum_of(w, spec), spec), norm_of(sum_of(g, spec), spec),
                         limit.clip_factor * (limit.scale ? *limit.scale : 1.0f), limit.eps);
  __syncthreads();
  return coefficient;
}

__device__ bool clips(ScaledNorm c) { return c.value != 1.0 || c.exponent != 0.0; }

// Two blocks a multiprocessor leave enough registers for two runs; asked for more, ptxas spills.
template <class T, int kBlock>
__global__ void __launch_bounds__(kBlock, 2)
    dense_units(const __grid_constant__ UnitBatch batch, UnitLimit limit, NormSpec spec) {
  const int param = find_run(batch.first_unit, batch.count, blockIdx.x);
  const int64_t unit = blockIdx.x - batch.first_unit[param];
  const int64_t n = batch.numel[param];
  const T* weight = static_cast<const T*>(batch.weight[param]) + unit * batch.weight_stride[param];
  T* grad = static_cast<T*>(batch.grad[param]) + unit * batch.grad_stride[param];
  const Stats w = thread_stats<T, kBlock, kUnroll, false>(weight, n, spec);
  const Stats g = thread_stats<T, kBlock, kUnroll, false>(grad, n, spec);
  const ScaledNorm c = shared_coefficient<kBlock>(w, g, limit, spec);
  if (clips(c)) scale_run<T, kBlock>(grad, n, factor_of(c));
}

template <bool kPower>
__global__ void __launch_bounds__(kThreads, 2)
    strided_units(const __grid_constant__ StridedRun weight,
                  const __grid_constant__ StridedRun grad, int64_t weight_stride,
                  int64_t grad_stride, UnitLimit limit, NormSpec spec) {
  const int64_t weight_base = blockIdx.x * weight_stride;
  const int64_t grad_base = blockIdx.x * grad_stride;
  const int64_t n = grad.numel;
  const Stats w = strided_thread_stats<kThreads, kPower>(weight, weight_base, 0, n, spec);
  const Stats g = strided_thread_stats<kThreads, kPower>(grad, grad_base, 0, n, spec);
  const ScaledNorm c = shared_coefficient<kThreads>(w, g, limit, spec);
  if (clips(c)) scale_strided<kThreads>(grad, grad_base, 0, n, factor_of(c));
}

bool is_batched(const UnitRef& u, NormSpec spec) {
  return is_plain(u.weight) && is_plain(u.grad) && u.weight.dtype == u.grad.dtype &&
         spec.kind != NormKind::P;
}

}  // namespace

void clip_units(const std::vector<UnitRef>& units, double clip_factor, double eps,
                const float* scale, NormSpec spec, cudaStream_t stream) {
  const UnitLimit limit = {clip_factor, eps, scale};
  // A grid has at most 2^31 - 1 blocks.
  constexpr int64_t kMaxBlocks = INT32_MAX;
  for (int key = 0; key < 8; ++key) {
    const DType dtype = static_cast<DType>(key / 2);
    const bool is_short = key % 2 == 0;
    UnitBatch batch;
    batch.count = 0;
    int64_t blocks = 0;
    auto flush = [&] {
      if (batch.count == 0) return;
      const unsigned grid = static_cast<unsigned>(blocks);
      with_type(dtype, [&](auto type) {
        using T = decltype(type);
        if (is_short)
          dense_units<T, kWarp><<<grid, kWarp, 0, stream>>>(batch, limit, spec);
        else
          dense_units<T, kThreads><<<grid, kThreads, 0, stream>>>(batch, limit, spec);
      });
      check_launch("dense_units");
      blocks = batch.count = 0;
    };
    for (const UnitRef& u : units) {
      if (!is_batched(u, spec) || u.grad.dtype != dtype) continue;
      if ((u.grad.numel <= kShortUnit) != is_short) continue;
      for (int64_t first = 0; first < u.rows; first += kMaxBlocks) {
        const int64_t rows = u.rows - first < kMaxBlocks ? u.rows - first : kMaxBlocks;
        if (batch.count == UnitBatch::kCapacity || blocks + rows > kMaxBlocks) flush();
        const int i = batch.count++;
        with_type(dtype, [&](auto type) {
          using T = decltype(type);
          batch.weight[i] = static_cast<const T*>(u.weight.data) + first * u.weight_stride;
          batch.grad[i] = static_cast<T*>(u.grad.data) + first * u.grad_stride;
        });
        batch.weight_stride[i] = u.weight_stride;
        batch.grad_stride[i] = u.grad_stride;
        batch.numel[i] = u.grad.numel;
        batch.first_unit[i] = blocks;
        blocks += rows;
      }
    }
    flush();
  }
  for (const UnitRef& u : units) {
    if (is_batched(u, spec)) continue;
    if (u.rows > kMaxBlocks)
      throw std::runtime_error(
          "adaptive_clip_grad_: expected at most 2^31 - 1 strided units, got " +
          std::to_string(u.rows));
    const StridedRun weight = strided_run(u.weight), grad = strided_run(u.grad);
    const unsigned grid = static_cast<unsigned>(u.rows);
    if (spec.kind == NormKind::P)
      strided_units<true><<<grid, kThreads, 0, stream>>>(weight, grad, u.weight_stride,
                                                         u.grad_stride, limit, spec);
    else
      strided_units<false><<<grid, kThreads, 0, stream>>>(weight, grad, u.weight_stride,
                                                          u.grad_stride, limit, spec);
    check_launch("strided_units");
  }
}

}  // namespace gradfuse::cuda
