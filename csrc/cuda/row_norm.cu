// Layer norm and RMS norm of residual + dropout(input), forward and backward.
//
// One launch forward: reads the addends, writes sum and output. Two backward: the first reads sum
// and gradients, writes those of the addends and the sums for weight and bias of a block's rows;
// the second adds these. A row that its team can hold stays in registers between the sweeps; others
// are read again.
//
// Assumes element-aligned data; uses 16-byte accesses where all rows begin at 16-byte boundaries.
#include "row_norm_rows.cuh"

namespace gradfuse::cuda {
namespace {

constexpr int kForwardBlock = 256;
// Threads of a block of the backward. In float64 they need twice the registers.
constexpr int backward_block(DType dtype) { return dtype == DType::Double ? 256 : 512; }
template <class T>
constexpr int kBackwardBlock = sizeof(T) == 8 ? 256 : 512;
// Groups of a thread.
template <class T>
constexpr int kForwardHeld = sizeof(T) == 8 ? 2 : 4;
constexpr int kBackwardHeld = 1;

// Calls f(k) for each of a thread's groups, in all lanes of a team alike.
template <int kHeld, class F>
__device__ void for_each_group(const Team& team, int64_t groups, F f) {
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
      if (static_cast<int64_t>(k) * team.size < groups) f(k);
  } else {
    for (int64_t k = 0; k * team.size < groups; ++k) f(k);
  }
}

// Adds the sums of v * scale - shift and its square over a thread's groups. `values(k, v)` gives a
// group's elements, `place(k)` its place.
template <int kHeld, class W, class Values, class PlaceOf>
__device__ RowMoments moments_about(const Team& team, int64_t groups, W scale, W shift,
                                    Values values, PlaceOf place) {
  RowMoments mine;
  for_each_group<kHeld>(team, groups, [&](auto k) {
    W v[kGroup], sum = 0, squares = 0;
    values(k, v);
    const int count = place(k).count;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      const W d = e < count ? v[e] * scale - shift : W(0);
      sum += d;
      squares += d * d;
    }
    mine.sum += sum;
    mine.squares += squares;
  });
  return mine;
}

// kHeld: groups that a thread keeps in registers; 0 if rows are wider.
template <class T, int kHeld>
__global__ void __launch_bounds__(kForwardBlock, 2)
    row_norm_forward_rows(const __grid_constant__ RowNormForward call, int team_size,
                          double share) {
  using W = Wide<T>;
  constexpr int kBlock = kForwardBlock;
  const RowNormShape& shape = call.shape;
  const Team team(team_size);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kBlock / team.size) + team.index;
  const int64_t groups = divided_up(shape.width, kGroup);
  const MixedGroups<T, kBlock> memory(shape.width);
  const RowAddends<T, kBlock> addends(call.addends, shape, memory, row);
  const auto place = [&](int64_t k) { return place_in_row(shape, row, team.lane + k * team.size); };

  W held[kHeld > 0 ? kHeld : 1][kGroup];
  const auto values = [&](auto k, W(&v)[kGroup]) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int e = 0; e < kGroup; ++e) v[e] = held[k][e];
    } else {
      addends.combine(addends.load(place(k)), place(k), v);
    }
  };
  if constexpr (kHeld > 0) {
    typename RowAddends<T, kBlock>::Loaded loaded[kHeld];
    for_each_group<kHeld>(team, groups, [&](int k) { loaded[k] = addends.load(place(k)); });
    for_each_group<kHeld>(team, groups,
                          [&](int k) { addends.combine(loaded[k], place(k), held[k]); });
  }
  if (call.sum)
    for_each_group<kHeld>(team, groups, [&](auto k) {
      W v[kGroup];
      values(k, v);
      memory.store(call.sum, addends.sum_is_own, place(k), v);
    });

  if (!call.output) return;

  const auto about = [&](W scale, W shift) {
    return over_team<kBlock>(moments_about<kHeld>(team, groups, scale, shift, values, place), team,
                             AddMoments());
  };
  const auto sum_of = [&](W scale) {
    double mine = 0.0;
    for_each_group<kHeld>(team, groups, [&](auto k) {
      W v[kGroup], sum = 0;
      values(k, v);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) sum += e < place(k).count ? v[e] * scale : W(0);
      mine += sum;
    });
    return over_team<kBlock>(mine, team, Add());
  };
  double scale = 1.0;
  W shift = 0;
  if (call.centred) shift = static_cast<W>(sum_of(W(1)) * share);
  RowMoments sums = about(W(1), shift);
  const bool leaves = leaves_range<W>(call.centred ? sums.sum : 0.0, sums.squares, share, call.eps);
  if (any_needs(leaves, team)) {
    double largest = 0.0;
    for_each_group<kHeld>(team, groups, [&](auto k) {
      W v[kGroup];
      values(k, v);
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
        if (e < place(k).count) largest = fmax(largest, fabs(static_cast<double>(v[e])));
    });
    const double new_scale = scale_of_row<W>(over_team<kBlock>(largest, team, Larger()), call.eps);
    const W narrow_scale = static_cast<W>(new_scale);
    W new_shift = 0;
    if (call.centred) new_shift = static_cast<W>(sum_of(narrow_scale) * share);
    const RowMoments again = about(narrow_scale, new_shift);
    if (leaves) sums = again, scale = new_scale, shift = new_shift;
  }
  RowNormalisation<W> n = {};
  if (row < shape.rows) {
    const RowStatistics s = row_statistics(static_cast<double>(shift), sums.sum, sums.squares,
                                           share, call.eps, scale, call.centred);
    W kept[kKeptOfRow];
    n = keep_row<W>(kept, 0, s);
    if (team.lane < kKeptOfRow)
      static_cast<W*>(call.stats)[row * kKeptOfRow + team.lane] = kept[team.lane];
  }
  for_each_group<kHeld>(team, groups, [&](auto k) {
    const Place at = place(k);
    W v[kGroup], weight[kGroup], bias[kGroup];
    values(k, v);
    const int64_t first = (team.lane + static_cast<int64_t>(k) * team.size) * kGroup;
    read_vector(call.weight, first, at.count, W(1), static_cast<W>(call.weight_offset), weight);
    read_vector(call.bias, first, at.count, W(0), W(0), bias);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) v[e] = normalised(v[e], n) * weight[e] + bias[e];
    memory.own.store(call.output, at, v);
  });
}

// The rows of a block of the backward, which depend on sizes alone. Each team takes every
// teams-th of them.
struct BackwardRows {
  int64_t of_block, blocks;

  explicit BackwardRows(const RowNormShape& shape, int team_size) {
    constexpr int64_t kLeast = 8, kMost = 64, kBlocks = 512;  // rows of a team
    const int64_t teams = backward_block(shape.dtype) / team_size;
    int64_t rows = divided_up(shape.rows, teams * kBlocks);
    rows = rows < kLeast ? kLeast : rows;
    if (rows > kMost) rows = kMost;
    of_block = teams * rows;
    blocks = divided_up(shape.rows, of_block);
  }
};
int backward_team(const RowNormShape& shape) {
  return team_threads(shape.width, kBackwardHeld, backward_block(shape.dtype));
}

// partial: [blocks][2][width], the gradients of bias and weight over a block's rows.
template <class T, int kHeld>
__global__ void __launch_bounds__(kBackwardBlock<T>, 1)
    row_norm_backward_rows(const __grid_constant__ RowNormBackward call, int team_size,
                           int64_t rows_of_block, double share, Wide<T>* partial) {
  using W = Wide<T>;
  constexpr int kBlock = kBackwardBlock<T>;
  constexpr int kArray = kHeld > 0 ? kHeld : 1;
  const RowNormShape& shape = call.shape;
  const Team team(team_size);
  const int teams = kBlock / team.size;
  const int64_t groups = divided_up(shape.width, kGroup);
  const MixedGroups<T, kBlock> memory(shape.width);
  const bool sum_is_own = shape.sum_dtype == shape.dtype;
  const bool residual_is_own = shape.residual_dtype == shape.dtype;
  // Of several teams in a block, each has its own sums until the end.
  W of_bias[kArray][kGroup] = {}, of_weight[kArray][kGroup] = {};
  W* const slot = partial + static_cast<int64_t>(blockIdx.x) * 2 * shape.width;
  const auto group = [&](auto k) { return team.lane + static_cast<int64_t>(k) * team.size; };

  for (int64_t i = 0; i < rows_of_block; i += teams) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_of_block + i + team.index;
    const RowAddends<T, kBlock> addends(call.addends, shape, memory, row);
    const auto place = [&](auto k) { return place_in_row(shape, row, group(k)); };
    RowNormalisation<W> n = {};
    if (call.grad_output && row < shape.rows) n = row_normalisation<W>(call.stats, row);

    // A group of the gradient g of the normalised elements h, and of h.
    const auto combine = [&](const Packed<T>& g_out, const Mixed<T>& kept, auto k, W(&g)[kGroup],
                             W(&h)[kGroup]) {
      const Place at = place(k);
      if (call.sum) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e) h[e] = kept.get(e, sum_is_own);
      } else {
        addends.combine(addends.load(at), at, h);
      }
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        h[e] = e < at.count ? normalised(h[e], n) : W(0);
        g[e] = g_out[e];
      }
    };
    const auto weighted = [&](auto k, W(&g)[kGroup]) {
      W weight[kGroup];
      read_vector(call.weight, group(k) * kGroup, place(k).count, W(1),
                  static_cast<W>(call.weight_offset), weight);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) g[e] *= weight[e];
    };
    const auto load_kept = [&](auto k) {
      return call.sum ? memory.load(call.sum, sum_is_own, place(k)) : Mixed<T>();
    };
    // The second sweep of a group: adds the gradient of the sum to d, writes those of the addends.
    const auto write = [&](const Place& at, const Mixed<T>& more, W(&d)[kGroup]) {
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
        if (call.grad_sum) d[e] += more.get(e, sum_is_own);
      if (call.grad_residual) memory.store(call.grad_residual, residual_is_own, at, d);
      if (!call.grad_input) return;
      const unsigned stays = addends.kept(at);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        const W f = addends.factor_of_element(stays, e);
        d[e] = f == W(0) ? W(0) : d[e] * f;
      }
      memory.own.store(call.grad_input, at, d);
    };
    if (!call.grad_output) {
      for_each_group<kHeld>(team, groups, [&](auto k) {
        W d[kGroup] = {};
        write(place(k), memory.load(call.grad_sum, sum_is_own, place(k)), d);
      });
      continue;
    }
    W held_g[kArray][kGroup], held_h[kArray][kGroup];
    if constexpr (kHeld > 0) {
      Packed<T> g_out[kHeld];
      Mixed<T> kept[kHeld];
      for_each_group<kHeld>(team, groups, [&](int k) {
        g_out[k] = memory.own.load(call.grad_output, place(k));
        kept[k] = load_kept(k);
      });
      for_each_group<kHeld>(team, groups,
                            [&](int k) { combine(g_out[k], kept[k], k, held_g[k], held_h[k]); });
    }
    const auto values = [&](auto k, W(&g)[kGroup], W(&h)[kGroup]) {
      if constexpr (kHeld > 0) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e) g[e] = held_g[k][e], h[e] = held_h[k][e];
      } else {
        combine(memory.own.load(call.grad_output, place(k)), load_kept(k), k, g, h);
      }
    };

    for_each_group<kHeld>(team, groups, [&](auto k) {
      W g[kGroup], h[kGroup];
      values(k, g, h);
      if constexpr (kHeld > 0) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          of_bias[k][e] += g[e];
          of_weight[k][e] += g[e] * h[e];
        }
      } else {
        const int64_t first = group(k) * kGroup;
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          if (e >= place(k).count) continue;
          W* const bias = slot + first + e;
          W* const weight = bias + shape.width;
          *bias = (i ? *bias : W(0)) + g[e];
          *weight = (i ? *weight : W(0)) + g[e] * h[e];
        }
      }
    });
    const auto sums_of = [&](auto wide) {
      using V = std::conditional_t<decltype(wide)::value, double, W>;
      RowMoments mine;
      for_each_group<kHeld>(team, groups, [&](auto k) {
        W g[kGroup], h[kGroup];
        values(k, g, h);
        weighted(k, g);
        V sum = 0, dot = 0;
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          sum += static_cast<V>(g[e]);
          dot += static_cast<V>(g[e]) * static_cast<V>(h[e]);
        }
        mine.sum += sum;
        mine.squares += dot;
      });
      return over_team<kBlock>(mine, team, AddMoments());
    };
    RowMoments sums = sums_of(std::false_type());
    if constexpr (sizeof(W) == 4) {
      const bool overflows = !isfinite(sums.sum) || !isfinite(sums.squares);
      if (any_needs(overflows, team)) {
        const RowMoments again = sums_of(std::true_type());
        if (overflows) sums = again;
      }
    }
    if (!call.grad_input && !call.grad_residual) continue;
    const RowGradient<W> r = row_gradient<W>(sums.sum, sums.squares, share, call.centred);
    for_each_group<kHeld>(team, groups, [&](auto k) {
      const Place at = place(k);
      Mixed<T> more;
      if (call.grad_sum) more = memory.load(call.grad_sum, sum_is_own, at);
      W g[kGroup], h[kGroup], d[kGroup];
      values(k, g, h);
      weighted(k, g);
#pragma unroll
      for (int e = 0; e < kGroup; ++e)
        d[e] = (g[e] - (h[e] * r.slope + r.mean_gradient)) * n.inverse * n.scale;
      write(at, more, d);
    });
  }

  // Adds the sums of the block's teams, in order.
  if constexpr (kHeld > 0) {
    __shared__ W of_threads[kBlock];
    for_each_group<kHeld>(team, groups, [&](int k) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          __syncthreads();
          of_threads[threadIdx.x] = which ? of_weight[k][e] : of_bias[k][e];
          __syncthreads();
          const int64_t column = group(k) * kGroup + e;
          if (team.index != 0 || column >= shape.width) continue;
          W sum = 0;
          for (int t = 0; t < teams; ++t) sum += of_threads[t * team.size + team.lane];
          slot[which * shape.width + column] = sum;
        }
      }
    });
  }
}

// Adds the blocks' sums: a warp's lanes have a column each, the block's warps every so many slots.
constexpr int kMergeWarps = 8;
template <class W>
__global__ void __launch_bounds__(kMergeWarps* kWarp)
    row_norm_merge(const __grid_constant__ RowNormBackward call, const W* partial, int64_t blocks) {
  const int64_t width = call.shape.width;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;  // in [2][width]
  __shared__ double of_warps[kMergeWarps][kWarp];
  double sum = 0.0;
  if (i < 2 * width)
    for (int64_t b = warp; b < blocks; b += kMergeWarps) sum += partial[b * 2 * width + i];
  of_warps[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= 2 * width) return;
  for (int w = 1; w < kMergeWarps; ++w) sum += of_warps[w][lane];
  const RowVector& to = i < width ? call.grad_bias : call.grad_weight;
  if (!to.data) return;
  with_type(to.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    static_cast<T*>(to.data)[i % width] = Element<T>::narrow(static_cast<Wide<T>>(sum));
  });
}

}  // namespace

int64_t row_norm_scratch_bytes(const RowNormShape& shape) {
  const int64_t bytes = shape.dtype == DType::Double ? 8 : 4;
  return BackwardRows(shape, backward_team(shape)).blocks * 2 * shape.width * bytes;
}

void row_norm_forward(const RowNormForward& call, Stream stream) {
  const RowNormShape& shape = call.shape;
  const double share = 1.0 / static_cast<double>(shape.width);
  with_type(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kHeld = kForwardHeld<T>;
    const int team = team_threads(shape.width, kHeld, kForwardBlock);
    const unsigned blocks = row_blocks(divided_up(shape.rows, kForwardBlock / team));
    if (fits_team(shape.width, kHeld, team))
      row_norm_forward_rows<T, kHeld><<<blocks, kForwardBlock, 0, stream>>>(call, team, share);
    else
      row_norm_forward_rows<T, 0><<<blocks, kForwardBlock, 0, stream>>>(call, team, share);
    check_launch("row_norm_forward_rows");
  });
}

void row_norm_backward(const RowNormBackward& call, void* scratch, Stream stream) {
  const RowNormShape& shape = call.shape;
  const int team = backward_team(shape);
  const BackwardRows rows(shape, team);
  const double share = 1.0 / static_cast<double>(shape.width);
  const unsigned blocks = row_blocks(rows.blocks);
  with_type(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using W = Wide<T>;
    W* const partial = static_cast<W*>(scratch);
    if (fits_team(shape.width, kBackwardHeld, team))
      row_norm_backward_rows<T, kBackwardHeld>
          <<<blocks, kBackwardBlock<T>, 0, stream>>>(call, team, rows.of_block, share, partial);
    else
      row_norm_backward_rows<T, 0>
          <<<blocks, kBackwardBlock<T>, 0, stream>>>(call, team, rows.of_block, share, partial);
    check_launch("row_norm_backward_rows");
    if (!call.grad_weight.data && !call.grad_bias.data) return;
    row_norm_merge<W>
        <<<row_blocks(divided_up(2 * shape.width, kWarp)), kMergeWarps * kWarp, 0, stream>>>(
            call, partial, rows.blocks);
    check_launch("row_norm_merge");
  });
}

}  // namespace gradfuse::cuda
