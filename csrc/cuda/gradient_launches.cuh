// Many gradients in a handful of launches: dense runs in batches of one type; strided and complex
// gradients take a launch each.
#pragma once

#include <algorithm>
#include <vector>

#include "launch.cuh"

namespace gradfuse::cuda {

// Many dense runs of one type.
template <int kRuns>
struct DenseBatch {
  static constexpr int kCapacity = kRuns;
  void* data[kCapacity];
  int64_t numel[kCapacity];
  int32_t first_block[kCapacity];
  int32_t row[kCapacity];  // of each run, in the caller's list
  int64_t first_slot;
  int64_t chunk;
  int32_t count;
};
using ManyDense = DenseBatch<kManyRuns>;
using FewDense = DenseBatch<kFewRuns>;

inline FewDense few(const ManyDense& many) {
  FewDense batch;
  std::copy_n(many.data, many.count, batch.data);
  std::copy_n(many.numel, many.count, batch.numel);
  std::copy_n(many.first_block, many.count, batch.first_block);
  std::copy_n(many.row, many.count, batch.row);
  batch.first_slot = many.first_slot;
  batch.chunk = many.chunk;
  batch.count = many.count;
  return batch;
}

// Elements of a chunk: as many bytes of each type, because a chunk ends with a merge over its
// block.
inline int64_t chunk_of(DType dtype, int64_t chunk) {
  return chunk * element_bytes(DType::Float) / element_bytes(dtype);
}
inline int64_t chunk_of(const GradRef& g, int64_t chunk) {
  return is_batched(g) ? chunk_of(g.dtype, chunk) : chunk;
}

// Cuts the gradients into launches: dense(T, batch, blocks) for up to kCapacity dense runs of one
// type, strided(run, blocks, first slot, gradient) for each other gradient. Slots follow launch
// order; `slot_of` receives each gradient's first. `rows` holds their rows. Both may be null.
template <class Dense, class Strided>
void for_each_launch(const std::vector<GradRef>& grads, std::vector<int64_t>* slot_of,
                     const std::vector<int64_t>* rows, Dense dense, Strided strided) {
  const int64_t chunk = chunk_elements(grads);
  DType dtype = DType::Half;
  const auto launch = [&](const ManyDense& batch, unsigned blocks) {
    with_type(dtype, [&](auto type) { dense(type, batch, blocks); });
  };
  Launches<ManyDense, decltype(launch)> launches(launch);
  for (DType each : {DType::Half, DType::BFloat16, DType::Float, DType::Double}) {
    dtype = each;
    launches.batch().chunk = chunk_of(dtype, chunk);
    for (size_t i = 0; i < grads.size(); ++i) {
      const GradRef& g = grads[i];
      if (g.dtype != dtype || !is_batched(g)) continue;
      if (slot_of) (*slot_of)[i] = launches.next_slot();
      if (g.numel == 0) continue;
      const int k = launches.add(divided_up(g.numel, launches.batch().chunk));
      ManyDense& batch = launches.batch();
      batch.data[k] = g.data;
      batch.numel[k] = g.numel;
      batch.row[k] = rows ? static_cast<int32_t>((*rows)[i]) : 0;
    }
    launches.flush();
  }
  int64_t slot = launches.next_slot();
  for (size_t i = 0; i < grads.size(); ++i) {
    const GradRef& g = grads[i];
    if (is_batched(g)) continue;
    if (slot_of) (*slot_of)[i] = slot;
    if (g.numel == 0) continue;
    const int64_t blocks = divided_up(g.numel, chunk);
    strided(strided_run(g), grid(blocks), slot, i);
    slot += blocks;
  }
}

}  // namespace gradfuse::cuda
