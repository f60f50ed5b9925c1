// Shares work among torch's threads. Each thread starts with its own run of items, which stays in
// its cache from one call to the next, then helps the others. Any thread may take any item, so an
// item's result must not depend on the thread.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gradfuse::cpu {

// Keeps subnormals while it lives: torch.set_flush_denormal sets a flag of one thread, and results
// must not depend on the thread.
class KeepSubnormals {
#if defined(__x86_64__)
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  const unsigned saved_ = _mm_getcsr();

 public:
  KeepSubnormals() {
    if (saved_ & (kFlushToZero | kDenormalsAreZero))
      _mm_setcsr(saved_ & ~(kFlushToZero | kDenormalsAreZero));
  }
  ~KeepSubnormals() {
    if (saved_ & (kFlushToZero | kDenormalsAreZero)) _mm_setcsr(saved_);
  }
#else
 public:
  KeepSubnormals() {}
  ~KeepSubnormals() {}
#endif
  KeepSubnormals(const KeepSubnormals&) = delete;
};

// True in a process forked from one that had this library loaded: the thread pool did not survive.
bool forked();

// Below this many elements that are only read, waking a second thread and moving cache lines costs
// more than it saves.
constexpr int64_t kLeastParallel = 1 << 19;

struct Items {
  int64_t count;
  int64_t elements;  // in all items
  int64_t least = kLeastParallel;  // elements from which on threads share the items
  // Each thread starts at the end of its run, which is what the call before left in its cache.
  bool backwards = false;
};

// Calls f(i) for every i in [0, items.count), with up to at::get_num_threads() threads. f must not
// throw.
template <class F>
void for_each_item(const Items& items, F f) {
  const int64_t n = items.count;
  const bool serial = forked() || items.elements < items.least;
  const int64_t threads = serial ? 1 : std::min<int64_t>(at::get_num_threads(), n);
  if (threads <= 1) {
    const KeepSubnormals keep;
    for (int64_t i = 0; i < n; ++i) f(items.backwards ? n - 1 - i : i);
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t begin, end;
  };
  const std::unique_ptr<Range[]> ranges(new Range[threads]);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].begin = n * t / threads;
    ranges[t].next = ranges[t].begin;
    ranges[t].end = n * (t + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t end) {
    const KeepSubnormals keep;
    for (int64_t t = first; t < end; ++t) {
      for (int64_t k = 0; k < threads; ++k) {
        Range& range = ranges[(t + k) % threads];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
          f(items.backwards ? range.begin + range.end - 1 - i : i);
      }
    }
  });
}

// Calls f(begin, end) for runs of [0, n), the numbers of small objects that lie scattered in
// memory. Whoever looks at one waits for memory, so threads share them although there is little to
// do. f must not copy a tensor that only its Python object owns: torch then takes the GIL, and the
// caller may hold it.
template <class F>
void for_each_run(int64_t n, F f) {
  constexpr int64_t kRun = 256, kLeast = 2 * kRun;
  for_each_item({(n + kRun - 1) / kRun, n, kLeast},
                [&](int64_t i) { f(i * kRun, std::min(n, (i + 1) * kRun)); });
}

}  // namespace gradfuse::cpu
