// How kernels see the memory of tensors, and how it is cut into chunks. Torch-free.
//
// Counts are 64-bit. Borders of chunks depend on sizes alone, so that the bits of a reduction do
// not depend on threads or launches.
#pragma once

#include <vector>

#include "common.h"

namespace gradfuse {

// Dimensions of a tensor that is not one dense run, outermost first, strides in elements.
struct StridedLayout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
};

// One gradient. For a complex tensor, `data` points to (real, imaginary) pairs, numel counts pairs
// and stats are of the modulus; dtype is that of each part.
struct GradRef {
  void* data;
  int64_t numel;
  DType dtype;
  bool is_complex;
  const StridedLayout* layout;  // null for one dense run of numel elements
};

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tensors are reduced in chunks of this many elements, more where that would make too many: the
// memory for the chunks' results stays bounded.
template <class Ref>
int64_t chunk_elements(const std::vector<Ref>& tensors) {
  int64_t total = 0;
  for (const Ref& t : tensors) total += t.numel;
  int64_t chunk = 32768;
  while (total / chunk > 16384) chunk *= 2;
  return chunk;
}

}  // namespace gradfuse
