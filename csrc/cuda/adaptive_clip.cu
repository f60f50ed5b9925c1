// Adaptive gradient clipping (Brock et al. 2021): a block per unit reads its weights and its
// gradients once, and scales the gradients, read again from cache, only where the unit is clipped.
//
// Units of up to 1,024 elements take blocks of one warp, longer ones blocks of eight. A parameter
// takes a launch of its own if it is strided or complex, if its gradient has another type, or if
// the norm has a general order. The loss scale of the gradients is read on the device.

#include "../ops/adaptive_clip.h"

#include "launch.cuh"
#include "stats.cuh"

namespace gradfuse::cuda {
namespace {

constexpr int kUnroll = 2;
constexpr int64_t kShortUnit = 1024;

// Many parameters with dense units, of one type.
struct UnitBatch {
  static constexpr int kCapacity = 512;
  const void* weight[kCapacity];
  void* grad[kCapacity];
  int64_t weight_stride[kCapacity];  // elements between units
  int64_t grad_stride[kCapacity];
  int64_t numel[kCapacity];        // of a unit
  int32_t first_block[kCapacity];  // one block per unit
  int64_t first_slot;
  int32_t count;
};

// The unit's coefficient, in every thread.
template <int kBlock>
__device__ ScaledNorm shared_coefficient(const Stats& weight, const Stats& grad, UnitLimit limit,
                                         const float* scale) {
  const NormSpec spec = limit.spec;
  __shared__ ScaledNorm coefficient;
  const Stats w = block_merge<kBlock>(weight, spec.p);
  const Stats g = block_merge<kBlock>(grad, spec.p);
  if (threadIdx.x == 0)
    coefficient = unit_coefficient(norm_of(sum_of(w, spec), spec), norm_of(sum_of(g, spec), spec),
                                   limit.clip_factor, limit.eps, scale ? *scale : 1.0f);
  __syncthreads();
  return coefficient;
}

__device__ bool clips(ScaledNorm c) { return c.value != 1.0 || c.exponent != 0.0; }

// Two blocks per multiprocessor leave enough registers for two runs; with more, ptxas spills.
template <class T, int kBlock>
__global__ void __launch_bounds__(kBlock, 2)
    dense_units(const __grid_constant__ UnitBatch batch, UnitLimit limit, const float* scale) {
  const int param = run_of_block(batch, blockIdx.x);
  const int64_t unit = blockIdx.x - batch.first_block[param];
  const int64_t n = batch.numel[param];
  const T* weight = static_cast<const T*>(batch.weight[param]) + unit * batch.weight_stride[param];
  T* grad = static_cast<T*>(batch.grad[param]) + unit * batch.grad_stride[param];
  const Stats w = thread_stats<T, kBlock, kUnroll, Sums::Magnitudes>(weight, n, limit.spec);
  const Stats g = thread_stats<T, kBlock, kUnroll, Sums::Magnitudes>(grad, n, limit.spec);
  const ScaledNorm c = shared_coefficient<kBlock>(w, g, limit, scale);
  if (clips(c)) scale_run<T, kBlock>(grad, n, factor_of(c));
}

template <Sums kSums>
__global__ void __launch_bounds__(kThreads, 2)
    strided_units(const __grid_constant__ StridedRun weight,
                  const __grid_constant__ StridedRun grad, int64_t weight_stride,
                  int64_t grad_stride, UnitLimit limit, const float* scale) {
  const int64_t weight_base = blockIdx.x * weight_stride;
  const int64_t grad_base = blockIdx.x * grad_stride;
  const int64_t n = grad.numel;
  const Stats w = strided_thread_stats<kThreads, kSums>(weight, weight_base, 0, n, limit.spec);
  const Stats g = strided_thread_stats<kThreads, kSums>(grad, grad_base, 0, n, limit.spec);
  const ScaledNorm c = shared_coefficient<kThreads>(w, g, limit, scale);
  if (clips(c)) scale_strided<kThreads>(grad, grad_base, 0, n, factor_of(c));
}

bool has_dense_units(const UnitRef& u, NormSpec spec) {
  return is_batched(u.weight) && is_batched(u.grad) && u.weight.dtype == u.grad.dtype &&
         spec.kind != NormKind::P;
}

// Dense units of one type, short ones or long ones.
void launch_batched(const std::vector<UnitRef>& units, DType dtype, bool is_short, UnitLimit limit,
                    const float* scale, Stream stream) {
  const auto launch = [&](const UnitBatch& batch, unsigned blocks) {
    with_type(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (is_short)
        dense_units<T, kWarp><<<blocks, kWarp, 0, stream>>>(batch, limit, scale);
      else
        dense_units<T, kThreads><<<blocks, kThreads, 0, stream>>>(batch, limit, scale);
    });
    check_launch("dense_units");
  };
  Launches<UnitBatch, decltype(launch)> launches(launch);
  const int64_t bytes = element_bytes(dtype);
  for (const UnitRef& u : units) {
    if (!has_dense_units(u, limit.spec) || u.grad.dtype != dtype) continue;
    if ((u.grad.numel <= kShortUnit) != is_short) continue;
    for (int64_t first = 0; first < u.rows; first += kMostBlocks) {
      const int64_t rows = u.rows - first < kMostBlocks ? u.rows - first : kMostBlocks;
      const int i = launches.add(rows);
      UnitBatch& batch = launches.batch();
      batch.weight[i] = static_cast<const char*>(u.weight.data) + first * u.weight_stride * bytes;
      batch.grad[i] = static_cast<char*>(u.grad.data) + first * u.grad_stride * bytes;
      batch.weight_stride[i] = u.weight_stride;
      batch.grad_stride[i] = u.grad_stride;
      batch.numel[i] = u.grad.numel;
    }
  }
  launches.flush();
}

void launch_strided(const UnitRef& u, UnitLimit limit, const float* scale, Stream stream) {
  if (u.rows > kMostBlocks)
    throw std::runtime_error("adaptive_clip_grad_: expected at most 2^31 - 1 strided units, got " +
                             std::to_string(u.rows));
  const StridedRun weight = strided_run(u.weight), grad = strided_run(u.grad);
  const unsigned blocks = grid(u.rows);
  if (limit.spec.kind == NormKind::P)
    strided_units<Sums::Powers><<<blocks, kThreads, 0, stream>>>(weight, grad, u.weight_stride,
                                                                 u.grad_stride, limit, scale);
  else
    strided_units<Sums::Magnitudes><<<blocks, kThreads, 0, stream>>>(weight, grad, u.weight_stride,
                                                                     u.grad_stride, limit, scale);
  check_launch("strided_units");
}

}  // namespace

void adaptive_clip(const std::vector<UnitRef>& units, UnitLimit limit, const float* scale,
                   Stream stream) {
  for (DType dtype : {DType::Half, DType::BFloat16, DType::Float, DType::Double})
    for (bool is_short : {true, false})
      launch_batched(units, dtype, is_short, limit, scale, stream);
  for (const UnitRef& u : units)
    if (!has_dense_units(u, limit.spec)) launch_strided(u, limit, scale, stream);
}

}  // namespace gradfuse::cuda
