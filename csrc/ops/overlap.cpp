#include "overlap.h"

#include <algorithm>

#include "../tensor/storage.h"

namespace gradfuse {
namespace {

// Memory between the first and the last element of a tensor that belongs to a parameter.
struct Extent {
  const char* begin;
  const char* end;
  size_t owner;
};

void add_extent(const at::Tensor& t, size_t owner, std::vector<Extent>& extents) {
  const char* const begin = t.defined() ? static_cast<const char*>(begin_of(t)) : nullptr;
  if (!begin || t.numel() == 0) return;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  extents.push_back({begin, begin + (last + 1) * static_cast<int64_t>(t.element_size()), owner});
}

}  // namespace

const void* begin_of(const at::Tensor& t) {
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  if (t.layout() != at::kStrided || !impl->has_storage()) return nullptr;
  const void* const data = impl->unsafe_storage().unsafeGetStorageImpl()->data();
  if (!data) return nullptr;
  return static_cast<const char*>(data) +
         impl->storage_offset() * static_cast<int64_t>(impl->dtype().itemsize());
}

int find_layers(HeldParams& held) {
  std::vector<Extent> extents;
  for (size_t i = 0; i < held.size(); ++i) {
    HeldParams::Held& h = held[i];
    h.place = begin_of(h.param());
    h.numel = h.param().numel();
    h.layer = 0;
    if (h.repeated) continue;
    add_extent(h.param(), i, extents);
    for (const at::Tensor& t : h.tensors) add_extent(t, i, extents);
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });

  // (parameter, stretch of overlapping extents), for stretches of more than one.
  std::vector<std::pair<size_t, size_t>> shares;
  size_t stretches = 0;
  for (size_t i = 0; i < extents.size();) {
    const char* end = extents[i].end;
    size_t j = i + 1;
    for (; j < extents.size() && extents[j].begin < end; ++j) end = std::max(end, extents[j].end);
    if (j - i > 1) {
      for (size_t k = i; k < j; ++k) shares.emplace_back(extents[k].owner, stretches);
      ++stretches;
    }
    i = j;
  }
  std::sort(shares.begin(), shares.end());
  std::vector<int> next(stretches, 0);  // the layer that comes after those of a stretch
  int last = 0;
  for (size_t i = 0; i < shares.size();) {
    size_t j = i;
    int& layer = held[shares[i].first].layer;
    for (; j < shares.size() && shares[j].first == shares[i].first; ++j)
      layer = std::max(layer, next[shares[j].second]);
    for (size_t k = i; k < j; ++k) next[shares[k].second] = layer + 1;
    last = std::max(last, layer);
    i = j;
  }
  return last;
}

}  // namespace gradfuse
