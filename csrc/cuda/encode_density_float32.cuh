// Tiles of encode_density with float32 additions.
#pragma once

#include "encode_density_count.cuh"

namespace dspa::cuda {

struct NumberTile {
  static constexpr int tokens = 64, latents = 64, depth = 16;
  float a[depth][tokens + 4];
  float b[depth][latents + 4];
  int32_t segments[tokens];
  uint32_t counters[latents];
};

template <class Weights, bool kTopk>
__global__ void __launch_bounds__(density_threads, 2)
    density_number_kernel(const __grid_constant__ EncodeDensity task, TileOrder order) {
  NumberTile& tile = tile_in_shared<NumberTile>();
  uint32_t token_tile, latent_tile;
  order.place_of(blockIdx.x, token_tile, latent_tile);
  const int64_t first_token = static_cast<int64_t>(token_tile) * NumberTile::tokens;
  const int64_t first_latent = static_cast<int64_t>(latent_tile) * NumberTile::latents;
  const int64_t d_sae = task.sae.W_enc.rows, d_model = task.sae.W_enc.columns;
  const auto* weights = reinterpret_cast<const typename Weights::Storage*>(task.sae.W_enc.data);
  const int thread = static_cast<int>(threadIdx.x);
  const int own_token = thread / 16 * 4, own_latent = thread % 16 * 4;

  float sums[4][4] = {};
  for (int64_t depth = 0; depth < task.depth; depth += NumberTile::depth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int number = thread + i * density_threads, row = number / NumberTile::depth, k = number % NumberTile::depth;
      tile.a[k][row] = task.inputs[(first_token + row) * task.depth + depth + k];
      const int64_t latent = first_latent + row;
      const bool valid = latent < d_sae && depth + k < d_model;
      tile.b[k][row] = valid ? Weights::number(weights[latent * d_model + depth + k]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < NumberTile::depth; ++k) {
      const float4 a = *reinterpret_cast<const float4*>(&tile.a[k][own_token]);
      const float4 b = *reinterpret_cast<const float4*>(&tile.b[k][own_latent]);
      const float of_tokens[4] = {a.x, a.y, a.z, a.w}, of_latents[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(of_tokens[i], of_latents[j], sums[i][j]);
    }
    __syncthreads();
  }

  if (thread < NumberTile::tokens) tile.segments[thread] = task.segment_of[first_token + thread];
  __syncthreads();
  const auto row = [&](int i) { return own_token + i; };
  const auto column = [&](int j) { return own_latent + j; };
  uint32_t active[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t latent = first_latent + column(j);
    if (latent >= d_sae) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = score_of(task.sae, latent, sums[i][j]).value;
      if constexpr (kTopk)
        task.scores[(first_token + row(i)) * d_sae + latent] = value;
      else
        active[j] |= static_cast<uint32_t>(value > 0.0f) << i;
    }
  }
  if constexpr (!kTopk)
    count_tile<NumberTile::tokens, NumberTile::latents>(
        task, first_latent, tile.segments, tile.counters, [&](int32_t segment) {
          add_columns(4, active, row, column, tile.segments, segment, tile.counters);
        });
}

}  // namespace dspa::cuda
