// Sparse gradients, as nn.Embedding(sparse=True) makes them.
#pragma once

#include <ATen/core/Tensor.h>

namespace gradfuse {

// The values of a sparse COO tensor, one for each index, which share its memory. Values of the same
// index are added first, in the tensor itself, which stands for the same matrix before and after.
at::Tensor coalesced_values(const at::Tensor& t);

}  // namespace gradfuse
