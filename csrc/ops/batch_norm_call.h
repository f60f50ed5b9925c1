// Batch normalisation: a forward call as Python makes it, for the files that run or defer one.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include "../math/activation.h"
#include "../math/batch_norm.h"
#include "../tensor/storage.h"

namespace gradfuse {

// gradfuse/_records.py has the same fields.
struct BatchNormForwardCall {
  at::Tensor input;                           // [N, C, ...]
  MaybeTensor residual;                       // like input, any strides
  MaybeTensor weight, bias;                   // [C]
  MaybeTensor running_mean, running_var;      // [C]; updated if training
  bool training;
  double momentum;
  MaybeTensor momentum_value;  // [], or [ghost batches], in place of momentum
  double eps;
  Activation activation;
  double negative_slope;
  bool wants_mask;
  MaybeTensor sample_scale;  // [N]
  int64_t ghost_size;  // samples at most that share statistics; 0 for all
  std::optional<Renorm> renorm;
  MaybeTensor step;  // [] int64, of renorm's warm-up
  MaybeTensor drift;  // [kDriftRows, C], sets the momentum; updated
  MaybeTensor gathered;  // float64 [ranks, 1 + 2 * C], Tallies: the statistics of all ranks
};

// Reads a BatchNormCall; throws TypeError.
BatchNormForwardCall read_forward(pybind11::handle given);

// Throws TypeError or std::invalid_argument on what the kernels cannot take.
void check_forward(const BatchNormForwardCall& call);

// The strides of the call's output.
c10::SmallVector<int64_t, 6> output_strides(const at::Tensor& input);

}  // namespace gradfuse
