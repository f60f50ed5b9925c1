// The gradients of act((input - mean) * invstd * weight + bias + residual).
//
// With g = grad_output * act', from the mask's bits, the output, or z computed again: three
// launches as in the forward, sums of g and g * h (read grad_output and input), each channel's
// coefficients and parameter gradients, and the sweep (read both again, write grad_input and
// grad_residual). A channel that one block can hold takes one launch. In eval mode grad_input needs
// no sums.
#include "batch_norm.cuh"

namespace gradfuse::cuda {
namespace {

// How an element is normalised, and its gradient combined.
template <class W>
struct ChannelGradient {
  Normalisation<W> forward;
  InputGradient<W> input;
};

template <class W>
__device__ Normalisation<W> normalisation_of(const BatchNormBackward& call, int64_t c) {
  return normalisation<W>(call.stats[c], call.stats[call.shape.channels + c],
                          read_channel(call.weight, c, 1.0), read_channel(call.bias, c, 0.0));
}
template <class W>
struct Group {
  W at[kGroup];
};

template <class W>
__device__ W invstd_of(const BatchNormBackward& call, int64_t c) {
  return scale_of_shrunk<W>(call.stats[call.shape.channels + c]);
}

// Writes a channel's parameter gradients, returns the coefficients of its input's.
template <class W>
__device__ InputGradient<W> finish_channel(const BatchNormBackward& call, int64_t c, TwoSums sums) {
  const double mean = call.stats[c], invstd = call.stats[call.shape.channels + c];
  const GradientSums s = {sums.first, sums.second};
  const InputGradient<W> g =
      input_gradient<W>(mean, invstd, read_channel(call.weight, c, 1.0), s,
                        static_cast<double>(call.shape.count()), call.training);
  const double offset = normalisation_offset(static_cast<double>(g.mean), mean, invstd);
  write_channel(call.grad_weight, c, weight_gradient(s, offset));
  write_channel(call.grad_bias, c, s.sum);
  return g;
}

// Gives the normalised elements of a group x, before the residual, one by one: of one channel, or
// from the coefficients, which need more registers and are loaded at the call.
template <class W>
__device__ auto normalised(const Normalisation<W>& n, const W (&x)[kGroup]) {
  return [&] { return [&](int e) { return difference(x[e], n.mean) * n.scale + n.shift; }; };
}
template <class W>
__device__ auto normalised(const Coefficients<W>& coefficients, const W (&x)[kGroup]) {
  return [&] {
    Group<W> z, v;
    coefficients(0, v.at);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z.at[e] = difference(x[e], v.at[e]);
    coefficients(1, v.at);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z.at[e] *= v.at[e];
    coefficients(2, v.at);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) z.at[e] += v.at[e];
    return [z](int e) { return z.at[e]; };
  };
}

// g of a group.
template <class T, class Normalised>
__device__ void gradient_before(const BatchNormBackward& call, const Place& place,
                                Wide<T> (&g)[kGroup], Normalised normalised) {
  using W = Wide<T>;
  load_group(static_cast<const T*>(call.grad_output) + place.at, place.count, g);
  with_activation(call.activation, [&](auto activation) {
    constexpr Activation kActivation = decltype(activation)::value;
    if constexpr (kActivation == Activation::None) {
      return;
    } else if constexpr (needs_input(kActivation)) {
      const auto z = normalised();
      W r[kGroup] = {};
      if (call.residual)
        load_group(static_cast<const T*>(call.residual) + place.at, place.count, r);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) g[e] *= derivative_at<kActivation, W>(z(e) + r[e]);
    } else {
      const W slope =
          kActivation == Activation::LeakyRelu ? static_cast<W>(call.negative_slope) : W(0);
      if (has_mask(kActivation) && call.mask) {
        const unsigned bits = call.mask[place.byte];
#pragma unroll
        for (int e = 0; e < kGroup; ++e)
          if (!(bits >> e & 1u)) g[e] = kActivation == Activation::LeakyRelu ? g[e] * slope : W(0);
        return;
      }
      W y[kGroup];
      load_group(static_cast<const T*>(call.output) + place.at, place.count, y);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        const W d = derivative_from_output<kActivation, W>(y[e], slope);
        g[e] = has_mask(kActivation) && d == W(0) ? W(0) : g[e] * d;  // not inf * 0
      }
    }
  });
#pragma unroll
  for (int e = 0; e < kGroup; ++e)
    if (e >= place.count) g[e] = W(0);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_grad_channel_sums(const __grid_constant__ BatchNormBackward call, double* slots) {
  using W = Wide<T>;
  const int64_t c = blockIdx.x % call.shape.channels;
  const Normalisation<W> n = normalisation_of<W>(call, c);
  const W invstd = invstd_of<W>(call, c);
  const auto terms = [&](const Place& place, int64_t, TwoSums& sums, auto) {
    W x[kGroup] = {}, g[kGroup];
    if (call.input) load_group(static_cast<const T*>(call.input) + place.at, place.count, x);
    gradient_before<T>(call, place, g, normalised(n, x));
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      x[e] = call.input && e < place.count ? difference(x[e], n.mean) * invstd : W(0);
    sums.add(g, g, x);
  };
  sum_channel_chunk<false>(call.shape, slots, terms);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_grad_row_sums(const __grid_constant__ BatchNormBackward call, double* slots,
                             const Wide<T>* coefficients) {
  using W = Wide<T>;
  const Runs runs(call.shape);
  const int64_t group = group_of_thread(runs);
  W mean[kGroup] = {}, invstd[kGroup] = {};
  Coefficients<W> of_group = {};
  if (group < runs.groups) {
    const int count = place_of(runs, 0, group).count;
    of_group = coefficients_of_group(runs, 0, group, count, coefficients);
    of_group(0, mean);
    of_group(3, invstd);
  }
  const auto terms = [&](const Place& place, W(&x)[kGroup], W(&y)[kGroup], W(&z)[kGroup]) {
    W in[kGroup] = {};
    if (call.input) load_group(static_cast<const T*>(call.input) + place.at, place.count, in);
    gradient_before<T>(call, place, x, normalised(of_group, in));
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      y[e] = x[e];
      z[e] = call.input ? difference(in[e], mean[e]) * invstd[e] : W(0);
    }
  };
  sum_row_chunk<W, false>(call.shape, slots, terms);
}

// What the sums need of each channel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_grad_prepare(const __grid_constant__ BatchNormBackward call, Wide<T>* coefficients) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t channels = call.shape.channels;
  if (c >= channels) return;
  const Normalisation<Wide<T>> n = normalisation_of<Wide<T>>(call, c);
  coefficients[c] = n.mean;
  coefficients[channels + c] = n.scale;
  coefficients[2 * channels + c] = n.shift;
  coefficients[3 * channels + c] = invstd_of<Wide<T>>(call, c);
}

// What the sweep needs of each channel, and its parameters' gradients.
template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_grad_finish(const __grid_constant__ BatchNormBackward call, const double* slots,
                           bool has_sums, Wide<T>* coefficients) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t channels = call.shape.channels;
  if (c >= channels) return;
  const TwoSums sums = has_sums ? sum_of_chunks(call.shape, slots, c) : TwoSums();
  const InputGradient<Wide<T>> g = finish_channel<Wide<T>>(call, c, sums);
  coefficients[4 * channels + c] = g.direct;
  coefficients[5 * channels + c] = g.slope;
  coefficients[6 * channels + c] = g.shift;
}

// Writes the gradients of a group; x holds its input, unless none is needed.
template <class T, class OfGroup>
__device__ void write_gradients(const BatchNormBackward& call, const Place& place,
                                const Wide<T> (&x)[kGroup], const OfGroup& coefficients,
                                Wide<T> (&g)[kGroup]) {
  using W = Wide<T>;
  if (call.grad_residual)
    store_group(static_cast<T*>(call.grad_residual) + place.at, place.count, g);
  if (!call.grad_input) return;
  W v[kGroup];
  coefficients(4, v);
#pragma unroll
  for (int e = 0; e < kGroup; ++e) g[e] *= v[e];
  if (call.training) {
    W h[kGroup], slope[kGroup];
    coefficients(0, v);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) h[e] = difference(x[e], v[e]);
    coefficients(3, v);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) h[e] *= v[e];
    coefficients(5, slope);
    coefficients(6, v);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) g[e] += h[e] * slope[e] + v[e];
  }
  store_group(static_cast<T*>(call.grad_input) + place.at, place.count, g);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_grad_apply(const __grid_constant__ BatchNormBackward call,
                          const Wide<T>* coefficients) {
  using W = Wide<T>;
  const Runs runs(call.shape);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= runs.rows * runs.groups) return;
  const int64_t row = i / runs.groups, group = i % runs.groups;
  const Place place = place_of(runs, row, group);
  const auto of_group = coefficients_of_group(runs, row, group, place.count, coefficients);
  W x[kGroup] = {}, g[kGroup];
  if (needs_input(call.activation) || (call.training && call.grad_input))
    load_group(static_cast<const T*>(call.input) + place.at, place.count, x);
  gradient_before<T>(call, place, g, normalised(of_group, x));
  write_gradients<T>(call, place, x, of_group, g);
}

// All of a channel in one block: input and g stay in registers between the sums and the sweep.
template <class T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_grad_small(const __grid_constant__ BatchNormBackward call, bool has_sums) {
  using W = Wide<T>;
  constexpr int kHeld = kHeldGroups<T>;
  const Runs runs(call.shape);
  const int64_t channel = blockIdx.x;
  const int64_t all = runs.rows / runs.channels * runs.groups;
  const Normalisation<W> n = normalisation_of<W>(call, channel);
  const W invstd = invstd_of<W>(call, channel);
  W x[kHeld][kGroup], g[kHeld][kGroup];
  TwoSums mine;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) x[k][e] = g[k][e] = W(0);
    const int64_t q = threadIdx.x + k * kThreads;
    if (q >= all) continue;
    const Place place = place_in_channel(runs, channel, q);
    if (call.input) load_group(static_cast<const T*>(call.input) + place.at, place.count, x[k]);
    gradient_before<T>(call, place, g[k], normalised(n, x[k]));
    if (!has_sums) continue;
    W h[kGroup];
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      h[e] = call.input && e < place.count ? difference(x[k][e], n.mean) * invstd : W(0);
    mine.add(g[k], g[k], h);
  }
  const TwoSums sums = block_sum(mine);
  __shared__ InputGradient<W> shared;
  if (threadIdx.x == 0) shared = finish_channel<W>(call, channel, sums);
  __syncthreads();
  const InputGradient<W> d = shared;
  const auto coefficients = [&](int k, W(&v)[kGroup]) {
    const W one = k == 0   ? d.mean
                  : k == 3 ? d.invstd
                  : k == 4 ? d.direct
                  : k == 5 ? d.slope
                           : d.shift;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) v[e] = one;
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t q = threadIdx.x + k * kThreads;
    if (q >= all) continue;
    write_gradients<T>(call, place_in_channel(runs, channel, q), x[k], coefficients, g[k]);
  }
}

}  // namespace

void batch_norm_backward(const BatchNormBackward& call, void* scratch, Stream stream) {
  with_type(call.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const BatchNormShape& shape = call.shape;
    const bool has_sums =
        call.grad_weight.data || call.grad_bias.data || (call.training && call.grad_input);
    if (fits_one_block(shape)) {
      batch_norm_grad_small<T><<<blocks_for(shape.channels), kThreads, 0, stream>>>(call, has_sums);
      check_launch("batch_norm_grad_small");
      return;
    }
    double* slots = slots_of(scratch);
    Wide<T>* coefficients = static_cast<Wide<T>*>(coefficients_of(shape, scratch));
    const unsigned channel_grid = blocks_for(channel_blocks(shape));
    batch_norm_grad_prepare<T><<<channel_grid, kThreads, 0, stream>>>(call, coefficients);
    check_launch("batch_norm_grad_prepare");
    if (has_sums) {
      const unsigned blocks = blocks_for(sum_blocks(shape));
      if (shape.inner == 1)
        batch_norm_grad_row_sums<T><<<blocks, kThreads, 0, stream>>>(call, slots, coefficients);
      else
        batch_norm_grad_channel_sums<T><<<blocks, kThreads, 0, stream>>>(call, slots);
      check_launch("batch_norm_grad_sums");
    }
    batch_norm_grad_finish<T>
        <<<channel_grid, kThreads, 0, stream>>>(call, slots, has_sums, coefficients);
    check_launch("batch_norm_grad_finish");
    if (call.grad_input || call.grad_residual) {
      batch_norm_grad_apply<T>
          <<<blocks_for(sweep_blocks(shape)), kThreads, 0, stream>>>(call, coefficients);
      check_launch("batch_norm_grad_apply");
    }
  });
}

}  // namespace gradfuse::cuda
