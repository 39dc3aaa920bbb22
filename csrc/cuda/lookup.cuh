// Edit lists for the rows of a batch: a block for each.
#pragma once

#include "launch.cuh"
#include "lookup_row.cuh"

namespace dspa::cuda {

constexpr int lookup_threads = 256;

template <class Density, class Value>
__global__ void __launch_bounds__(lookup_threads, 1)
    lookup_kernel(const __grid_constant__ Lookup<Density, Value> lookup) {
  lookup_row(lookup, blockIdx.x, *reinterpret_cast<SelectionBuffer*>(ptx::dynamic_shared()));
}

template <class Density, class Value>
cudaError_t launch_lookup(const Lookup<Density, Value>& lookup, int64_t batch, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  return launch(&lookup_kernel<Density, Value>, dim3(static_cast<unsigned>(batch)), tuning().threads,
                static_cast<int64_t>(sizeof(SelectionBuffer)), 1, stream, lookup);
}

}  // namespace dspa::cuda
