// Normalisation of rows: layer norm and RMS norm of residual + dropout(input). The calls as kernels
// see them, and their twins. Torch-free.
#pragma once

#include "../math/common.h"
#include "../math/dropout.h"

namespace gradfuse {

// Rows of `width` elements, contiguous; rows * width > 0. The types of input, output and their
// gradients; of residual and its gradient; of the sum and its gradient. The last two are that of
// input or, beside a 16-bit one, float32.
struct RowNormShape {
  int64_t rows;
  int64_t width;
  DType dtype, residual_dtype, sum_dtype;

  constexpr int64_t numel() const { return rows * width; }
};

// sum = residual + sample_scale * dropout(input), rounded to the sum's type. A sample whose scale
// is 0 is left out, whatever it holds.
struct RowSum {
  const void* input;
  const void* residual;  // or null
  const double* sample_scale;  // [rows / rows_per_sample], or null for ones
  int64_t rows_per_sample;
  Dropout dropout;

  // Whether the sum is the input itself.
  constexpr bool is_input(const RowNormShape& s) const {
    return !residual && !sample_scale && !dropout.seed && s.dtype == s.sum_dtype;
  }
  // Whether input and residual have the same gradient.
  constexpr bool passes_gradient(const RowNormShape& s) const {
    return !sample_scale && !dropout.seed && (!residual || s.dtype == s.residual_dtype);
  }
};

// A vector [width], contiguous; null data means there is none.
struct RowVector {
  void* data;
  DType dtype;
};

// output = normalised(sum) * (weight + weight_offset) + bias. Without an output, for the sum alone,
// what belongs to the norm is not read.
struct RowNormForward {
  RowNormShape shape;
  RowSum addends;
  bool centred;  // layer norm; else RMS norm
  double eps;
  RowVector weight;
  double weight_offset;  // of a weight that is given
  RowVector bias;
  void* sum;  // null if it is not kept, or is the input
  void* output;  // or null
  void* stats;  // [rows, kKeptOfRow] of the compute type, see math/row_norm.h
};

// The gradients of a forward call; a null gradient is not wanted.
struct RowNormBackward {
  RowNormShape shape;
  RowSum addends;  // without tensors where `sum` is kept
  bool centred;
  RowVector weight;
  double weight_offset;
  const void* sum;  // null if it was not kept: input and residual then are
  const void* stats;
  const void* grad_output;  // null for that of the sum alone: then grad_sum is not
  const void* grad_sum;  // or null
  void* grad_input;
  void* grad_residual;
  RowVector grad_weight;
  RowVector grad_bias;
};

namespace cpu {
void row_norm_forward(const RowNormForward& call);
void row_norm_backward(const RowNormBackward& call);
}  // namespace cpu
namespace cuda {
void row_norm_forward(const RowNormForward& call, Stream stream);
// `scratch`: row_norm_scratch_bytes(call.shape), 256-byte aligned.
void row_norm_backward(const RowNormBackward& call, void* scratch, Stream stream);
int64_t row_norm_scratch_bytes(const RowNormShape& shape);
}  // namespace cuda

}  // namespace gradfuse
