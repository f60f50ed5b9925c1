// Batch normalisation: the calls as kernels see them, and their twins. Torch-free.
#pragma once

#include "../math/activation.h"
#include "../math/batch_norm.h"
#include "../math/common.h"

namespace gradfuse {

// A tensor of batch normalisation: elements [outer, channels, inner], contiguous. inner is 1 for
// (N, C) and for the channels-last layouts, whose outer counts N and all positions; otherwise outer
// is N and inner counts the positions. A single channel is [1, 1, numel] in any layout. numel > 0.
struct BatchNormShape {
  int64_t outer;
  int64_t channels;
  int64_t inner;
  DType dtype;

  constexpr int64_t count() const { return outer * inner; }  // elements of a channel
  constexpr int64_t numel() const { return outer * channels * inner; }
  // The mask has a row of bytes for each run along the contiguous axis, bit i % 8 of byte i / 8 for
  // element i; the bits after the last element are 0.
  constexpr int64_t mask_rows() const { return inner == 1 ? outer : outer * channels; }
  constexpr int64_t mask_bytes_per_row() const { return ((inner == 1 ? channels : inner) + 7) / 8; }
};

// A vector [channels], contiguous; null data means there is none.
struct ChannelRef {
  void* data;
  DType dtype;
};

// What the normalised input is multiplied by: [outer] of the compute type, one number for each
// sample or row of positions. What has 0 is left out, whatever it holds. Null data: ones.
struct BranchScale {
  const void* data;
};

// output = act(((input - mean) * invstd * weight + bias) * scale + residual); with renormalisation
// weight and bias are those of a Correction.
struct BatchNormForward {
  BatchNormShape shape;
  const void* input;
  const void* residual;  // or null; may be input
  BranchScale scale;
  void* output;
  uint8_t* mask;  // [mask_rows, mask_bytes_per_row], or null; of relu, relu6, leaky_relu
  ChannelRef weight;
  ChannelRef bias;
  ChannelRef running_mean;  // read if !training; else updated, unless null
  ChannelRef running_var;
  bool training;  // the statistics are the batch's
  double momentum;  // of the running averages
  const double* momentum_value;  // [], in place of momentum, in the kernels' memory; or null
  ChannelRef drift;  // [kDriftRows, channels], which sets the momentum and is updated; or null
  bool renormalises;  // by running_mean and running_var before their update
  Renorm renorm;
  const int64_t* step;  // [], of the renormalisation's warm-up; null after it
  double eps;
  Activation activation;
  double negative_slope;
  void* stats;  // [3, channels] of the compute type, see KeptStatistics; [5, ...] if renormalises
  Tallies over_ranks;  // the statistics if training, in place of this batch's own
  double* tally;  // if not null, the call writes its own row of Tallies and nothing else
};

// The gradients of a forward call; a null gradient is not wanted. With g = grad_output * act'(z):
// grad_residual = g, and with g * scale in the place of g, grad_bias = sum of g, grad_weight = sum
// of g * normalised input, grad_input = weight * invstd * g, plus the terms of the batch statistics
// if training.
struct BatchNormBackward {
  BatchNormShape shape;
  const void* grad_output;
  const void* input;  // null if !training, no grad_weight wanted, !needs_input(activation)
  const void* residual;  // the forward's if needs_input(activation), else null
  const void* output;  // the forward's for act' in place of a mask, else null
  const uint8_t* mask;  // the forward's, else null
  ChannelRef weight;
  ChannelRef bias;  // used if needs_input(activation)
  BranchScale scale;
  const void* stats;  // [3 or 5, channels], the forward's
  bool renormalises;
  bool training;
  Activation activation;
  double negative_slope;
  void* grad_input;
  void* grad_residual;
  ChannelRef grad_weight;
  ChannelRef grad_bias;
  GhostSums ghosts;
  const double* means;  // [2, channels], GradientMeans over all ranks, in place of this batch's own
  double* sums;  // if not null, the call writes sums of what GradientMeans are of, and nothing else
};

namespace cpu {
// `count` calls of ghost batches, one after another, which differ in shape.outer by at most one
// sample; usually a single one.
void batch_norm_forward(const BatchNormForward* calls, int64_t count);
void batch_norm_backward(const BatchNormBackward* calls, int64_t count);
}  // namespace cpu
namespace cuda {
// `scratch`: batch_norm_scratch_bytes(call.shape), 256-byte aligned.
void batch_norm_forward(const BatchNormForward& call, void* scratch, Stream stream);
void batch_norm_backward(const BatchNormBackward& call, void* scratch, Stream stream);
int64_t batch_norm_scratch_bytes(const BatchNormShape& shape);  // of either direction
}  // namespace cuda

}  // namespace gradfuse
