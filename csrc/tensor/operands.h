// Checks of the tensors that norms take. Messages name the op and the argument.
#pragma once

#include "checks.h"
#include "dispatch.h"
#include "dtype.h"
#include "storage.h"

namespace gradfuse {

// Throws unless t is dense, with memory on a device of this build.
inline void check_layout_and_storage(const char* op, const char* name, const at::Tensor& t) {
  if (t.layout() != at::kStrided)
    fail<TypeError>(op, ": ", name, " must be dense, got layout ", t.layout());
  if (!device_is_supported(t.device().type()))
    fail<TypeError>(op, ": ", name, " must be on cpu or a cuda device this build supports, got ",
                    t.device());
  if (is_wrapper(t))
    fail<TypeError>(op, ": ", name, " must be a plain tensor, got a wrapper without memory");
  if (const auto lack = missing_storage(t))
    fail<std::runtime_error>(op, ": ", name, " must have storage of at least ", lack->needed,
                             " bytes, got ", lack->found, "; was it resized or freed?");
}

// The same of a tensor that kernels read as real numbers.
inline void check_memory(const char* op, const char* name, const at::Tensor& t) {
  check_layout_and_storage(op, name, t);
  if (!dtype_of(t.scalar_type()) || t.is_complex())
    fail<TypeError>(op, ": ", name, " must be float16, bfloat16, float32 or float64, got ",
                    t.scalar_type());
}

inline void check_device(const char* op, const char* name, const at::Tensor& t,
                         const at::Tensor& like) {
  if (t.device() != like.device())
    fail<TypeError>(op, ": ", name, " must be on input's device ", like.device(), ", got ",
                    t.device());
}

// The tensor as kernels read it; a copy unless it already is.
inline at::Tensor contiguous(const at::Tensor& t) {
  return t.is_contiguous() && !t.is_neg() ? t : converted(t, t.scalar_type());
}

}  // namespace gradfuse
