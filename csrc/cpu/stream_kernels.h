// One pass over some bytes of several buffers, for one instruction set.
#ifndef GRADFUSE_CPU_STREAM_KERNELS_H
#define GRADFUSE_CPU_STREAM_KERNELS_H

#include "../ops/stream.h"
#include "isa.h"

namespace gradfuse::cpu {

struct StreamKernels {
  // Moves the bytes [begin, end). Returns bits of all that is only read, so that it is loaded.
  uint32_t (*stream)(const StreamCall& call, int64_t begin, int64_t end);
};
GRADFUSE_KERNEL_TABLE(StreamKernels, stream_kernels)

}  // namespace gradfuse::cpu

#endif

#ifdef GRADFUSE_IN_UNIT
namespace {

#include "simd/vec.h"

// Vectors of a buffer. All buffers are loaded before one is stored to: a load waits for an earlier
// store at the same offset of another page.
template <int kReads>
constexpr int kAtOnce = kReads <= 2 ? 4 : 2;

template <int kReads, int kWrites>
uint32_t stream_of(const StreamCall& call, int64_t begin, int64_t end) {
  const char* reads[kReads + 1];
  char* writes[kWrites + 1];
  for (int k = 0; k < kReads; ++k) reads[k] = call.reads[k];
  for (int k = 0; k < kWrites; ++k) writes[k] = call.writes[k];
  constexpr int kVectors = kAtOnce<kReads>;
  constexpr int64_t kStep = kVectors * GRADFUSE_VEC_BYTES;
  UIntVec seen = {};
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    UIntVec v[kReads + kWrites][kVectors] = {};
#pragma GCC unroll 4
    for (int k = 0; k < kReads; ++k)
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u)
        v[k][u] = load_bytes<UIntVec>(reads[k] + i + u * GRADFUSE_VEC_BYTES);
#pragma GCC unroll 3
    for (int k = 0; k < kWrites; ++k)
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) {
        char* const target = writes[k] + i + u * GRADFUSE_VEC_BYTES;
        if (call.past_caches[k])
          stream_words(target, v[k][u]);
        else
          std::memcpy(target, &v[k][u], GRADFUSE_VEC_BYTES);
      }
#pragma GCC unroll 4
    for (int k = kWrites; k < kReads; ++k)
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) seen |= v[k][u];
  }
  uint32_t bits = 0;
  for (int k = 0; k < kFloats; ++k) bits |= seen[k];
  for (; i < end; ++i) {
    for (int k = 0; k < kReads; ++k) {
      if (k < kWrites)
        writes[k][i] = reads[k][i];
      else
        bits |= static_cast<unsigned char>(reads[k][i]);
    }
    for (int k = kReads; k < kWrites; ++k) writes[k][i] = 0;
  }
  wait_for_streams();
  return bits;
}

template <int kReads>
uint32_t stream_of_reads(const StreamCall& call, int64_t begin, int64_t end) {
  switch (call.write_count) {
    case 0: return stream_of<kReads, 0>(call, begin, end);
    case 1: return stream_of<kReads, 1>(call, begin, end);
    case 2: return stream_of<kReads, 2>(call, begin, end);
    default: return stream_of<kReads, 3>(call, begin, end);
  }
}

uint32_t stream(const StreamCall& call, int64_t begin, int64_t end) {
  switch (call.read_count) {
    case 0: return stream_of_reads<0>(call, begin, end);
    case 1: return stream_of_reads<1>(call, begin, end);
    case 2: return stream_of_reads<2>(call, begin, end);
    case 3: return stream_of_reads<3>(call, begin, end);
    default: return stream_of_reads<4>(call, begin, end);
  }
}

}  // namespace

const StreamKernels stream_kernels = {stream};
#endif
