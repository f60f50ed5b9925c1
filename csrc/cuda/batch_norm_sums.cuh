// Sums over channels for the batch norm kernels: sums that survive the range of float32, the chunks
// of a channel, and the order in which their sums are added.
#pragma once

#include "batch_norm_groups.cuh"
#include "reduce.cuh"

namespace gradfuse::cuda {

// Whether a sum of a few terms in float32 is right: it has not overflowed.
template <class W>
__device__ bool terms_fit(W sum) {
  return fabsf(sum) < W(INFINITY);  // not if it is NaN
}
// The same for products: nor does what underflows count, or all are 0 (`any` is not).
template <class W>
__device__ bool products_fit(W sum, bool any) {
  return terms_fit(sum) && (fabsf(sum) > W(1e-37f) || !any);
}

// Sums of terms and of products, in float64. A group's float32 terms are first summed in float32,
// which is 64 times faster on consumer GPUs, unless that loses what float64 keeps. Neither sum
// depends on the other.
struct TwoSums {
  double first = 0.0, second = 0.0;

  __device__ TwoSums operator+(const TwoSums& other) const {
    TwoSums s;
    s.first = first + other.first;
    s.second = second + other.second;
    return s;
  }

  template <class W>
  __device__ void add(const W (&x)[kGroup], const W (&y)[kGroup], const W (&z)[kGroup]) {
    bool first_fits = false, second_fits = false;
    if constexpr (sizeof(W) == 4) {
      W a = 0, b = 0;
      bool any = false;
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        a += x[e];
        b += y[e] * z[e];
        any = any || (y[e] != W(0) && z[e] != W(0));
      }
      first_fits = terms_fit(a);
      second_fits = products_fit(b, any);
      if (first_fits) first += a;
      if (second_fits) second += b;
    }
    if (first_fits && second_fits) return;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      if (!first_fits) first += x[e];
      if (!second_fits) second += static_cast<double>(y[e]) * z[e];
    }
  }
};

// The same for a thread's eight columns over a few rows.
template <class W>
struct ColumnSums {
  W first[kGroup] = {}, second[kGroup] = {};
  unsigned any = 0;  // a bit for each column

  __device__ void add(const W (&x)[kGroup], const W (&y)[kGroup], const W (&z)[kGroup]) {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      first[e] += x[e];
      second[e] += y[e] * z[e];
      if (y[e] != W(0) && z[e] != W(0)) any |= 1u << e;
    }
  }
  __device__ bool second_fits() const {
    bool all = true;
#pragma unroll
    for (int e = 0; e < kGroup; ++e) all = all && products_fit(second[e], (any >> e & 1u) != 0);
    return all;
  }
};

// Whether sums of differences from a channel's first element need float64: one overflowed, or the
// squares cancel because that element lies more than 8 standard deviations from the mean.
__device__ inline bool left_range(const TwoSums& s, double elements) {
  return !isfinite(s.first) || !isfinite(s.second) ||
         65.0 * s.first * s.first > 64.0 * s.second * elements;
}
template <class W>
constexpr bool kLeavesRange = sizeof(W) == 4;

// Blocks on a multiprocessor that kernels ask ptxas for: 768 threads, of 80 registers. Left alone,
// it spills some for the sake of more threads, which these kernels do not need.
constexpr int kBlocks = 768 / kThreads;

// Sums over the block, in a fixed order. Assumes blockDim.x == kBlock. Result valid in thread 0.
template <int kBlock>
__device__ TwoSums block_sum(const TwoSums& mine) {
  return block_reduce<kBlock, cub::BLOCK_REDUCE_RAKING>(mine, Plus());
}

// Groups of each of kStreams tensors that a thread loads before it uses the first: at least kBytes
// in all.
template <class T, int kStreams, int kBytes>
constexpr int kInFlight = divided_up(kBytes, kStreams * sizeof(T) * kGroup);

// If channels are contiguous, a block sums a tile of columns: threads form `lines` lines of `width`
// groups, with as few threads to spare as there can be.
constexpr int kWidestTile = 32;
constexpr int kTileColumns = kWidestTile * kGroup;
static_assert(kTileColumns == kThreads, "a thread for each channel of a tile");
struct Tile {
  int64_t tiles;  // of a row
  int width;  // groups
  int lines;

  explicit __host__ __device__ Tile(const Runs& runs)
      : tiles(divided_up(runs.groups, kWidestTile)),
        width(static_cast<int>(divided_up(runs.groups, tiles))),
        lines(kThreads / width) {}
};
// A thread adds its columns in float32, over so many rows and then over so many such sums.
constexpr int kRowsAtOnce = 8;
constexpr int kMostSums = 8;

// A channel's groups are cut into chunks, each summed by one block. If channels are contiguous,
// rows are cut instead, and a block sums a tile of a chunk. The sums lie in slots [chunk][2]
// [channels] and are added in a fixed order. Chunks depend on sizes alone: each ends with a
// reduction over its block, so they grow while that leaves kEnoughBlocks.
constexpr int64_t kEnoughBlocks = 1024;  // 4 or more for each multiprocessor of any GPU

struct Chunks {
  int64_t count;
  int64_t size;  // groups, or rows

  explicit __host__ __device__ Chunks(const BatchNormShape& s) {
    const Runs runs(s);
    const Tile tile(runs);
    const int64_t all = runs.by_row ? runs.rows : runs.groups_of_channel();
    const int64_t beside = runs.by_row ? tile.tiles : runs.channels;  // blocks of a chunk
    const int64_t turn = runs.by_row ? tile.lines : kThreads;
    const int64_t least = runs.by_row ? kRowsAtOnce : 4,
                  most = runs.by_row ? kRowsAtOnce * kMostSums : 16;
    size = turn * least;
    while (size < turn * most && beside * divided_up(all, size * 2) >= kEnoughBlocks) size *= 2;
    if (!runs.by_row && size < divided_up(all, kEnoughBlocks))
      size = divided_up(all, kEnoughBlocks);
    count = divided_up(all, size);
  }
};

// Elements of a channel before its group q.
__device__ inline int64_t elements_before(const Runs& runs, int64_t q) {
  return q / runs.groups * runs.length + q % runs.groups * kGroup;
}

// Loads kAtOnce groups by load(place) for each thread and calls add(loaded, count, TwoSums&, wide)
// with each of them, over the block's chunk of a channel, and writes the sums to the slots. wide is
// false_type; if kAgain and the sums left their range, they are repeated with true_type. Grid:
// (channels, chunks), channels fastest.
template <int kAtOnce, bool kAgain, class Load, class Add>
__device__ void sum_channel_chunk(const BatchNormShape& shape, double* slots, Load load, Add add) {
  const Runs runs(shape);
  const Chunks chunks(shape);
  const int64_t channel = blockIdx.x % runs.channels, chunk = blockIdx.x / runs.channels;
  const int64_t all = runs.groups_of_channel();
  const int64_t first = chunk * chunks.size;
  const int64_t end = first + chunks.size < all ? first + chunks.size : all;
  const int64_t first_of_warp = first + threadIdx.x / kWarp * kWarp;
  const auto chunk_sum = [&](auto wide) {
    TwoSums mine;
    for (int64_t q = first_of_warp; q < end; q += kAtOnce * kThreads) {
      decltype(load(Place())) loaded[kAtOnce];
      int count[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const Place place =
            place_in_channel(runs, channel, q + threadIdx.x % kWarp + u * kThreads, end);
        count[u] = place.count;
        loaded[u] = load(place);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) add(loaded[u], count[u], mine, wide);
    }
    return block_sum<kThreads>(mine);
  };
  TwoSums sum = chunk_sum(std::false_type());
  if constexpr (kAgain) {
    const int64_t elements = elements_before(runs, end) - elements_before(runs, first);
    const bool again = threadIdx.x == 0 && left_range(sum, static_cast<double>(elements));
    if (__syncthreads_or(again)) sum = chunk_sum(std::true_type());
  }
  if (threadIdx.x == 0) {
    slots[chunk * 2 * runs.channels + channel] = sum.first;
    slots[(chunk * 2 + 1) * runs.channels + channel] = sum.second;
  }
}

// A thread's place in the tile of its block. Grid: (tiles, chunks), tiles fastest.
struct InTile {
  Tile tile;
  int column;  // group of the tile
  int line;  // tile.lines or more if the thread has none
  int64_t group;

  explicit __device__ InTile(const Runs& runs)
      : tile(runs),
        column(threadIdx.x % tile.width),
        line(threadIdx.x / tile.width),
        group(blockIdx.x % tile.tiles * tile.width + column) {}

  __device__ int64_t first_channel() const { return (group - column) * kGroup; }  // of the tile
};

// Adds the lines' sums of each column: thread t holds that of column (e, group of the tile) = (t /
// width, t % width), the others 0. `shared` has room for a number of each thread's columns.
template <class W>
__device__ double sum_of_lines(const Tile& tile, const InTile& at, double* shared,
                               const W (&mine)[kGroup]) {
  const int columns = tile.width * kGroup;
  const int parts = kThreads / columns, lines = divided_up(tile.lines, parts);
  const int part = threadIdx.x / columns, column = threadIdx.x % columns;
  __syncthreads();
  if (at.line < tile.lines)
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      shared[at.line * columns + e * tile.width + at.column] = mine[e];
  __syncthreads();
  double sum = 0.0;
  if (part < parts)
    for (int l = part * lines; l < (part + 1) * lines && l < tile.lines; ++l)
      sum += shared[l * columns + column];
  __syncthreads();
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (part > 0) return 0.0;
  for (int p = 1; p < parts; ++p) sum += shared[p * columns + column];
  return sum;
}

// The sums if channels are contiguous: terms(loaded, x, y, z) yields a group's eight terms x and
// products y * z; they are added by column, in float32 over kRowsAtOnce rows. What does not fit
// float32 there is added again in float64; so are all if kAgain and the sums left their range, and
// then of terms in float64.
template <class W, int kAtOnce, bool kAgain, class Load, class Terms>
__device__ void sum_row_chunk(const BatchNormShape& shape, double* slots, Load load, Terms terms) {
  const Runs runs(shape);
  const Chunks chunks(shape);
  const InTile at(runs);
  const Tile& tile = at.tile;
  const int64_t chunk = blockIdx.x / tile.tiles;
  const int64_t first = chunk * chunks.size;
  const int64_t end = first + chunks.size < runs.rows ? first + chunks.size : runs.rows;
  const bool has_column = at.line < tile.lines && at.group < runs.groups;
  // The two sums are reduced one after the other: 16 KiB hold one of them for every column.
  __shared__ double shared[kThreads * kGroup];

  // Calls use(loaded) for the thread's group in each row of `lines` lines from `from` on.
  const auto for_each_row = [&](int64_t from, int lines, auto at_once, auto use) {
    constexpr int kRows = decltype(at_once)::value;
#pragma unroll 1
    for (int r = 0; r < lines && from < end; r += kRows, from += kRows * tile.lines) {
      decltype(load(Place())) loaded[kRows];
      bool exists[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t row = from + u * tile.lines + at.line;
        exists[u] = has_column && row < end;
        loaded[u] = load(exists[u] ? place_of(runs, row, at.group) : Place());
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u)
        if (exists[u]) use(loaded[u]);
    }
  };
  const auto over_lines = [&](const auto& a, const auto& b) {
    TwoSums sums;
    sums.first = sum_of_lines(tile, at, shared, a);
    sums.second = sum_of_lines(tile, at, shared, b);
    return sums;
  };
  const auto in_float64 = [&](auto type) {
    using V = decltype(type);
    double a[kGroup] = {}, b[kGroup] = {};
    for (int64_t from = first; from < end; from += tile.lines)
      for_each_row(from, 1, std::integral_constant<int, 1>(), [&](const auto& loaded) {
        V x[kGroup], y[kGroup], z[kGroup];
        terms(loaded, x, y, z);
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          a[e] += x[e];
          b[e] += static_cast<double>(y[e]) * z[e];
        }
      });
    return over_lines(a, b);
  };
  TwoSums sums;
  if constexpr (sizeof(W) == 8) {
    sums = in_float64(W());
  } else {
    W a[kGroup] = {}, b[kGroup] = {};
    bool first_fits = true, second_fits = true;
    for (int64_t from = first; from < end; from += kRowsAtOnce * tile.lines) {
      ColumnSums<W> rows;
      for_each_row(from, kRowsAtOnce, std::integral_constant<int, kAtOnce>(),
                   [&](const auto& loaded) {
                     W x[kGroup], y[kGroup], z[kGroup];
                     terms(loaded, x, y, z);
                     rows.add(x, y, z);
                   });
      second_fits = second_fits && rows.second_fits();
#pragma unroll
      for (int e = 0; e < kGroup; ++e) a[e] += rows.first[e], b[e] += rows.second[e];
    }
    // What has overflowed stays infinite or becomes NaN; sums that fit may overflow together.
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      first_fits = first_fits && terms_fit(a[e]);
      second_fits = second_fits && terms_fit(b[e]);
    }
    sums = over_lines(a, b);
    if (kAgain && left_range(sums, static_cast<double>(end - first)))
      first_fits = second_fits = false;
    const bool first_again = __syncthreads_or(!first_fits);
    const bool second_again = __syncthreads_or(!second_fits);
    if (first_again || second_again) {
      const TwoSums wide = in_float64(std::conditional_t<kAgain, double, W>());
      if (first_again) sums.first = wide.first;
      if (second_again) sums.second = wide.second;
    }
  }
  const int64_t channel = at.group * kGroup + at.line;
  if (at.line >= kGroup || channel >= runs.channels) return;
  slots[chunk * 2 * runs.channels + channel] = sums.first;
  slots[(chunk * 2 + 1) * runs.channels + channel] = sums.second;
}

// The chunks' sums of a channel, by a warp: every lane adds each 32nd chunk, then the lanes' sums
// are added in a tree. Every lane has the result.
__device__ inline TwoSums sum_of_chunks(const BatchNormShape& shape, const double* slots,
                                        int64_t channel) {
  TwoSums s;
  const int64_t count = Chunks(shape).count;
  for (int64_t k = threadIdx.x % kWarp; k < count; k += kWarp) {
    s.first += slots[k * 2 * shape.channels + channel];
    s.second += slots[(k * 2 + 1) * shape.channels + channel];
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    s.first += __shfl_xor_sync(kWholeWarp, s.first, distance);
    s.second += __shfl_xor_sync(kWholeWarp, s.second, distance);
  }
  return s;
}

inline int64_t sum_blocks(const BatchNormShape& s) {
  const Runs runs(s);
  return Chunks(s).count * (runs.by_row ? Tile(runs).tiles : runs.channels);
}

// A warp for each channel.
inline int64_t channel_blocks(const BatchNormShape& s) {
  return divided_up(s.channels, kThreads / kWarp);
}
__device__ inline int64_t channel_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
}

// Groups that a thread of one block keeps in registers between the sums and the sweep, and the
// blocks for that: a smaller one leaves room for more of them beside it.
template <class T>
constexpr int kHeldGroups = sizeof(Wide<T>) == 8 ? 1 : 4;
constexpr int kSmallBlock = 64;

inline bool fits_block(const BatchNormShape& s, int threads) {
  const Runs runs(s);
  const int held = s.dtype == DType::Double ? kHeldGroups<double> : kHeldGroups<float>;
  return !runs.by_row && runs.groups_of_channel() <= threads * held;
}

// Scratch: the slots, then the coefficients [kBackwardCoefficients][channels] in the compute type.
inline double* slots_of(void* scratch) { return static_cast<double*>(scratch); }
inline void* coefficients_of(const BatchNormShape& s, void* scratch) {
  return static_cast<double*>(scratch) + Chunks(s).count * 2 * s.channels;
}

}  // namespace gradfuse::cuda
