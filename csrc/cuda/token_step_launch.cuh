// The launch of a token step: which kernel, how many rows of the batch in a tile, how many blocks.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "token_step.cuh"

namespace dspa::cuda {

template <class Weights, int kInputs, bool kAligned>
cudaError_t launch_token_step(TokenStep step, [[maybe_unused]] int64_t limit, cudaStream_t stream) {
  const auto kernel = &token_step_kernel<Weights, kInputs, kAligned>;
  const int threads = tuning().threads;
  int64_t shared = shared_bytes(kInputs, input_size<Weights>(step.sae.W_enc.columns), step.edits.capacity);
  if constexpr (bulk_copies && kInputs == 1 && kAligned) {
    const int64_t row_bytes = step.sae.W_enc.columns * static_cast<int64_t>(sizeof(typename Weights::Storage));
    const int64_t stage = threads / 32 * row_bytes;
    const int64_t fitting = (limit - shared - 128) / stage;
    step.ring_stages = fitting < 2 ? 0 : static_cast<uint32_t>(std::min<int64_t>(fitting, most_stages));
    shared += step.ring_stages > 0 ? 128 + step.ring_stages * stage : 0;
  }
  Room room;
  const cudaError_t error = room_for(reinterpret_cast<const void*>(kernel), threads, shared, room);
  if (error != cudaSuccess) return error;
  const int64_t cluster = room.has_clusters ? tuning().cluster : 1;
  const int64_t tiles = (step.hidden.rows + kInputs - 1) / kInputs;
  // As many clusters for each tile as run at a time, but none with nothing to read.
  const int64_t reach = static_cast<int64_t>(threads) / 32 * cluster;
  const int64_t useful = (step.sae.W_enc.rows + reach - 1) / reach;
  const int64_t clusters = std::clamp<int64_t>(room.blocks / cluster / tiles, 1, std::max<int64_t>(useful, 1));
  step.tiles = static_cast<uint32_t>(tiles);
  step.clusters_per_tile = static_cast<uint32_t>(clusters);
  return launch(kernel, dim3(static_cast<unsigned>(tiles * clusters * cluster)), threads, shared,
                static_cast<int>(cluster), stream, step);
}

template <class Weights>
cudaError_t launch_token_step(const TokenStep& step, cudaStream_t stream) {
  int device = 0;
  int64_t limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = shared_limit_of(device, limit);
  if (error != cudaSuccess) return error;
  const bool aligned = is_aligned(step.sae.W_enc) && is_aligned(step.sae.W_dec);
  const int64_t size = input_size<Weights>(step.sae.W_enc.columns);
  const bool fits = shared_bytes(most_inputs, size, step.edits.capacity) <= limit;
  if (aligned)
    return fits && step.hidden.rows > 1 ? launch_token_step<Weights, most_inputs, true>(step, limit, stream)
                                        : launch_token_step<Weights, 1, true>(step, limit, stream);
  return launch_token_step<Weights, unaligned_inputs, false>(step, limit, stream);
}

// One launch on the stream. `step.scratch` must be zero, and is again when the kernel is done: no other step may use it
// at the same time.
inline cudaError_t token_step(const TokenStep& step, cudaStream_t stream) {
  if (step.hidden.rows == 0) return cudaSuccess;
  switch (step.sae.W_enc.dtype) {
    case Dtype::bfloat16: return launch_token_step<Bfloat16>(step, stream);
    case Dtype::float16: return launch_token_step<Float16>(step, stream);
    case Dtype::float32: break;
  }
  return launch_token_step<Float32>(step, stream);
}

}  // namespace dspa::cuda
