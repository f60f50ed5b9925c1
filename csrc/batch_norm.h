// The torch-facing functions of batch normalisation: check, bring every tensor into one layout,
// allocate the results, pick the device, call the kernels. They need no GIL.
#pragma once

#include <ATen/core/Tensor.h>

#include "math/activations.h"
#include "memory.h"

namespace gradfuse {

struct BatchNormOptions {
  bool training;  // normalise with the batch's statistics
  double eps;
  Activation activation;
  double negative_slope;
};

// What a forward call yields. The output has the input's strides, or those of the memory format
// that the input is nearest to where it has gaps.
struct BatchNormResult {
  at::Tensor output;
  at::Tensor mask;   // uint8 [rows, bytes], as BatchNormShape says; [0] where none was asked for
  at::Tensor stats;  // [3, channels] float64: mean, inverse deviation, unbiased variance
};

// act(batch_norm(input) + residual). Updates the running statistics if training and they are given.
// Throws TypeError or std::invalid_argument, nothing written, on what the kernels cannot take.
BatchNormResult batch_norm_forward(const at::Tensor& input,         // [N, C, ...]
                                   const MaybeTensor& residual,     // like input, any strides
                                   const MaybeTensor& weight,       // [C], as all below
                                   const MaybeTensor& bias, const MaybeTensor& running_mean,
                                   const MaybeTensor& running_var, double momentum,
                                   const MaybeTensor& momentum_value,  // [], in place of momentum
                                   const BatchNormOptions& options, bool wants_mask);

struct BatchNormGradients {
  at::Tensor input, residual, weight, bias;  // undefined where not wanted
};
struct WantedGradients {
  bool input, residual, weight, bias;
};

BatchNormGradients batch_norm_backward(const at::Tensor& grad_output,  // [N, C, ...], any strides
                                       const MaybeTensor& input, const MaybeTensor& residual,
                                       const MaybeTensor& output, const MaybeTensor& mask,
                                       const MaybeTensor& weight, const MaybeTensor& bias,
                                       const at::Tensor& stats,  // [3, C]
                                       bool channels_last,  // the forward's layout
                                       const BatchNormOptions& options, WantedGradients wanted);

}  // namespace gradfuse
