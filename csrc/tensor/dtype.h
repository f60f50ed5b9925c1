// torch's types as ours.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../math/common.h"

namespace gradfuse {

// Our type of a tensor's real parts; none for integers, bool, float8, complex32.
inline std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kHalf: return DType::Half;
    case at::kBFloat16: return DType::BFloat16;
    case at::kFloat:
    case at::kComplexFloat: return DType::Float;
    case at::kDouble:
    case at::kComplexDouble: return DType::Double;
    default: return std::nullopt;
  }
}

}  // namespace gradfuse
