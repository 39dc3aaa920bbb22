// Groups of threads: the lanes of a warp, a block, and a cluster of blocks.
#pragma once

#include "ptx.cuh"

namespace dspa::cuda {

constexpr uint32_t all_lanes = 0xffffffffu;
constexpr int most_warps = 32;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / 32); }
__device__ __forceinline__ int warps() { return static_cast<int>(blockDim.x / 32); }

// Each lane ends with one of `kValues` sums over the warp (a power of two, at most 32), that of value
// `lane * kValues / 32`. Whatever kValues is, a sum is added up in the same order.
template <int kValues>
__device__ __forceinline__ float sum_over_warp(float (&values)[kValues]) {
  int left = kValues;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (left == 1) {
      values[0] += __shfl_xor_sync(all_lanes, values[0], offset);
      continue;
    }
    left /= 2;
    const bool upper = (lane() & offset) != 0;
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      if (i >= left) break;
      const float kept = upper ? values[i + left] : values[i];
      const float given = upper ? values[i] : values[i + left];
      values[i] = kept + __shfl_xor_sync(all_lanes, given, offset);
    }
  }
  return values[0];
}

// The sum over the block, the same in every thread. `buffer` is shared, one double a warp.
__device__ __forceinline__ double sum_over_block(double value, double* buffer) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(all_lanes, value, offset);
  __syncthreads();
  if (lane() == 0) buffer[warp()] = value;
  __syncthreads();
  double sum = 0.0;
  for (int w = 0; w < warps(); ++w) sum += buffer[w];
  return sum;
}

// The blocks that can write each other's shared memory; a launch without clusters has clusters of one block.
struct Cluster {
  uint32_t rank = ptx::cluster_rank();
  uint32_t size = ptx::cluster_size();

  __device__ __forceinline__ bool leads() const { return rank == 0 && threadIdx.x == 0; }

  __device__ __forceinline__ void barrier() const {
    if (size == 1)
      __syncthreads();
    else
      ptx::cluster_barrier();
  }

  // Calls `take()` in the leading thread and returns its result in every thread. `slot` is shared.
  template <class Take>
  __device__ __forceinline__ uint32_t broadcast(uint32_t* slot, const Take& take) const {
    if (leads()) store_everywhere(slot, take());
    barrier();
    const uint32_t value = *slot;
    barrier();
    return value;
  }

  __device__ __forceinline__ void store_everywhere(uint32_t* place, uint32_t value) const {
    if (size == 1) {
      *place = value;
      return;
    }
#pragma unroll 1
    for (uint32_t r = 0; r < size; ++r) ptx::store_in_cluster(place, r, value);
  }
};

}  // namespace dspa::cuda
