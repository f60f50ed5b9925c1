// Dropout: which elements stay, and what they are multiplied by.
//
// Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov 2014, "Dropout: A Simple Way to Prevent
// Neural Networks from Overfitting", section 4, with the inverse scaling at training time.
#pragma once

#include "philox.h"

namespace gradfuse {

// The dropout of one call. An element stays if its 32-bit random number is at least `threshold`.
// Nothing is kept per element: the backward computes the numbers again.
struct Dropout {
  const int64_t* seed;  // [2], key and offset, in the kernels' memory; null: all elements stay
  uint32_t threshold;
  double scale;  // of the elements that stay
};

// For 0 < p <= 1. With p = 1 nothing stays: a scale of 0 leaves out whatever the elements hold.
inline Dropout dropout_of(const int64_t* seed, double p) {
  const double threshold = p * 0x1p32;
  return {seed, threshold < 0x1p32 - 1 ? static_cast<uint32_t>(threshold) : 0xffffffffu,
          p < 1.0 ? 1.0 / (1.0 - p) : 0.0};
}

GRADFUSE_HD RandomStream random_stream(const int64_t* seed) {
  return {static_cast<uint64_t>(seed[0]), static_cast<uint64_t>(seed[1])};
}

// The random number of element i, in row-major order: its upper half is half i % 8 of block i / 8,
// the lower half of a word first. That half decides nearly always; the lower one is of the same
// place in the block whose number has the top bit set as well. So a block serves eight elements.
constexpr int kDropoutBlock = 8;
constexpr uint64_t kLowerHalves = uint64_t{1} << 63;

GRADFUSE_HD constexpr uint16_t upper_half(uint32_t word) {
  return static_cast<uint16_t>(word >> 16);
}
GRADFUSE_HD constexpr uint16_t lower_half(uint32_t word) { return static_cast<uint16_t>(word); }

GRADFUSE_HD uint16_t half_of_block(const Philox& block, int i) {
  return static_cast<uint16_t>(block.word[i / 2] >> (i % 2 * 16));
}
GRADFUSE_HD uint16_t lower_half_of(RandomStream s, uint64_t element) {
  return half_of_block(random_block(s, element / kDropoutBlock | kLowerHalves),
                       static_cast<int>(element % kDropoutBlock));
}

}  // namespace gradfuse
