// Access to gradients that are not one dense run: elements are gathered into a buffer, the dense
// kernels work there, and written values are scattered back.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../math/runs.h"

namespace gradfuse::cpu {

// Calls f(offset, stride, length) for runs along the innermost dimension that cover elements
// [start, start + n) of the layout in row-major order. Offsets and strides are in elements.
template <class F>
void for_each_run(const StridedLayout& layout, int64_t start, int64_t n, F f) {
  const int64_t last = static_cast<int64_t>(layout.sizes.size()) - 1;
  const int64_t inner = layout.sizes[last];
  int64_t row = start / inner;
  int64_t column = start % inner;
  while (n > 0) {
    int64_t offset = column * layout.strides[last];
    int64_t rest = row;
    for (int64_t d = last - 1; d >= 0; --d) {
      offset += rest % layout.sizes[d] * layout.strides[d];
      rest /= layout.sizes[d];
    }
    const int64_t length = std::min(n, inner - column);
    f(offset, layout.strides[last], length);
    n -= length;
    column = 0;
    ++row;
  }
}

template <int kBytes>
void copy_run(char* dense, char* strided, int64_t stride, int64_t length, bool to_dense) {
  for (int64_t i = 0; i < length; ++i) {
    char* element = strided + i * stride * kBytes;
    if (to_dense)
      std::memcpy(dense + i * kBytes, element, kBytes);
    else
      std::memcpy(element, dense + i * kBytes, kBytes);
  }
}

// Copies elements [start, start + n) of a strided tensor to or from a dense buffer.
inline void copy_strided(void* data, const StridedLayout& layout, int64_t bytes, int64_t start,
                         int64_t n, void* buffer, bool to_dense) {
  char* dense = static_cast<char*>(buffer);
  for_each_run(layout, start, n, [&](int64_t offset, int64_t stride, int64_t length) {
    char* strided = static_cast<char*>(data) + offset * bytes;
    switch (bytes) {
      case 2: copy_run<2>(dense, strided, stride, length, to_dense); break;
      case 4: copy_run<4>(dense, strided, stride, length, to_dense); break;
      case 8: copy_run<8>(dense, strided, stride, length, to_dense); break;
      default: copy_run<16>(dense, strided, stride, length, to_dense); break;
    }
    dense += length * bytes;
  });
}

// Moduli of n (real, imaginary) pairs, in float64.
template <class T>
void moduli(const void* pairs, int64_t n, double* out) {
  const T* x = static_cast<const T*>(pairs);
  for (int64_t i = 0; i < n; ++i) out[i] = std::hypot(double(x[2 * i]), double(x[2 * i + 1]));
}

}  // namespace gradfuse::cpu
