// Dropout: which elements stay, and what they are multiplied by.
//
// Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov 2014, "Dropout: A Simple Way to Prevent
// Neural Networks from Overfitting", section 4, with the inverse scaling at training time.
#pragma once

#include "philox.h"

namespace gradfuse {

// The dropout of one call. Element i of the tensor, in row-major order, stays if its random word is
// at least `threshold`. Nothing is kept per element: the backward computes the words again.
struct Dropout {
  const int64_t* seed;  // [2], key and offset, in the kernels' memory; null: all elements stay
  uint32_t threshold;
  double scale;  // of the elements that stay
};

// For 0 < p < 1.
inline Dropout dropout_of(const int64_t* seed, double p) {
  const double threshold = p * 0x1p32;
  return {seed, threshold < 0x1p32 - 1 ? static_cast<uint32_t>(threshold) : 0xffffffffu,
          1.0 / (1.0 - p)};
}

GRADFUSE_HD RandomStream random_stream(const int64_t* seed) {
  return {static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1])};
}

}  // namespace gradfuse
