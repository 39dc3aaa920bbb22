// The edit of one token per row in one launch: encode, select, and write the decoded difference back.
//
// Rows of the batch go in tiles of `kInputs`; the clusters of a tile share out the rows of W_enc.
//
//   1. All clusters load the inputs and lists of their tile, and share out the listed latents, which are scored. Where
//      lists come first (topk, which counts ranks, and lazy mode, which may need no pass) they wait for all scores.
//   2. The pass over W_enc, once for all rows of the tile that need it: maxima, and ranks of listed latents for topk.
//   3. The last clusters of a tile to finish edit its rows and clear the scratch for the next launch. Hidden states are
//      written only when all clusters have read them.
//
// A cluster waits only for what clusters have taken that run already: nothing depends on how many run at a time.
//
// Sums are added in one order whatever the batch, the mode and the shape of the launch, and maxima and counts do not
// depend on any order: the same input gives the same bits.
#pragma once

#include "token_step_edit.cuh"
#include "token_step_pass.cuh"

namespace dspa::cuda {

// One block of the launch.
template <class Tile>
__device__ __forceinline__ void run(const TokenStep& step) {
  const Tile tile(step);
  prefetch_encoder(tile);
  ptx::wait_for_launches_before();
  if constexpr (Tile::ring) Ring<Tile>(tile).begin();
  if (tile.cluster.size > 1) tile.cluster.barrier();  // a block is written to only once it runs
  uint32_t task = 0;
  const bool takes = tile.cluster.rank == 0 && threadIdx.x == blockDim.x - 32;
  if (step.looks_up)
    task = look_up(tile);
  else if (takes)
    task = atomicAdd(step.scratch.tasks_taken + tile.index, 1u);  // answered while rows are loaded
  load_rows(tile);
  if (takes) tile.cluster.store_everywhere(&tile.shared().task, task);
  tile.cluster.barrier();
  score_lists(tile, tile.shared().task);
  pass(tile);
  ptx::let_next_launch_begin();
  TileEdit<Tile>(tile).run();
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
