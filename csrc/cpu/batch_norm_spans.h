// Parts of a tensor that the batch normalisation kernels sum and sweep. Torch-free.
#pragma once

#include <cstdint>

namespace gradfuse::cpu {

// A part of a tensor [outer, channels, inner]. In the channels-last layouts (inner == 1) it is some
// columns of some rows.
struct Span {
  int64_t outer, outer_end;
  int64_t channel, channel_end;
  int64_t inner, inner_end;  // inner % 8 == 0, so that two spans share no byte of the mask
  bool past_caches;  // whether results are stored past the caches
};

// Maximum channels of a span if inner > 1, and if inner == 1.
constexpr int64_t kMostChannels = 64;
constexpr int64_t kMostColumns = 1024;

// Per-channel vectors lie in one array, `stride` elements apart, from the span's first channel on.
// `stride` is a multiple of kChannelPadding, and the padding of a vector may be read. Coefficients
// have the compute type: double for Double, else float.
constexpr int64_t kChannelPadding = 32;

}  // namespace gradfuse::cpu
