// Phase 1 of a token step: the edit lists of the rows of a tile are looked up and scored, and edited where M_t is not
// needed.
#pragma once

#include "lookup_row.cuh"
#include "token_step_edit.cuh"

namespace dspa::cuda {

// Scores the listed latents, a warp for each, into the scratch and the shared memory of the whole cluster.
template <class Tile>
__device__ __forceinline__ void score_list(const Tile& tile, int slot) {
  const int64_t row = tile.first + slot, count = tile.list_size(row);
  const int32_t* latents = tile.step.edits.latents + row * tile.capacity;
  const int64_t stride = static_cast<int64_t>(tile.cluster.size) * warps();
  for (int64_t i = static_cast<int64_t>(tile.cluster.rank) * warps() + warp(); i < count; i += stride) {
    const int64_t latent = latents[i];
    float value = 0.0f;
    if (tile.decoder_row(latent) >= 0) {
      const float product = multiply<typename Tile::Weights, 1, 1>(tile.encoder_row(latent), 1, tile.d_model,
                                                                   tile.input(slot), tile.size, tile.from_memory());
      value = score_of(tile.sae, latent, product).value;
      if (!finite(product) || !finite(value)) value = __uint_as_float(not_finite);
    }
    if (lane() == 0) {
      tile.step.scratch.score[row * tile.capacity + i] = value;
      tile.cluster.store_everywhere(tile.score_bits(slot) + i, __float_as_uint(value));
    }
  }
}

template <class Tile>
__device__ __forceinline__ void process_list(Tile& tile, int slot) {
  const int64_t row = tile.first + slot;
  if (tile.step.looks_up) {
    if (tile.cluster.rank == 0) lookup_row(tile.step.lookup, row, tile.shared().selection);
    tile.cluster.barrier();
  }
  if (!tile.is_enabled(row)) {
    if (tile.cluster.leads()) tile.step.scratch.settled[row] = 1;
    return;
  }
  tile.load_inputs(1u << slot);
  if (tile.shared().finite[slot] == 0) {
    if (tile.cluster.leads()) {
      tile.step.scratch.settled[row] = 1;
      count_row(tile, row, false, false, false, 0.0f);
    }
    return;
  }
  score_list(tile, slot);
  tile.cluster.barrier();  // all blocks of the cluster have the scores and have read the hidden state
  const Listed listed = tile.summary_of_list(slot, false);
  const bool certain = !tile.is_topk() && listed.vanishes(tile.alpha(row), listed.largest);
  if (listed.finite && (!tile.step.lazy || (listed.any && !certain))) return;
  edit_rows(tile, 1u << slot, false);
  if (tile.cluster.leads()) tile.step.scratch.settled[row] = 1;
}

template <class Tile>
__device__ __forceinline__ void process_lists(Tile& tile) {
  while (true) {
    const uint32_t taken = tile.cluster.broadcast(
        &tile.shared().slot, [&] { return ptx::add_acquire_release(tile.step.scratch.lists_taken + tile.index, 1); });
    if (taken >= static_cast<uint32_t>(tile.rows)) return;
    process_list(tile, static_cast<int>(taken));
    tile.cluster.barrier();
    if (tile.cluster.leads()) ptx::add_acquire_release(tile.step.scratch.lists_done + tile.index, 1);
  }
}

template <class Tile>
__device__ __forceinline__ void wait_for_lists(const Tile& tile) {
  if (threadIdx.x == 0)
    while (ptx::load_acquire(tile.step.scratch.lists_done + tile.index) < static_cast<uint32_t>(tile.rows))
      ptx::wait_a_moment();
  __syncthreads();
}

}  // namespace dspa::cuda
