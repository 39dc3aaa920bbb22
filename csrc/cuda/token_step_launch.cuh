// The launch of a token step: which kernel, how many rows of the batch in a tile, how many blocks.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "token_step.cuh"

namespace dspa::cuda {

bool has_bulk_copies() {
  return takes_blocks_of(reinterpret_cast<const void*>(&token_step_ring_kernel<Float32>), most_threads);
}

// Launches a kernel for `inputs` rows of the batch at a time.
inline cudaError_t launch_token_step(void (*kernel)(TokenStep), TokenStep step, int64_t inputs, int64_t shared,
                                     cudaStream_t stream) {
  const int threads = tuning().threads;
  Room room;
  const cudaError_t error =
      room_for(reinterpret_cast<const void*>(kernel), threads, shared, room, tuning().cluster);
  if (error != cudaSuccess) return error;
  const int64_t cluster = room.is_for_sm_90 ? tuning().cluster : 1;
  const int64_t tiles = (step.hidden.rows + inputs - 1) / inputs;
  // As many clusters for each tile as run at a time, but none without rows to read.
  const int64_t reach = static_cast<int64_t>(threads) / 32 * cluster;
  const int64_t useful = (step.sae.W_enc.rows + reach - 1) / reach;
  const int64_t clusters = std::clamp<int64_t>(room.clusters / tiles, 1, std::max<int64_t>(useful, 1));
  const int64_t entries = std::min(inputs, step.hidden.rows) * step.edits.capacity;
  step.tiles = static_cast<uint32_t>(tiles);
  step.clusters_per_tile = static_cast<uint32_t>(clusters);
  step.share_rows = static_cast<uint32_t>(step.sae.W_enc.rows / (clusters * cluster));
  step.larger_shares = static_cast<uint32_t>(step.sae.W_enc.rows % (clusters * cluster));
  step.entries_at_once = static_cast<uint32_t>(std::max<int64_t>((entries + clusters - 1) / clusters, 1));
  return launch(kernel, dim3(static_cast<unsigned>(tiles * clusters * cluster)), threads, shared,
                LaunchOptions(static_cast<int>(cluster), tuning().early_launch && room.is_for_sm_90), stream, step);
}

template <class Weights, int kInputs, bool kAligned>
cudaError_t launch_token_step(const TokenStep& step, cudaStream_t stream) {
  const int64_t shared = shared_bytes(kInputs, input_size<Weights>(step.sae.W_enc.columns), step.edits.capacity);
  return launch_token_step(&token_step_kernel<Weights, kInputs, kAligned>, step, kInputs, shared, stream);
}

// One row at a time, of weights that may be loaded 16 bytes at a time: through a ring where it is enabled and fits.
template <class Weights>
cudaError_t launch_single_rows(TokenStep step, int64_t limit, cudaStream_t stream) {
  if (tuning().bulk_copies && has_bulk_copies()) {
    const int64_t shared = shared_bytes(1, input_size<Weights>(step.sae.W_enc.columns), step.edits.capacity);
    const int64_t row_bytes = step.sae.W_enc.columns * static_cast<int64_t>(sizeof(typename Weights::Storage));
    const int64_t stage = tuning().threads / 32 * row_bytes;
    const int64_t stages = std::min<int64_t>((limit - shared - ring_alignment) / stage, most_stages);
    step.ring_stages = static_cast<uint32_t>(stages);
    if (stages >= 2)
      return launch_token_step(&token_step_ring_kernel<Weights>, step, 1, shared + ring_alignment + stages * stage,
                               stream);
  }
  return launch_token_step<Weights, 1, true>(step, stream);
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
    return fits && step.hidden.rows > 1 ? launch_token_step<Weights, most_inputs, true>(step, stream)
                                        : launch_single_rows<Weights>(step, limit, stream);
  return launch_token_step<Weights, unaligned_inputs, false>(step, stream);
}

// One launch on the stream. `step.scratch` must be zero, and is again when the kernel is done: no other step may use it
// at the same time.
inline cudaError_t token_step(const TokenStep& step, cudaStream_t stream) {
  if (step.hidden.rows == 0) return cudaSuccess;
  const Dtype dtype = step.sae.W_enc.dtype;
  if (dtype == Dtype::bfloat16) return launch_token_step<Bfloat16>(step, stream);
  if (dtype == Dtype::float16) return launch_token_step<Float16>(step, stream);
  return launch_token_step<Float32>(step, stream);
}

}  // namespace dspa::cuda
