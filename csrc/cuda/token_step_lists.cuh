// Phase 1 of a token step: the edit lists of a tile are looked up, and their latents scored.
#pragma once

#include "lookup_row.cuh"
#include "token_step_begin.cuh"

namespace dspa::cuda {

// Tasks are taken in order, so whoever waits for those before its own waits for clusters that run already.
template <class Tile>
__device__ __forceinline__ uint32_t take_task(const Tile& tile) {
  return tile.cluster.broadcast(&tile.shared().slot,
                                [&] { return atomicAdd(tile.step.scratch.tasks_taken + tile.index, 1u); });
}

// Until so many rows and entries are done.
template <class Tile>
__device__ __forceinline__ void wait_for_tasks(const Tile& tile, int64_t count) {
  if (threadIdx.x == 0)
    while (ptx::load_acquire(tile.step.scratch.tasks_done + tile.index) < static_cast<uint32_t>(count))
      ptx::wait_a_moment();
  __syncthreads();
}

// Looks up the rows of the tile. Returns the first task that is not a row.
template <class Tile>
__device__ __forceinline__ uint32_t look_up(const Tile& tile) {
  const uint32_t rows = static_cast<uint32_t>(tile.rows);
  uint32_t task = take_task(tile);
  while (task < rows) {
    if (tile.cluster.rank == 0) lookup_row(tile.step.lookup, tile.first + task, tile.shared().selection);
    tile.cluster.barrier();
    if (tile.cluster.leads()) ptx::add_acquire_release(tile.step.scratch.tasks_done + tile.index, 1);
    task = take_task(tile);
  }
  wait_for_tasks(tile, rows);
  return task - rows;
}

// Scores an entry of the lists into the scratch, by a warp.
template <class Tile>
__device__ __forceinline__ void score_entry(const Tile& tile, uint32_t entry) {
  const uint32_t capacity = static_cast<uint32_t>(tile.capacity);
  const int slot = static_cast<int>(entry / capacity);
  if (!tile.is_usable(slot) || static_cast<int>(entry % capacity) >= tile.shared().count[slot]) return;
  const int64_t latent = tile.latents(0)[entry];
  const int32_t decoder_row = static_cast<int32_t>(tile.decoder_rows(0)[entry]);
  float value = 0.0f;
  if (decoder_row >= 0) {
    const LatentParameters parameters = load_parameters(tile.sae, latent);
    const float product = multiply<typename Tile::Weights, 1, 1>(tile.encoder_row(latent), 1, tile.d_model,
                                                                 tile.input(slot), tile.size, tile.from_memory());
    value = score_of(tile.sae, parameters, product).value;
    if (!finite(product) || !finite(value)) value = __uint_as_float(not_finite);
    if constexpr (Tile::aligned) {
      const int64_t row_bytes = tile.d_model * static_cast<int64_t>(sizeof(typename Tile::Storage));
      if (lane() == 0 && value > 0.0f)  // it will be read
        ptx::prefetch(tile.sae.W_dec.data + decoder_row * row_bytes, static_cast<uint32_t>(row_bytes));
    }
  }
  if (lane() == 0) tile.step.scratch.score[tile.first * tile.capacity + entry] = value;
}

// Scores lists, a few entries for each cluster, from the task on that it has taken. Only where clusters wait for all
// entries do they take more than once: not all of them may run yet.
template <class Tile>
__device__ __forceinline__ void score_lists(const Tile& tile, uint32_t task) {
  const uint32_t entries = static_cast<uint32_t>(tile.rows * tile.capacity), at_once = tile.step.entries_at_once;
  const uint32_t lookups = tile.step.looks_up ? static_cast<uint32_t>(tile.rows) : 0;  // the tasks before
  const uint32_t stride = tile.cluster.size * static_cast<uint32_t>(warps());
  // The last warp has the fewest rows of W_enc.
  const uint32_t own = tile.cluster.rank * static_cast<uint32_t>(warps()) + static_cast<uint32_t>(warps() - 1 - warp());
  while (task * at_once < entries) {
    const uint32_t first = task * at_once, left = entries - first, end = first + (left < at_once ? left : at_once);
    uint32_t done = 0;
#pragma unroll 1
    for (uint32_t entry = first + own; entry < end; entry += stride) {
      score_entry(tile, entry);
      ++done;
    }
    if (!tile.lists_come_first()) return;
    if (lane() == 0 && done > 0) ptx::add_acquire_release(tile.step.scratch.tasks_done + tile.index, done);
    task = take_task(tile) - lookups;
  }
}

// Waits for all scores, and finds out which rows need the pass: not those without an active entry, nor those whose
// active ones vanish anyway.
template <class Tile>
__device__ __forceinline__ void load_scores_and_decide(const Tile& tile) {
  wait_for_tasks(tile, tile.rows * tile.capacity + (tile.step.looks_up ? tile.rows : 0));
  load_scores(tile, false);
  for (int slot = warp(); slot < tile.rows; slot += warps()) {
    const Listed listed = tile.summary_of_list(slot, false);
    const bool certain = !tile.is_topk() && listed.vanishes(tile.shared().alpha[slot], listed.largest);
    if (lane() == 0) {
      tile.shared().reach[slot] = listed.reach;
      tile.shared().passes[slot] = listed.finite && (!tile.step.lazy || (listed.any && !certain));
    }
  }
  __syncthreads();
}

}  // namespace dspa::cuda
