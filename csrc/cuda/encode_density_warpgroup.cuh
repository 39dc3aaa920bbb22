// Tiles of encode_density on the tensor cores, by warpgroups (sm_90a).
#pragma once

#include "encode_density_count.cuh"

namespace dspa::cuda {

// The descriptor of a matrix for the tensor cores: rows of 64 16-bit numbers, 128 bytes, contiguous, where piece c
// (16 bytes) of row r lies at place c ^ r % 8. `first` is in row 0, which begins at a multiple of 1024 bytes; columns
// before it are skipped, 16 at a time.
__device__ __forceinline__ uint64_t swizzled_rows(const void* first) {
  constexpr uint64_t of_eight_rows = 1024, not_used = 1, swizzle_of_128_bytes = 1;
  const uint64_t start = ptx::shared_address(first) & 0x3ffff;
  return start >> 4 | not_used << 16 | of_eight_rows >> 4 << 32 | swizzle_of_128_bytes << 62;
}

struct alignas(1024) WarpgroupTile {
  static constexpr int tokens = 128, latents = 256, depth = 64, stages = 4;
  static constexpr int copies_ahead = stages - 2;  // of the products; the stage that is left is still being multiplied
  uint16_t a[stages][tokens][depth];               // rows whose pieces of 16 bytes are permuted: see swizzled_rows
  uint16_t b[stages][latents][depth];
  int32_t segments[tokens];
  uint32_t counters[latents];
};

// The lowest four bits, a byte each.
__device__ __forceinline__ uint32_t bytes_of_bits(uint32_t bits) { return (bits & 15u) * 0x00204081u & 0x01010101u; }

// Two warpgroups share a tile, each with 64 of its tokens and all of its latents. All threads bring the next stages
// while the tensor cores multiply.
template <class Pairs, bool kTopk>
__device__ __forceinline__ void count_by_warpgroups(const EncodeDensity& task, uint32_t token_tiles) {
  WarpgroupTile& tile = tile_in_shared<WarpgroupTile>();
  const int64_t first_token = static_cast<int64_t>(blockIdx.x % token_tiles) * WarpgroupTile::tokens;
  const int64_t first_latent = static_cast<int64_t>(blockIdx.x / token_tiles) * WarpgroupTile::latents;
  const int64_t d_sae = task.sae.W_enc.rows, d_model = task.sae.W_enc.columns;
  const auto* weights = reinterpret_cast<const uint16_t*>(task.sae.W_enc.data);
  const int depth_steps = static_cast<int>(task.depth / WarpgroupTile::depth), steps = depth_steps * task.pieces;
  const int thread = static_cast<int>(threadIdx.x);

  // Eight threads bring a row: each one piece of 16 bytes of every 32nd row.
  constexpr int rows_at_once = density_threads / 8;
  const int own_row = thread / 8, own_piece = thread % 8, place = (own_piece ^ own_row % 8) * 8;
  const auto fetch = [&](int step) {
    const int stage = step % WarpgroupTile::stages;
    const int64_t piece = step / depth_steps, column = step % depth_steps * WarpgroupTile::depth + own_piece * 8;
#pragma unroll
    for (int i = 0; i < WarpgroupTile::tokens / rows_at_once; ++i) {
      const int row = own_row + i * rows_at_once;
      ptx::copy_async(&tile.a[stage][row][place],
                      task.halves + (piece * task.tokens + first_token + row) * task.depth + column, true);
    }
#pragma unroll
    for (int i = 0; i < WarpgroupTile::latents / rows_at_once; ++i) {
      const int row = own_row + i * rows_at_once;
      const int64_t latent = first_latent + row;
      const bool valid = latent < d_sae && column < d_model;
      ptx::copy_async(&tile.b[stage][row][place], valid ? weights + latent * d_model + column : weights, valid);
    }
  };

  const int group_token = warp() / 4 * 64;
  float sums[128] = {};
#pragma unroll
  for (int step = 0; step < WarpgroupTile::copies_ahead; ++step) {
    if (step < steps) fetch(step);
    ptx::commit_copies();
  }
  ptx::settle(sums);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::wait_for_copies<WarpgroupTile::copies_ahead - 1>();
    ptx::show_to_tensor_cores();
    __syncthreads();  // all copies have arrived, and all products but those of the last step are done
    const int stage = step % WarpgroupTile::stages;
    ptx::begin_products();
#pragma unroll
    for (int k = 0; k < WarpgroupTile::depth; k += 16)
      ptx::multiply_add(Pairs{}, sums, swizzled_rows(&tile.a[stage][group_token][k]),
                        swizzled_rows(&tile.b[stage][0][k]));
    ptx::commit_products();
    if (step + WarpgroupTile::copies_ahead < steps) fetch(step + WarpgroupTile::copies_ahead);
    ptx::commit_copies();
    ptx::wait_for_products<1>();
  }
  ptx::wait_for_products<0>();
  ptx::settle(sums);

  if (thread < WarpgroupTile::tokens) tile.segments[thread] = task.segment_of[first_token + thread];
  __syncthreads();
  // A thread has two tokens and 64 latents, of which those that the lanes l, l + 4, l + 8, ... have are the same.
  const auto row = [&](int i) { return group_token + warp() % 4 * 16 + lane() / 4 + 8 * i; };
  const auto column = [&](int j) { return j / 2 * 8 + lane() % 4 * 2 + j % 2; };
  uint32_t active[2][2] = {};  // of each token, a bit for each latent
#pragma unroll
  for (int j = 0; j < 64; ++j) {
    const int64_t latent = first_latent + column(j);
    if (latent >= d_sae) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float value = score_of(task.sae, latent, sums[j / 2 * 4 + i * 2 + j % 2]).value;
      if constexpr (kTopk)
        task.scores[(first_token + row(i)) * d_sae + latent] = value;
      else
        active[i][j / 32] |= static_cast<uint32_t>(value > 0.0f) << j % 32;
    }
  }
  if constexpr (!kTopk)
    count_tile<WarpgroupTile::tokens, WarpgroupTile::latents>(
        task, first_latent, tile.segments, tile.counters, [&](int32_t segment) {
          const bool mine[2] = {tile.segments[row(0)] == segment, tile.segments[row(1)] == segment};
#pragma unroll
          for (int j = 0; j < 64; j += 4) {  // four latents at a time, a byte each: a warp has 16 tokens
            uint32_t found = 0;
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (mine[i]) found += bytes_of_bits(active[i][j / 32] >> j % 32);
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) found += __shfl_xor_sync(all_lanes, found, offset);
            if (j / 4 % 8 != lane() / 4) continue;  // all of these lanes have the sum; one adds it
#pragma unroll
            for (int byte = 0; byte < 4; ++byte)
              if ((found >> 8 * byte & 255u) != 0)
                atomicAdd(tile.counters + column(j + byte), found >> 8 * byte & 255u);
          }
        });
}

// Compiled for other GPUs than sm_90a the kernel is empty with blocks of one warp, which is what the launcher checks.
template <class Pairs, bool kTopk>
__global__ void __launch_bounds__(ptx::has_warpgroup_products ? density_threads : 32, 1)
    density_warpgroup_kernel(const __grid_constant__ EncodeDensity task, uint32_t token_tiles) {
  if constexpr (ptx::has_warpgroup_products) count_by_warpgroups<Pairs, kTopk>(task, token_tiles);
}

}  // namespace dspa::cuda
