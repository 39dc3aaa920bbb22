// The edit of one token per row in one launch: encode, select, and write the decoded difference back.
//
// Rows of the batch go in tiles of `kInputs`; the clusters of a tile share out the rows of W_enc. A cluster's place in
// this order is the ticket that it took, not its index, so a cluster waits only for clusters that run already: nothing
// depends on how many run at a time.
//
//   1. The clusters of a tile take the edit lists of its rows one by one: the input is encoded, the listed latents are
//      scored, and rows that need no M_t are edited at once (lazy). In `dense` this comes after the pass, unless
//      ranks have to be counted for topk; else the clusters wait until all lists of their tile are done.
//   2. The pass over W_enc, once for all rows of the tile that need it: maxima, and ranks of listed latents for topk.
//   3. The last cluster of a tile to finish edits its rows and clears the scratch for the next launch.
//
// Sums are added in one order whatever the batch, the mode and the shape of the launch, and maxima and counts do not
// depend on any order: the same input gives the same bits.
#pragma once

#include "token_step_edit.cuh"
#include "token_step_lists.cuh"
#include "token_step_pass.cuh"

namespace dspa::cuda {

template <class Tile>
__device__ __forceinline__ bool is_last_of_tile(const Tile& tile) {
  tile.cluster.barrier();
  return tile.cluster.broadcast(&tile.shared().slot, [&] {
    return ptx::add_acquire_release(tile.step.scratch.clusters_done + tile.index, 1);
  }) == tile.step.clusters_per_tile - 1;
}

// Edits the rows that are left, and clears the scratch for the next launch.
template <class Tile>
__device__ __forceinline__ void finish_tile(const Tile& tile) {
  const Scratch& scratch = tile.step.scratch;
  const uint32_t rows = tile.rows_not_settled();
  tile.load_lists(rows, true);
  edit_rows(tile, rows, true);
  tile.cluster.barrier();  // the scratch is no longer read
  if (tile.cluster.rank != 0) return;
  for (int slot = warp(); slot < tile.rows; slot += warps()) {
    const int64_t row = tile.first + slot;
    for (int64_t i = lane(); tile.is_topk() && i < tile.capacity; i += 32) scratch.rank[row * tile.capacity + i] = 0;
    if (lane() == 0) scratch.settled[row] = scratch.maximum[row] = 0;
  }
  if (threadIdx.x != 0) return;
  scratch.clusters_done[tile.index] = scratch.lists_taken[tile.index] = scratch.lists_done[tile.index] = 0;
  if (ptx::add_acquire_release(scratch.tiles_done, 1) == tile.step.tiles - 1)
    *scratch.ticket = *scratch.tiles_done = 0;
}

// One block of the launch.
template <class Tile>
__device__ __forceinline__ void run(const TokenStep& step) {
  Tile tile(step);
  if (tile.cluster.size > 1) tile.cluster.barrier();  // a block is written to only once it runs
  const uint32_t ticket =
      tile.cluster.broadcast(&tile.shared().slot, [&] { return ptx::add_acquire_release(step.scratch.ticket, 1); });
  tile.index = ticket % step.tiles;
  tile.share = ticket / step.tiles * tile.cluster.size + tile.cluster.rank;
  tile.first = static_cast<int64_t>(tile.index) * Tile::inputs;
  const int64_t left = step.hidden.rows - tile.first;
  tile.rows = static_cast<int>(left < Tile::inputs ? left : Tile::inputs);

  const bool lists_first = step.lazy || tile.is_topk();
#pragma unroll 1
  for (int phase = 0; phase < 2; ++phase) {  // one copy of the code for either order
    if ((phase == 0) == lists_first)
      process_lists(tile);
    else
      pass(tile, lists_first);
  }
  if (is_last_of_tile(tile)) finish_tile(tile);
}

template <class Weights, int kInputs, bool kAligned>
__global__ void __launch_bounds__(most_threads, kInputs == 1 ? 2 : 1)
    token_step_kernel(const __grid_constant__ TokenStep step) {
  run<StepTile<Weights, kInputs, kAligned, false>>(step);
}

// Compiled for GPUs before sm_90 the kernel is empty with blocks of one warp, which is what the launcher checks.
template <class Weights>
__global__ void __launch_bounds__(ptx::has_bulk_copies ? most_threads : 32, ptx::has_bulk_copies ? 2 : 1)
    token_step_ring_kernel(const __grid_constant__ TokenStep step) {
  if constexpr (ptx::has_bulk_copies) run<StepTile<Weights, 1, true, true>>(step);
}

}  // namespace dspa::cuda
