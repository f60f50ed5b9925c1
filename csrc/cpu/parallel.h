// Work shared among torch's threads. Which thread takes which item is left to chance, so an item's
// result must not depend on it.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

namespace gradfuse::cpu {

// True in a process forked from one that had this library loaded: the thread pool did not survive.
bool forked();

// Calls f(i) for every i in [0, n), on up to at::get_num_threads() threads. f must not throw.
template <class F>
void for_each_item(int64_t n, F f) {
  const int64_t threads = forked() ? 1 : std::min<int64_t>(at::get_num_threads(), n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

}  // namespace gradfuse::cpu
