// The gradients of act((input - mean) * invstd * weight + bias + residual).
//
// g = grad_output * act', with act' from the mask, from the output, or from z computed again.
// Three launches: the sums of g and g * h (read grad_output and input), each channel's coefficients
// and parameter gradients, and the sweep (read both again, write grad_input and grad_residual). A
// channel that fits one block takes a single launch. In eval mode grad_input needs no sums.
//
// Assumes element-aligned data; uses 16-byte accesses where all runs begin at 16-byte boundaries.
#include "batch_norm_activation.cuh"
#include "batch_norm_sums.cuh"

namespace gradfuse::cuda {
namespace {

template <class W>
struct Group {
  W at[kGroup];
};

template <class W>
__device__ W invstd_of(const BatchNormBackward& call, int64_t c) {
  return scale_of_shrunk<W>(kept_of<W>(call, c).invstd);
}

// Returns a function that returns the normalised elements of group x, without the residual, by
// index. Coefficients of one channel are at hand; those of each element need more registers, so
// they are loaded by the call.
template <class T, class W>
__device__ auto normalised(const Normalisation<W>& n, const Packed<T>& x) {
  return [&] { return [&](int e) { return difference(x[e], n.mean) * n.scale + n.shift; }; };
}
template <class T, class W>
__device__ auto normalised(const Coefficients<W>& coefficients, const Packed<T>& x) {
  return [&] {
    Group<W> z, v;
    coefficients(kMean, v.at);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z.at[e] = difference(x[e], v.at[e]);
    coefficients(kScale, v.at);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z.at[e] *= v.at[e];
    coefficients(kShift, v.at);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z.at[e] += v.at[e];
    return [z](int e) { return z.at[e]; };
  };
}

// What the gradient of a group comes from.
template <class T>
struct Saved {
  Packed<T> input;
  Packed<T> grad;  // of the output
  Packed<T> other;  // the residual if z is computed again, else the output, if there is no mask
  unsigned mask;
  Wide<T> factor;  // of the branch that joins the residual
};

// kScaled: whether the branch may have a scale.
template <class T, bool kScaled = true, int kBlock>
__device__ Saved<T> load_saved(const BatchNormBackward& call, const Groups<T, kBlock>& groups,
                               const Place& place, bool wants_input) {
  Saved<T> s;
  if (wants_input) s.input = groups.load(call.input, place);
  s.grad = groups.load(call.grad_output, place);
  const void* other = needs_input(call.activation) ? call.residual : call.output;
  s.mask = call.mask && place.count ? call.mask[place.byte] : 0u;
  if (other) s.other = groups.load(other, place);
  s.factor = Wide<T>(1);
  if constexpr (kScaled) s.factor = branch_factor<Wide<T>>(call.scale, call.shape, place);
  return s;
}

template <class W>
__device__ void scale_branch(W (&g)[kGroup], W factor) {
  if (factor == W(1)) return;
#pragma unroll
  for (int e = 0; e < kGroup; ++e) g[e] = scaled_branch(g[e], factor);
}

// g of a group.
template <class T, class Normalised>
__device__ void gradient_before(const BatchNormBackward& call, const Saved<T>& saved, int count,
                                Wide<T> (&g)[kGroup], Normalised normalised) {
  using W = Wide<T>;
#pragma unroll
  for (int e = 0; e < kGroup; ++e) g[e] = saved.grad[e];
  with_activation(call.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    if constexpr (kActivation == Activation::None) {
      return;
    } else if constexpr (needs_input(kActivation)) {
      const auto z = normalised();
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
        g[e] *= derivative_at<kActivation, W>(scaled_branch(z(e), saved.factor) +
                                              saved.other[e]);  // 0 without a residual
    } else {
      const W slope =
          kActivation == Activation::LeakyRelu ? static_cast<W>(call.negative_slope) : W(0);
      if (has_mask(kActivation) && call.mask) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e)
          if (!(saved.mask >> e & 1u))
            g[e] = kActivation == Activation::LeakyRelu ? g[e] * slope : W(0);
        return;
      }
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        const W d = derivative_from_output<kActivation, W>(saved.other[e], slope);
        g[e] = has_mask(kActivation) && d == W(0) ? W(0) : g[e] * d;  // not inf * 0
      }
    }
  });
#pragma unroll
  for (int e = 0; e < kGroup; ++e)
    if (e >= count) g[e] = W(0);
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : kBlocks)
    batch_norm_grad_channel_sums(const __grid_constant__ BatchNormBackward call, double* slots) {
  using W = Wide<T>;
  const Groups<T> groups(Runs(call.shape).length);
  const int64_t c = blockIdx.x % call.shape.channels;
  const Normalisation<W> n = normalisation_of<W, Vectors>(call, c);
  const W invstd = invstd_of<W>(call, c);
  const auto load = [&](const Place& place) {
    return load_saved<T>(call, groups, place, call.input != nullptr);
  };
  const auto add = [&](const Saved<T>& saved, int count, TwoSums& sums, auto) {
    W h[kGroup], g[kGroup];
    gradient_before<T>(call, saved, count, g, normalised(n, saved.input));
    scale_branch(g, saved.factor);
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      h[e] = call.input && e < count ? difference(saved.input[e], n.mean) * invstd : W(0);
    sums.add(g, g, h);
  };
  sum_channel_chunk<kInFlight<T, 2, 32>, false>(call.shape, slots, load, add);
}

template <class T, bool kScaled>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 || kScaled ? 1 : 2)
    batch_norm_grad_row_sums(const __grid_constant__ BatchNormBackward call, double* slots) {
  using W = Wide<T>;
  const Runs runs(call.shape);
  const Groups<T> groups(runs.length);
  const InTile at(runs);
  // The coefficients of the tile's channels, one thread each.
  __shared__ alignas(16) W shared[kInvstd + 1][kTileColumns];
  const int64_t mine = at.first_channel() + threadIdx.x;
  if (mine < runs.channels) {
    const Normalisation<W> n = normalisation_of<W, Vectors>(call, mine);
    shared[kMean][threadIdx.x] = n.mean;
    shared[kScale][threadIdx.x] = n.scale;
    shared[kShift][threadIdx.x] = n.shift;
    shared[kInvstd][threadIdx.x] = invstd_of<W>(call, mine);
  }
  __syncthreads();
  const int64_t left = runs.channels - at.group * kGroup;
  const int count = left >= kGroup ? kGroup : left > 0 ? static_cast<int>(left) : 0;
  const Coefficients<W> of_group = {shared[0] + at.column * kGroup, kTileColumns, count, true};
  const auto load = [&](const Place& place) {
    return load_saved<T, kScaled>(call, groups, place, call.input != nullptr);
  };
  const auto terms = [&](const Saved<T>& saved, W(&x)[kGroup], W(&y)[kGroup], W(&z)[kGroup]) {
    gradient_before<T>(call, saved, count, x, normalised(of_group, saved.input));
    scale_branch(x, saved.factor);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) y[e] = x[e], z[e] = W(0);
    if (!call.input) return;
    W v[kGroup];
    of_group(kMean, v);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z[e] = difference(saved.input[e], v[e]);
    of_group(kInvstd, v);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z[e] *= v[e];
  };
  sum_row_chunk<W, kInFlight<T, 2, 32>, false>(call.shape, slots, load, terms);
}

// Coefficients that the sweep needs, and the parameter gradients, by channel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_grad_finish(const __grid_constant__ BatchNormBackward call, const double* slots,
                           bool has_sums, Wide<T>* coefficients) {
  const int64_t c = channel_of_warp();
  const int64_t channels = call.shape.channels;
  if (c >= channels) return;
  const TwoSums sums = has_sums ? sum_of_chunks(call.shape, slots, c) : TwoSums();
  if (threadIdx.x % kWarp != 0) return;
  const InputGradient<Wide<T>> g =
      finish_backward<Wide<T>, Vectors>(call, c, {sums.first, sums.second});
  const Normalisation<Wide<T>> n = normalisation_of<Wide<T>, Vectors>(call, c);
  coefficients[kMean * channels + c] = n.mean;
  coefficients[kScale * channels + c] = n.scale;
  coefficients[kShift * channels + c] = n.shift;
  coefficients[kInvstd * channels + c] = g.invstd;
  coefficients[kDirect * channels + c] = g.direct;
  coefficients[kSlope * channels + c] = g.slope;
  coefficients[kOffset * channels + c] = g.shift;
}

// Writes the gradients of a group; x holds its input, unless none is needed.
template <class T, int kBlock, class OfGroup>
__device__ void write_gradients(const BatchNormBackward& call, const Groups<T, kBlock>& groups,
                                const Place& place, const Packed<T>& x, const OfGroup& coefficients,
                                Wide<T> (&g)[kGroup]) {
  using W = Wide<T>;
  if (call.grad_residual) groups.store(call.grad_residual, place, g);
  if (!call.grad_input) return;
  scale_branch(g, branch_factor<W>(call.scale, call.shape, place));
  W v[kGroup];
  coefficients(kDirect, v);
#pragma unroll
  for (int e = 0; e < kGroup; ++e) g[e] *= v[e];
  if (call.training) {
    W h[kGroup], slope[kGroup];
    coefficients(kMean, v);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) h[e] = difference(x[e], v[e]);
    coefficients(kInvstd, v);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) h[e] *= v[e];
    coefficients(kSlope, slope);
    coefficients(kOffset, v);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) g[e] += h[e] * slope[e] + v[e];
  }
  groups.store(call.grad_input, place, g);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_grad_apply(const __grid_constant__ BatchNormBackward call,
                          const Wide<T>* coefficients) {
  using W = Wide<T>;
  const Runs runs(call.shape);
  const Groups<T> groups(runs.length);
  const SweptGroup swept(runs);
  const Place& place = swept.place;
  const bool wants_input = needs_input(call.activation) || (call.training && call.grad_input);
  const Saved<T> saved = load_saved<T>(call, groups, place, wants_input);
  const auto of_group =
      coefficients_of_group(runs, swept.row, swept.group, place.count, coefficients);
  W g[kGroup];
  gradient_before<T>(call, saved, place.count, g, normalised(of_group, saved.input));
  write_gradients(call, groups, place, saved.input, of_group, g);
}

// A channel in one block: input and g stay in registers between the sums and the sweep.
template <class T, int kBlock>
__global__ void __launch_bounds__(kBlock)
    batch_norm_grad_small(const __grid_constant__ BatchNormBackward call, bool has_sums) {
  using W = Wide<T>;
  constexpr int kHeld = kHeldGroups<T>;
  const Runs runs(call.shape);
  const Groups<T, kBlock> groups(runs.length);
  const int64_t channel = blockIdx.x;
  const int64_t all = runs.groups_of_channel();
  const auto place_of_held = [&](int k) {
    return place_in_channel(runs, channel, threadIdx.x + k * kBlock, all);
  };
  const Normalisation<W> n = normalisation_of<W, Vectors>(call, channel);
  const W invstd = invstd_of<W>(call, channel);
  Packed<T> x[kHeld];
  W g[kHeld][kGroup];
  TwoSums mine;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const Place place = place_of_held(k);
    const Saved<T> saved = load_saved<T>(call, groups, place, call.input != nullptr);
    x[k] = saved.input;
    gradient_before<T>(call, saved, place.count, g[k], normalised(n, saved.input));
    if (!has_sums) continue;
    W h[kGroup];
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      h[e] = call.input && e < place.count ? difference(x[k][e], n.mean) * invstd : W(0);
    W branch[kGroup];
#pragma unroll
    for (int e = 0; e < kGroup; ++e) branch[e] = g[k][e];
    scale_branch(branch, saved.factor);
    mine.add(branch, branch, h);
  }
  const TwoSums sums = block_sum<kBlock>(mine);
  __shared__ InputGradient<W> shared;
  if (threadIdx.x == 0)
    shared = finish_backward<W, Vectors>(call, channel, {sums.first, sums.second});
  __syncthreads();
  const InputGradient<W> d = shared;
  const auto coefficients = [&](int k, W(&v)[kGroup]) {
    const W one = k == kMean     ? d.mean
                  : k == kInvstd ? d.invstd
                  : k == kDirect ? d.direct
                  : k == kSlope  ? d.slope
                                 : d.shift;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) v[e] = one;
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k * kBlock >= all) break;  // of no thread
    write_gradients(call, groups, place_of_held(k), x[k], coefficients, g[k]);
  }
}

}  // namespace

void batch_norm_backward(const BatchNormBackward& call, void* scratch, Stream stream) {
  with_type(call.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const BatchNormShape& shape = call.shape;
    const bool has_sums = needs_sums(call);
    if (fits_block(shape, kThreads)) {
      const unsigned blocks = blocks_for(shape.channels);
      if (fits_block(shape, kSmallBlock))
        batch_norm_grad_small<T, kSmallBlock><<<blocks, kSmallBlock, 0, stream>>>(call, has_sums);
      else
        batch_norm_grad_small<T, kThreads><<<blocks, kThreads, 0, stream>>>(call, has_sums);
      check_launch("batch_norm_grad_small");
      return;
    }
    double* slots = slots_of(scratch);
    Wide<T>* coefficients = static_cast<Wide<T>*>(coefficients_of(shape, scratch));
    if (has_sums) {
      const unsigned blocks = blocks_for(sum_blocks(shape));
      if (shape.inner == 1 && call.scale.data)
        batch_norm_grad_row_sums<T, true><<<blocks, kThreads, 0, stream>>>(call, slots);
      else if (shape.inner == 1)
        batch_norm_grad_row_sums<T, false><<<blocks, kThreads, 0, stream>>>(call, slots);
      else
        batch_norm_grad_channel_sums<T><<<blocks, kThreads, 0, stream>>>(call, slots);
      check_launch("batch_norm_grad_sums");
    }
    batch_norm_grad_finish<T><<<blocks_for(channel_blocks(shape)), kThreads, 0, stream>>>(
        call, slots, has_sums, coefficients);
    check_launch("batch_norm_grad_finish");
    if (call.grad_input || call.grad_residual) {
      batch_norm_grad_apply<T>
          <<<blocks_for(sweep_blocks(shape)), kThreads, 0, stream>>>(call, coefficients);
      check_launch("batch_norm_grad_apply");
    }
  });
}

}  // namespace gradfuse::cuda
