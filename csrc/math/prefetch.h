// Loops that ask for memory ahead of its use.
//
// Thousands of small tensors lie in memory as they were made: each field that a loop reads of one
// is a cache miss of some 100 ns, which the hardware cannot foresee. A loop that names the fields
// of a later tensor early enough overlaps the misses. Where one line holds the address of the next,
// the stages follow each other: the first, furthest ahead, asks for the fields, the second, by
// then, reads in them where the storage is, and so on. A distance is long enough when what lies
// between takes about 100 ns, and short enough when what it brings is still in the first-level
// cache.
#pragma once

#include <cstddef>

namespace gradfuse {

// f(i) for an item that comes `distance` items later.
template <class F>
struct Stage {
  size_t distance;
  F f;
};
template <class F>
Stage<F> ahead(size_t distance, F f) {
  return {distance, f};
}

// Before item i of n is worked on: runs every stage whose item is still to come.
template <class... Stages>
inline void prefetch_for(size_t i, size_t n, const Stages&... stages) {
  ((i + stages.distance < n ? stages.f(i + stages.distance) : void()), ...);
}

// Calls body(i) for i in [0, n), each stage ahead of it.
template <class Body, class... Stages>
inline void prefetched(size_t n, Body body, const Stages&... stages) {
  for (size_t i = 0; i < n; ++i) {
    prefetch_for(i, n, stages...);
    body(i);
  }
}

}  // namespace gradfuse
