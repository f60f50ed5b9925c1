// act((input - mean) * invstd * weight + bias + residual), forward.
//
// Three launches: sums of each channel's chunks (read input), the statistics of each channel, and
// the sweep (read input and residual, write output and mask). A channel that one block can hold
// takes one launch, which reads the input once. In eval mode, and where the statistics come from
// all ranks, the sums are left out; what a rank tells the others ends after the second launch.
//
// Assumes element-aligned data; uses 16-byte accesses where all runs begin at 16-byte boundaries.
#include "batch_norm_activation.cuh"
#include "batch_norm_sums.cuh"

namespace gradfuse::cuda {
namespace {

// Adds x - shift and its square for the first `count` elements of a group; in float64 if kWide.
template <bool kWide, class T>
__device__ void add_differences(const Packed<T>& x, int count, Wide<T> shift, TwoSums& sums) {
  using W = Wide<T>;
  if constexpr (kWide) {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      const double d = e < count ? static_cast<double>(x[e]) - shift : 0.0;
      sums.first += d;
      sums.second += d * d;
    }
  } else {
    W d[kGroup];
#pragma unroll
    for (int e = 0; e < kGroup; ++e) d[e] = e < count ? x[e] - shift : W(0);
    sums.add(d, d, d);
  }
}

// The element of a channel from which its sums take differences.
template <class T>
__device__ Wide<T> shift_of(const BatchNormForward& call, int64_t channel) {
  const BatchNormShape& shape = call.shape;
  const auto element = [&](int64_t outer, int64_t inner) {
    const int64_t at = (outer * shape.channels + channel) * shape.inner + inner;
    return Element<T>::widen(static_cast<const T*>(call.input)[at]);
  };
  if constexpr (kLeavesRange<Wide<T>>)
    return element(0, 0);
  else
    return median(element(0, 0), element(shape.outer / 2, shape.inner / 2),
                  element(shape.outer - 1, shape.inner - 1));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    batch_norm_channel_sums(const __grid_constant__ BatchNormForward call, double* slots) {
  using W = Wide<T>;
  const Groups<T> groups(Runs(call.shape).length);
  const W shift = shift_of<T>(call, blockIdx.x % call.shape.channels);
  const auto load = [&](const Place& place) { return groups.load(call.input, place); };
  const auto add = [&](const Packed<T>& x, int count, TwoSums& sums, auto wide) {
    add_differences<decltype(wide)::value>(x, count, shift, sums);
  };
  sum_channel_chunk<kInFlight<T, 1, 32>, kLeavesRange<W>>(call.shape, slots, load, add);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_row_sums(const __grid_constant__ BatchNormForward call, double* slots) {
  using W = Wide<T>;
  const Runs runs(call.shape);
  const Groups<T> groups(runs.length);
  const InTile at(runs);
  // The shifts of the tile's channels, one thread each.
  __shared__ alignas(16) W shared[kTileColumns];
  const int64_t mine = at.first_channel() + threadIdx.x;
  if (mine < runs.channels) shared[threadIdx.x] = shift_of<T>(call, mine);
  __syncthreads();
  W shift[kGroup];
#pragma unroll
  for (int e = 0; e < kGroup; ++e)
    shift[e] = at.group * kGroup + e < runs.channels ? shared[at.column * kGroup + e] : W(0);
  const auto load = [&](const Place& place) { return groups.load(call.input, place); };
  const auto terms = [&](const Packed<T>& in, auto& x, auto& y, auto& z) {
    using V = std::decay_t<decltype(x[0])>;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) x[e] = y[e] = z[e] = static_cast<V>(in[e]) - shift[e];
  };
  sum_row_chunk<W, kInFlight<T, 1, 64>, kLeavesRange<W>>(call.shape, slots, load, terms);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_statistics(const __grid_constant__ BatchNormForward call, const double* slots,
                          Wide<T>* coefficients) {
  const int64_t c = channel_of_warp();
  const int64_t channels = call.shape.channels;
  if (c >= channels) return;
  const bool has_sums = call.training && !call.over_ranks.data;
  TwoSums sums;
  if (has_sums) sums = sum_of_chunks(call.shape, slots, c);
  if (threadIdx.x % kWarp != 0) return;
  const Statistics batch =
      call.over_ranks.data
          ? statistics_over_ranks(call, c)
          : own_statistics(call, {sums.first, sums.second}, has_sums ? shift_of<T>(call, c) : 0.0);
  if (call.tally) {
    write_tally(call, c, batch);
    return;
  }
  const Normalisation<Wide<T>> n = finish_forward<Wide<T>, Vectors>(call, c, batch);
  coefficients[kMean * channels + c] = n.mean;
  coefficients[kScale * channels + c] = n.scale;
  coefficients[kShift * channels + c] = n.shift;
}

// Writes a group's output from its normalised elements, and its byte of the mask.
template <class T, int kBlock>
__device__ void write_output(const BatchNormForward& call, const Groups<T, kBlock>& groups,
                             const Place& place, const Packed<T>& residual, Wide<T> (&z)[kGroup]) {
  using W = Wide<T>;
  if (call.scale.data) {
    const W factor = branch_factor<W>(call.scale, call.shape, place);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z[e] = scaled_branch(z[e], factor);
  }
  if (call.residual) {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z[e] += residual[e];
  }
  unsigned bits = 0;
  with_activation(call.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    if constexpr (has_mask(kActivation)) {
      const MaskBounds bounds = mask_bounds(kActivation, call.shape.dtype);
      const W above = static_cast<W>(bounds.above), below = static_cast<W>(bounds.below);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        bool set = z[e] > above;
        if (kActivation == Activation::Relu) set = !(z[e] <= above);
        if (kActivation == Activation::Relu6) set = set && z[e] < below;
        bits |= (e < place.count && set ? 1u : 0u) << e;
      }
    }
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      z[e] = activate<kActivation, W>(z[e], static_cast<W>(call.negative_slope));
  });
  groups.store(call.output, place, z);
  if (call.mask && place.count) call.mask[place.byte] = static_cast<uint8_t>(bits);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_apply(const __grid_constant__ BatchNormForward call, const Wide<T>* coefficients) {
  using W = Wide<T>;
  const Runs runs(call.shape);
  const Groups<T> groups(runs.length);
  const SweptGroup swept(runs);
  const Place& place = swept.place;
  const Packed<T> x = groups.load(call.input, place);
  Packed<T> residual;
  if (call.residual) residual = groups.load(call.residual, place);
  const auto of_group =
      coefficients_of_group(runs, swept.row, swept.group, place.count, coefficients);
  W z[kGroup], mean[kGroup], scale[kGroup], shift[kGroup];
  of_group(kMean, mean);
  of_group(kScale, scale);
  of_group(kShift, shift);
#pragma unroll
  for (int e = 0; e < kGroup; ++e) z[e] = difference(x[e], mean[e]) * scale[e] + shift[e];
  write_output(call, groups, place, residual, z);
}

// A channel in one block: the input stays in registers between the sums and the sweep. Of a call by
// itself: over ranks there are no sums, and no register to spare for the merge.
template <class T, int kBlock>
__global__ void __launch_bounds__(kBlock, 512 / kBlock)
    batch_norm_small(const __grid_constant__ BatchNormForward call) {
  using W = Wide<T>;
  constexpr int kHeld = kHeldGroups<T>;
  const Runs runs(call.shape);
  const Groups<T, kBlock> groups(runs.length);
  const int64_t channel = blockIdx.x;
  const int64_t all = runs.groups_of_channel();
  const auto place_of_held = [&](int k) {
    return place_in_channel(runs, channel, threadIdx.x + k * kBlock, all);
  };
  Packed<T> held[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) held[k] = groups.load(call.input, place_of_held(k));
  const W shift = shift_of<T>(call, channel);
  const auto sum = [&](auto wide) {
    TwoSums mine;
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      add_differences<decltype(wide)::value>(held[k], place_of_held(k).count, shift, mine);
    return block_sum<kBlock>(mine);
  };
  TwoSums sums;
  if (call.training) {
    sums = sum(std::false_type());
    if constexpr (kLeavesRange<W>) {
      const double count = static_cast<double>(call.shape.count());
      if (__syncthreads_or(threadIdx.x == 0 && left_range(sums, count)))
        sums = sum(std::true_type());
    }
  }
  __shared__ Normalisation<W> shared;
  if (threadIdx.x == 0)
    shared = finish_forward<W, Vectors>(call, channel,
                                        own_statistics(call, {sums.first, sums.second}, shift));
  __syncthreads();
  const Normalisation<W> n = shared;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k * kBlock >= all) break;  // of no thread
    const Place place = place_of_held(k);
    Packed<T> residual;
    if (call.residual) residual = groups.load(call.residual, place);
    W z[kGroup];
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z[e] = difference(held[k][e], n.mean) * n.scale + n.shift;
    write_output(call, groups, place, residual, z);
  }
}

}  // namespace

int64_t batch_norm_scratch_bytes(const BatchNormShape& shape) {
  const int64_t slots = Chunks(shape).count * 2 * shape.channels;
  return (slots + kBackwardCoefficients * shape.channels) * static_cast<int64_t>(sizeof(double));
}

void batch_norm_forward(const BatchNormForward& call, void* scratch, Stream stream) {
  with_type(call.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const BatchNormShape& shape = call.shape;
    if (!call.tally && !call.over_ranks.data && fits_block(shape, kThreads)) {
      const unsigned blocks = blocks_for(shape.channels);
      if (fits_block(shape, kSmallBlock))
        batch_norm_small<T, kSmallBlock><<<blocks, kSmallBlock, 0, stream>>>(call);
      else
        batch_norm_small<T, kThreads><<<blocks, kThreads, 0, stream>>>(call);
      check_launch("batch_norm_small");
      return;
    }
    double* slots = slots_of(scratch);
    Wide<T>* coefficients = static_cast<Wide<T>*>(coefficients_of(shape, scratch));
    if (call.training && !call.over_ranks.data) {
      const unsigned blocks = blocks_for(sum_blocks(shape));
      if (shape.inner == 1)
        batch_norm_row_sums<T><<<blocks, kThreads, 0, stream>>>(call, slots);
      else
        batch_norm_channel_sums<T><<<blocks, kThreads, 0, stream>>>(call, slots);
      check_launch("batch_norm_sums");
    }
    batch_norm_statistics<T>
        <<<blocks_for(channel_blocks(shape)), kThreads, 0, stream>>>(call, slots, coefficients);
    check_launch("batch_norm_statistics");
    if (call.tally) return;
    batch_norm_apply<T>
        <<<blocks_for(sweep_blocks(shape)), kThreads, 0, stream>>>(call, coefficients);
    check_launch("batch_norm_apply");
  });
}

}  // namespace gradfuse::cuda
