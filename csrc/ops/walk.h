// One walk through the parameters of an optimizer, which checks them, their gradients and their
// state, and yields them as kernels see them.
#pragma once

#include <utility>
#include <vector>

#include "../tensor/grad_list.h"
#include "held_params.h"

namespace gradfuse {

// The parameters that have a gradient: a list for each group of the gradients, in their order.
struct Walk {
  GradList grads;
  std::vector<std::vector<ParamRef>> params;
  // (list, place in it) of those that an update cannot take as they are: their memory has gaps or
  // is copy-on-write, or the gradient is sparse.
  std::vector<std::pair<size_t, size_t>> noncontiguous;
  int last_layer = 0;  // of the parameters, see HeldParams::Held
};

// Throws std::invalid_argument, std::runtime_error or TypeError, nothing written, where a gradient
// or a state does not fit its parameter.
Walk walk(HeldParams& held);

// The tensor whose strides an update follows: one of the state, or the parameter.
const at::Tensor& layout_of(const HeldParams::Held& held);

// A parameter as the kernels see it. `writes` first copies copy-on-write memory.
ParamRef ref_of(const HeldParams::Held& held, const at::Tensor& param, const at::Tensor& grad,
                size_t index, bool writes);

}  // namespace gradfuse
