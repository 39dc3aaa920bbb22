// Tiles of encode_density on the tensor cores, by warps.
#pragma once

#include "encode_density_count.cuh"
#include "encode_density_inputs.cuh"

namespace dspa::cuda {

struct MatrixTile {
  static constexpr int tokens = 128, latents = 128, stages = 3;
  static constexpr int row_size = depth_step + 8;  // 80 bytes: eight rows lie in different banks
  uint16_t a[stages][tokens][row_size];
  uint16_t b[stages][latents][row_size];
  int32_t segments[tokens];
  uint32_t counters[latents];
};

template <class Pairs, Activation kActivation>
__global__ void __launch_bounds__(density_threads, 2)
    density_matrix_kernel(const __grid_constant__ EncodeDensity task, TileOrder order) {
  MatrixTile& tile = tile_in_shared<MatrixTile>();
  uint32_t token_tile, latent_tile;
  order.place_of(blockIdx.x, token_tile, latent_tile);
  const int64_t first_token = static_cast<int64_t>(token_tile) * MatrixTile::tokens;
  const int64_t first_latent = static_cast<int64_t>(latent_tile) * MatrixTile::latents;
  const int64_t d_sae = task.sae.W_enc.rows, d_model = task.sae.W_enc.columns;
  const auto* weights = reinterpret_cast<const uint16_t*>(task.sae.W_enc.data);
  const int64_t depth_steps = task.depth / depth_step, steps = depth_steps * task.pieces;
  const int thread = static_cast<int>(threadIdx.x);

  const auto fetch = [&](int64_t step) {
    const int stage = static_cast<int>(step % MatrixTile::stages);
    const int64_t piece = step / depth_steps, depth = step % depth_steps * depth_step;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int copy = thread + i * density_threads, row = copy / 4, column = copy % 4 * 8;
      const bool inside = depth + column < d_model;
      const int64_t token = first_token + row;
      const bool exists = inside && token < task.rows;
      const int64_t factor = exists ? (piece * task.tokens + token) * task.factor_stride + depth + column : 0;
      ptx::copy_async(&tile.a[stage][row][column], task.factors + factor, exists);
      const int64_t latent = first_latent + row;
      const bool valid = inside && latent < d_sae;
      ptx::copy_async(&tile.b[stage][row][column], valid ? weights + latent * d_model + depth + column : weights,
                      valid);
    }
  };

  // Warps are 2 by 4, each with 64 tokens by 32 latents.
  const int warp_token = warp() / 4 * 64, warp_latent = warp() % 4 * 32;
  float sums[4][4][4] = {};
#pragma unroll
  for (int step = 0; step < MatrixTile::stages - 1; ++step) {
    if (step < steps) fetch(step);
    ptx::commit_copies();
  }
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    ptx::wait_for_copies<MatrixTile::stages - 2>();
    __syncthreads();  // all copies have arrived, and the stage that is fetched next is no longer read
    if (step + MatrixTile::stages - 1 < steps) fetch(step + MatrixTile::stages - 1);
    ptx::commit_copies();
    const int stage = static_cast<int>(step % MatrixTile::stages);
#pragma unroll
    for (int k = 0; k < depth_step; k += 16) {
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        ptx::load_matrices(a[m], &tile.a[stage][warp_token + 16 * m + lane() % 16][k + lane() / 16 * 8]);
#pragma unroll
      for (int n = 0; n < 2; ++n)
        ptx::load_matrices(
            b[n], &tile.b[stage][warp_latent + 16 * n + lane() / 16 * 8 + lane() % 8][k + lane() / 8 % 2 * 8]);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          ptx::multiply_add(Pairs{}, sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }

  const auto row = [&](int i) { return warp_token + i / 2 * 16 + i % 2 * 8 + lane() / 4; };
  const auto column = [&](int j) { return warp_latent + j / 2 * 8 + lane() % 4 * 2 + j % 2; };
  const auto sum = [&](int i, int j) { return sums[i / 2][j / 2][i % 2 * 2 + j % 2]; };
  float check = 0.0f;  // NaN if a sum is not finite
  uint32_t active[8] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int64_t latent = first_latent + column(j);
    if (latent >= d_sae) continue;
    const Gate<kActivation> gate(task.sae, latent);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kActivation == Activation::topk) {
        task.scores[(first_token + row(i)) * d_sae + latent] = gate.score(sum(i, j));
      } else {
        check = fmaf(sum(i, j), 0.0f, check);
        active[j] |= static_cast<uint32_t>(gate.is_active(sum(i, j))) << i;
      }
    }
  }
  if constexpr (kActivation != Activation::topk) {
    if (thread < MatrixTile::tokens)
      tile.segments[thread] = find_segment(task, task.first_token + first_token + thread);
    if (__syncthreads_or(!(check == 0.0f)) != 0) {
      for (int t = warp(); t < MatrixTile::tokens && first_token + t < task.rows; t += warps())
        if (is_dirty<Pairs>(task, first_token + t)) tile.segments[t] = -1;
      __syncthreads();
    }
    count_tile<MatrixTile::tokens, MatrixTile::latents>(
        task, first_latent, tile.segments, tile.counters, [&](int32_t segment) {
          add_columns(8, active, row, column, tile.segments, segment, tile.counters);
        });
  }
}

}  // namespace dspa::cuda
