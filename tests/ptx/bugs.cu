// A kernel for each check of the emulator, with its bug if `bug`, else correct. The line that the
// message must name is marked BUG: and the name of the host function.
#include <cuda_runtime.h>

#include <cub/block/block_reduce.cuh>

namespace bugs {

constexpr int kThreads = 64;

// Global memory

__global__ void load_past_end(bool bug, const float* in, float* out, int n) {
  const int i = threadIdx.x;
  if (i < n + (bug ? 1 : 0)) out[0 * i + (i < n ? i : 0)] = in[i];  // BUG: out_of_bounds_load
}

__global__ void store_before_start(bool bug, const float* in, float* out, int n) {
  if (threadIdx.x == 0) out[bug ? -1 : 0] = in[n - 1];  // BUG: out_of_bounds_store
}

__global__ void wide_load(bool bug, const float* in, float* out) {
  const float* from = in + (bug ? 1 : 0);
  const float4 four = *reinterpret_cast<const float4*>(from);  // BUG: misaligned_load
  if (threadIdx.x == 0) out[0] = four.x + four.w;
}

__global__ void read_output(bool bug, const float* in, float* out, int n) {
  const int i = threadIdx.x;
  if (!bug && i < n) out[i] = in[i];
  if (i < n) out[i] += 1.0f;  // BUG: unwritten_output
}

// Shared memory

__global__ void shared_index(bool bug, const float* in, float* out) {
  __shared__ float values[kThreads];
  const int i = threadIdx.x;
  values[i + (bug ? 1 : 0)] = in[i % 32];  // BUG: out_of_bounds_shared
  __syncthreads();
  if (i < 32) out[i] = values[i] + values[i + 32];
}

__global__ void shared_alignment(bool bug, const float* in, float* out) {
  __shared__ __align__(16) float values[4 * kThreads];
  const int i = threadIdx.x;
  for (int k = 0; k < 4; ++k) values[4 * i + k] = in[i % 32];
  __syncthreads();
  const float* from = values + 4 * (i % 32) + (bug ? 2 : 0);
  const float4 four = *reinterpret_cast<const float4*>(from);  // BUG: misaligned_shared
  if (i < 32) out[i] = four.x + four.y;
}

__global__ void shared_unwritten(bool bug, const float* in, float* out) {
  __shared__ float values[kThreads];
  const int i = threadIdx.x;
  if (!bug || i != 7) values[i] = in[i % 32];
  __syncthreads();
  if (i < 32) out[i] = values[i];  // BUG: unwritten_shared
}

__global__ void shared_neighbour(bool bug, const float* in, float* out) {
  __shared__ float values[kThreads];
  const int i = threadIdx.x;
  values[i] = in[i % 32];
  if (!bug) __syncthreads();
  const float next = values[(i + 1) % kThreads];  // BUG: missing_syncthreads
  if (i < 32) out[i] = next;
}

__global__ void warp_neighbour(bool bug, const float* in, float* out) {
  __shared__ float values[kThreads];
  const int i = threadIdx.x;
  values[i] = in[i % 32];
  if (!bug) __syncwarp();
  const float next = values[i / 32 * 32 + (i + 1) % 32];  // BUG: missing_syncwarp
  if (i < 32) out[i] = next;
}

// Half a warp is enough where only that half takes part.
__global__ void half_warps(bool bug, const float* in, float* out) {
  __shared__ float values[kThreads];
  const int i = threadIdx.x;
  const unsigned half = bug ? 0x00ff00ffu : (i % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  values[i] = in[i % 32];
  if (!bug || i % 16 < 8) __syncwarp(half);
  const float next = values[i / 16 * 16 + (i + 15) % 16];  // BUG: half_synced_warp
  if (i < 32) out[i] = next;
}

// Values come out right on most runs: the second reduction begins when the first is over in this
// warp, not in all of them.
__global__ void two_reductions(bool bug, const float* in, float* out) {
  using Reduce = cub::BlockReduce<float, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const float first = Reduce(storage).Sum(in[threadIdx.x % 32]);
  if (!bug) __syncthreads();
  const float second = Reduce(storage).Sum(2.0f * in[threadIdx.x % 32]);  // BUG: reused_storage
  if (threadIdx.x == 0) out[0] = first + second;
}

__global__ void shared_count(bool bug, const float* in, float* out) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (in[threadIdx.x % 32] < 2.0f) atomicAdd(&count, 1);
  if (!bug) __syncthreads();
  if (threadIdx.x == 0) out[0] = static_cast<float>(count);  // BUG: atomic_race
}

// Local memory and registers

__global__ void local_index(bool bug, const float* in, float* out, int n) {
  float values[8];
  for (int k = 0; k < 8; ++k) values[(k + n) % 8] = in[k];
  const int at = bug ? n / 4 + threadIdx.x % 2 : threadIdx.x % 8;
  if (threadIdx.x < 32) out[threadIdx.x] = values[at];  // BUG: out_of_bounds_local
}

__global__ void local_unwritten(bool bug, const float* in, float* out, int n) {
  float values[8];
  for (int k = 0; k < (bug ? n / 8 : 8); ++k) values[k] = in[k];
  if (threadIdx.x < 32) out[threadIdx.x] = values[(threadIdx.x + n) % 8];  // BUG: unwritten_local
}

// nvcc gives an unset variable some value, so this is in PTX.
#define ADD_MAYBE_UNSET \
  "{ .reg .pred p; .reg .f32 t; setp.lt.s32 p, %1, 5; @p mov.f32 t, %2; add.f32 %0, t, %2; }"

__global__ void register_unset(bool bug, const float* in, float* out) {
  const int i = threadIdx.x, when = bug ? i : 0;
  float sum;
  asm(ADD_MAYBE_UNSET : "=f"(sum) : "r"(when), "f"(in[i % 32]));  // BUG: unset_register
  if (i < 32) out[i] = sum;
}

// Races in global memory

__global__ void blocks_store(bool bug, const float* in, float* out) {
  // The same value from each: right by chance only.
  if (threadIdx.x == 0) out[bug ? 0 : blockIdx.x] = in[0];  // BUG: blocks_store
}

__global__ void blocks_exchange(bool bug, const float* in, float* out) {
  if (threadIdx.x == 0) out[2 * blockIdx.x] = in[blockIdx.x];
  __threadfence();
  if (bug && threadIdx.x == 1 && blockIdx.x == 1) out[3] = out[0];  // BUG: blocks_exchange
}

__global__ void threads_exchange(bool bug, const float* in, float* out) {
  const int i = threadIdx.x;
  if (i < 32) out[i] = in[i];
  if (!bug) __syncthreads();
  float next = 0.0f;
  if (i < 32) next = out[(i + 1) % 32];  // BUG: threads_exchange
  __syncthreads();
  if (i < 32) out[i] = next;
}

// Barriers and shuffles

__global__ void early_return(bool bug, const float* in, float* out) {
  const int i = threadIdx.x;
  if (bug && i >= 40) return;
  __syncthreads();  // BUG: barrier_after_exit
  if (i < 32) out[i] = in[i];
}

__global__ void two_barriers(bool bug, const float* in, float* out) {
  const int i = threadIdx.x;
  if (i < (bug ? 32 : kThreads)) {
    __syncthreads();  // BUG: divergent_barrier
    if (i < 32) out[i] = in[i];
  } else {
    __syncthreads();
    out[0] = in[0];
  }
}

__global__ void exited_lanes(bool bug, const float* in, float* out) {
  const int i = threadIdx.x;
  if (i >= 20 && i < 32 && bug) return;
  const float next = __shfl_down_sync(0xffffffffu, in[i % 32], 1);  // BUG: exited_lanes
  if (i < 32) out[i] = next;
}

__global__ void absent_lanes(const float* in, float* out) {
  const float next = __shfl_down_sync(0xffffffffu, in[threadIdx.x % 32], 1);  // BUG: absent_lanes
  if (threadIdx.x < 32) out[threadIdx.x] = next;
}

__global__ void unnamed_lane(bool bug, const float* in, float* out) {
  const int i = threadIdx.x;
  if (i < 16) {
    const float x = __shfl_sync(0x0000ffffu, in[i], bug ? 16 : 15);  // BUG: unnamed_lane
    out[i] = x;
  }
}

// Launches

__global__ void __launch_bounds__(kThreads) bounded(const float* in, float* out) {
  if (threadIdx.x < 32) out[threadIdx.x] = in[threadIdx.x];
}

__global__ void much_shared(const float* in, float* out) {
  extern __shared__ float values[];
  values[threadIdx.x] = in[threadIdx.x % 32];
  if (threadIdx.x < 32) out[threadIdx.x] = values[threadIdx.x];
}

__global__ void endless(bool bug, const float* in, float* out) {
  volatile const float* watched = in;
  while (bug && watched[0] > -1.0f) {}
  out[threadIdx.x % 32 + 0 * blockIdx.x] = 0.0f;
}

__global__ void quotient(bool bug, const float* in, float* out, int n) {
  const int by = static_cast<int>(threadIdx.x) - (bug ? 3 : -1);
  const int q = n / by;  // BUG: division_by_zero
  if (threadIdx.x < 32) out[threadIdx.x] = q + in[0];
}

__global__ void asserts(bool bug, const float* in, float* out) {
  if (bug && in[0] > -1.0f) __trap();  // BUG: trap
  if (threadIdx.x == 0) out[0] = in[0];
}

}  // namespace bugs

using bugs::kThreads;

// in and out are arrays of 32 floats on the device; in holds 0, 1, 2, ... 31.
#define RUN(name) \
  extern "C" __attribute__((visibility("default"))) void name(bool bug, const float* in, float* out)

RUN(out_of_bounds_load) { bugs::load_past_end<<<1, kThreads>>>(bug, in, out, 32); }
RUN(out_of_bounds_store) { bugs::store_before_start<<<1, kThreads>>>(bug, in, out, 32); }
RUN(misaligned_load) { bugs::wide_load<<<1, kThreads>>>(bug, in, out); }
RUN(unwritten_output) { bugs::read_output<<<1, kThreads>>>(bug, in, out, 32); }
RUN(out_of_bounds_shared) { bugs::shared_index<<<1, kThreads>>>(bug, in, out); }
RUN(misaligned_shared) { bugs::shared_alignment<<<1, kThreads>>>(bug, in, out); }
RUN(unwritten_shared) { bugs::shared_unwritten<<<1, kThreads>>>(bug, in, out); }
RUN(missing_syncthreads) { bugs::shared_neighbour<<<1, kThreads>>>(bug, in, out); }
RUN(missing_syncwarp) { bugs::warp_neighbour<<<1, kThreads>>>(bug, in, out); }
RUN(half_synced_warp) { bugs::half_warps<<<1, kThreads>>>(bug, in, out); }
RUN(reused_storage) { bugs::two_reductions<<<1, kThreads>>>(bug, in, out); }
RUN(atomic_race) { bugs::shared_count<<<1, kThreads>>>(bug, in, out); }
RUN(out_of_bounds_local) { bugs::local_index<<<1, kThreads>>>(bug, in, out, 32); }
RUN(unwritten_local) { bugs::local_unwritten<<<1, kThreads>>>(bug, in, out, 32); }
RUN(unset_register) { bugs::register_unset<<<1, kThreads>>>(bug, in, out); }
RUN(blocks_store) { bugs::blocks_store<<<8, kThreads>>>(bug, in, out); }
RUN(blocks_exchange) { bugs::blocks_exchange<<<2, kThreads>>>(bug, in, out); }
RUN(threads_exchange) { bugs::threads_exchange<<<1, kThreads>>>(bug, in, out); }
RUN(barrier_after_exit) { bugs::early_return<<<1, kThreads>>>(bug, in, out); }
RUN(divergent_barrier) { bugs::two_barriers<<<1, kThreads>>>(bug, in, out); }
RUN(exited_lanes) { bugs::exited_lanes<<<1, kThreads>>>(bug, in, out); }
RUN(absent_lanes) { bugs::absent_lanes<<<1, bug ? 40 : kThreads>>>(in, out); }
RUN(unnamed_lane) { bugs::unnamed_lane<<<1, kThreads>>>(bug, in, out); }
RUN(launch_bounds) { bugs::bounded<<<1, bug ? kThreads + 1 : kThreads>>>(in, out); }
RUN(shared_by_default) {
  bugs::much_shared<<<1, kThreads, bug ? 48 * 1024 + 4 : 48 * 1024>>>(in, out);
}
RUN(shared_asked_for) {
  const int bytes = bug ? 65 * 1024 : 64 * 1024;
  cudaFuncSetAttribute(bugs::much_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  bugs::much_shared<<<1, kThreads, bytes>>>(in, out);
}
RUN(endless_loop) { bugs::endless<<<1, 32>>>(bug, in, out); }
RUN(division_by_zero) { bugs::quotient<<<1, kThreads>>>(bug, in, out, 32); }
RUN(trap) { bugs::asserts<<<1, kThreads>>>(bug, in, out); }
RUN(freed_memory) {
  void* scratch = nullptr;
  cudaMalloc(&scratch, 128);
  cudaMemcpyAsync(scratch, in, 128, cudaMemcpyDeviceToDevice, nullptr);
  if (bug) cudaFree(scratch);
  bugs::bounded<<<1, kThreads>>>(static_cast<float*>(scratch), out);
  if (!bug) cudaFree(scratch);
}
RUN(copied_unwritten) {
  void* scratch = nullptr;
  cudaMalloc(&scratch, 128);
  bugs::blocks_store<<<bug ? 31 : 32, kThreads>>>(false, in, static_cast<float*>(scratch));
  cudaMemcpy(out, scratch, 128, cudaMemcpyDeviceToDevice);
  cudaFree(scratch);
}
RUN(too_many_blocks) { bugs::bounded<<<dim3(1, bug ? 65536 : 1), kThreads>>>(in, out); }
