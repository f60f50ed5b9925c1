// Ghost batches of batch normalisation: parts of a batch, each with statistics of its own. Samples
// are the outermost dimension in every layout, so that a ghost batch is a tensor of the same form.
//
// Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", algorithm 1.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <c10/util/SmallVector.h>

#include "batch_norm.h"

namespace gradfuse {

// The samples of a batch in ghost batches of at most `size`, whose sizes differ by at most one. All
// in one if size is 0.
class GhostBatches {
 public:
  GhostBatches(int64_t samples, int64_t size)
      : samples_(samples), count_(size ? std::max<int64_t>(divided_up(samples, size), 1) : 1) {}
  int64_t count() const { return count_; }
  int64_t begin(int64_t k) const { return samples_ / count_ * k + std::min(k, samples_ % count_); }
  int64_t smallest() const { return samples_ / count_; }

  // The shape of ghost batch k.
  BatchNormShape shape(const BatchNormShape& whole, int64_t k) const {
    if (count_ == 1) return whole;
    BatchNormShape part = whole;
    part.outer = whole.outer / samples_ * (begin(k + 1) - begin(k));
    return part;
  }
  // Rows of the whole before ghost batch k.
  int64_t rows_before(const BatchNormShape& whole, int64_t k) const {
    return count_ == 1 ? 0 : whole.outer / samples_ * begin(k);
  }
  // call(k) of every ghost batch.
  template <class Call>
  auto each(Call call) const {
    c10::SmallVector<decltype(call(0)), 1> calls;
    for (int64_t k = 0; k < count_; ++k) calls.push_back(call(k));
    return calls;
  }
  int64_t scratch_bytes(const BatchNormShape& whole) const {
    return std::max(cuda::batch_norm_scratch_bytes(shape(whole, 0)),
                    cuda::batch_norm_scratch_bytes(shape(whole, count_ - 1)));
  }

 private:
  int64_t samples_, count_;
};

// Moves pointers of a call over the whole batch to one of its ghost batches.
class ToGhostBatch {
 public:
  ToGhostBatch(const BatchNormShape& whole, const GhostBatches& batches, int64_t k)
      : whole_(whole), row_(batches.rows_before(whole, k)), k_(k) {}

  template <class T>
  void elements(T*& p) const {
    move(p, row_ * whole_.channels * whole_.inner * element_bytes(whole_.dtype));
  }
  template <class T>
  void mask(T*& p) const {
    move(p, (whole_.inner == 1 ? row_ : row_ * whole_.channels) * whole_.mask_bytes_per_row());
  }
  void scale(BranchScale& scale) const { move(scale.data, row_ * computed_bytes()); }
  template <class T>
  void stats(T*& p, int64_t rows) const {
    move(p, k_ * rows * whole_.channels * computed_bytes());
  }

 private:
  int64_t computed_bytes() const { return whole_.dtype == DType::Double ? 8 : 4; }
  template <class T>
  static void move(T*& p, int64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    if (p) p = reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + bytes);
  }

  BatchNormShape whole_;
  int64_t row_, k_;
};

}  // namespace gradfuse
