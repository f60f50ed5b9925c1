// Loops that prefetch memory ahead of its use.
//
// Thousands of small tensors are scattered in memory: each field that a loop reads of one is a
// cache miss of some 100 ns, which the hardware cannot predict. Prefetching the fields of a later
// tensor overlaps the misses. Where one line holds the address of the next, stages follow each
// other: the first, furthest ahead, prefetches the fields; the second reads the address of the
// storage there and prefetches that, and so on. A distance is long enough if the items in between
// take about 100 ns, and short enough if the prefetched lines are still in the L1 cache when used.
#pragma once

#include <algorithm>
#include <cstddef>

namespace gradfuse {

// Prefetches a cache line. To GCC a prefetch is no effect: it drops calls of a function that does
// nothing else, unless it inlines them. The empty statement is one.
template <bool kWrites = false>
inline void prefetch_line(const void* p) {
  __builtin_prefetch(p, kWrites);
  asm volatile("");
}
inline void prefetch_line_into_l2(const void* p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
}

// Runs f(i) for the item `distance` items ahead.
template <class F>
struct Stage {
  size_t distance;
  F f;
};
template <class F>
Stage<F> ahead(size_t distance, F f) {
  return {distance, f};
}

// To be called before item i of n: runs every stage whose item exists.
template <class... Stages>
inline void prefetch_for(size_t i, size_t n, const Stages&... stages) {
  ((i + stages.distance < n ? stages.f(i + stages.distance) : void()), ...);
}

// Calls body(i) for i in [begin, end), each stage ahead of it, first those of the first items.
template <class Body, class... Stages>
inline void prefetched(size_t begin, size_t end, Body body, const Stages&... stages) {
  for (size_t lead = std::max({stages.distance...}); lead > 0; --lead)
    ((stages.distance >= lead && begin + stages.distance - lead < end
          ? stages.f(begin + stages.distance - lead)
          : void()),
     ...);
  for (size_t i = begin; i < end; ++i) {
    prefetch_for(i, end, stages...);
    body(i);
  }
}
template <class Body, class... Stages>
inline void prefetched(size_t n, Body body, const Stages&... stages) {
  prefetched(size_t{0}, n, body, stages...);
}

}  // namespace gradfuse
