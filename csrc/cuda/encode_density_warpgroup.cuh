// Tiles of encode_density on the tensor cores, by warpgroups (sm_90a).
//
// One thread has the copy engine bring the factors, two warpgroups multiply. The latents are the rows of a product and
// the tokens its columns: a thread has two latents, and what it needs of these it loads once, before the products.
// Blocks come in pairs with neighbouring latents and the same tokens, of which each brings half to both. A block goes
// from tile to tile, so that the factors of the next one arrive while the scores of the last are counted.
#pragma once

#include "encode_density_count.cuh"
#include "encode_density_inputs.cuh"
#include "tensor_map.cuh"

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
  static constexpr int latents = 128, tokens = 256, depth = 64, stages = 4;
  static constexpr int copied_rows = 128;  // by one instruction
  static constexpr int warps = 8;          // that multiply
  static constexpr int threads = 32 * (warps + 4);  // another warpgroup brings the factors, as registers go by groups
  static constexpr int registers_to_multiply = 232, registers_to_bring = 40;  // of a thread
  static constexpr int cluster = 2;
  static constexpr uint32_t stage_bytes = (latents + tokens) * depth * 2;
  uint16_t weights[stages][latents][depth];  // as the copy engine lays them out: see swizzled_rows
  uint16_t inputs[stages][tokens][depth];
  uint64_t full[stages];
  uint64_t empty[stages];
};

// The two factors of the products, for the copy engine.
struct DensityMaps {
  TensorMap weights, inputs;
};

// The part of the thread that brings the factors of all tiles.
__device__ __forceinline__ void bring_factors(const EncodeDensity& task, const DensityMaps& maps,
                                              const TileOrder& order, WarpgroupTile& tile, uint32_t rank,
                                              uint32_t first_tile, uint32_t pairs) {
  using Tile = WarpgroupTile;
  const uint32_t depth_steps = static_cast<uint32_t>(task.depth / Tile::depth);
  uint32_t fills = 0;
  for (uint32_t number = first_tile; number < order.tiles(); number += pairs) {
    uint32_t token_tile, latent_group;
    order.place_of(number, token_tile, latent_group);
    const int32_t latent = static_cast<int32_t>((latent_group * Tile::cluster + rank) * Tile::latents);
    const int part = static_cast<int>(rank) * Tile::copied_rows;  // of the tokens, which both blocks need
    for (int piece = 0; piece < task.pieces; ++piece) {
      const int32_t row = static_cast<int32_t>(piece * task.tokens) + static_cast<int32_t>(token_tile * Tile::tokens);
      for (uint32_t step = 0; step < depth_steps; ++step, ++fills) {
        const uint32_t stage = fills % Tile::stages, round = fills / Tile::stages;
        if (round > 0) ptx::barrier_wait(&tile.empty[stage], (round - 1) % 2);
        ptx::barrier_expect(&tile.full[stage], Tile::stage_bytes);
        const int32_t column = static_cast<int32_t>(step * Tile::depth);
        ptx::copy_rows(tile.weights[stage], maps.weights, column, latent, &tile.full[stage]);
        ptx::copy_rows_to_pair(tile.inputs[stage][part], maps.inputs, column, row + part, &tile.full[stage]);
      }
    }
  }
}

// The products of a tile: sums of the warpgroup's 64 latents and all tokens.
template <class Pairs>
__device__ __forceinline__ void multiply_tile(float (&sums)[128], WarpgroupTile& tile, uint32_t steps,
                                              uint32_t& fills) {
  using Tile = WarpgroupTile;
  // The stage may be filled again, by both blocks.
  const auto release = [&](uint32_t stage) {
    __syncwarp();  // no other thread waits for its products any more
    if (lane() < Tile::cluster)
      ptx::barrier_arrive_in_cluster(&tile.empty[stage], static_cast<uint32_t>(lane()));
  };
  const int group_latent = warp() / 4 * 64;
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  ptx::settle(sums);
  uint32_t last = 0;
#pragma unroll 1
  for (uint32_t step = 0; step < steps; ++step, ++fills) {
    const uint32_t stage = fills % Tile::stages;
    ptx::barrier_wait(&tile.full[stage], fills / Tile::stages % 2);
    ptx::begin_products();
#pragma unroll
    for (int k = 0; k < Tile::depth; k += 16)
      ptx::multiply_add(Pairs{}, sums, swizzled_rows(&tile.weights[stage][group_latent][k]),
                        swizzled_rows(&tile.inputs[stage][0][k]));
    ptx::commit_products();
    ptx::wait_for_products<1>();  // those of the step before are done
    if (step > 0) release(last);
    last = stage;
  }
  ptx::wait_for_products<0>();
  ptx::settle(sums);
  release(last);
}

// What a thread has of a tile: two latents, `row(i)`, and 64 tokens, `column(bit)`, each a bit of a mask.
struct OwnPart {
  static __device__ __forceinline__ int row(int i) { return warp() / 4 * 64 + warp() % 4 * 16 + lane() / 4 + 8 * i; }
  static __device__ __forceinline__ int column(int bit) { return bit / 2 * 8 + lane() % 4 * 2 + bit % 2; }
  static __device__ __forceinline__ float sum(const float (&sums)[128], int i, int bit) {
    return sums[bit / 2 * 4 + i * 2 + bit % 2];
  }
  // Its tokens before a column of the tile.
  static __device__ __forceinline__ uint64_t before(int column) {
    const int within = column % 8 - lane() % 4 * 2;
    const int bits = column / 8 * 2 + (within < 0 ? 0 : within > 2 ? 2 : within);
    return bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  }
};

// The thread's tokens that are to be left out, where one of the warp's sums is not finite.
template <class Pairs>
__device__ __noinline__ uint64_t dirty_tokens(const EncodeDensity& task, int64_t first_token, uint64_t suspects) {
  uint64_t dirty = 0;
  for (int column = 0; column < WarpgroupTile::tokens && first_token + column < task.rows; ++column) {
    const uint64_t bit = OwnPart::before(column + 1) & ~OwnPart::before(column);
    if (__any_sync(all_lanes, (suspects & bit) != 0) != 0 && is_dirty<Pairs>(task, first_token + column)) dirty |= bit;
  }
  return dirty;
}

// Adds to the counts of the thread's latents, segment by segment. `active[i]` has the tokens where latent `row(i)` is.
struct TokenRange {
  int64_t begin = 0, end = 0;  // rows of the hidden states that are in a segment
  int64_t segment = 0;         // that of `begin`

  __device__ __forceinline__ TokenRange(const EncodeDensity& task, int64_t first_row) {
    const int64_t first = task.offsets[0], last = task.offsets[task.segments];
    begin = -smaller(-first_row, -first);
    end = smaller(smaller(first_row + WarpgroupTile::tokens, last), task.hidden.rows);
    if (begin < end) segment = find_segment(task, begin);
  }

  __device__ __forceinline__ void count(const EncodeDensity& task, int64_t first_row, int64_t first_latent,
                                        const uint64_t (&active)[2]) {
    while (begin < end) {
      const int64_t until = smaller(task.offsets[segment + 1], end);
      const uint64_t counted = OwnPart::before(static_cast<int>(until - first_row)) &
                               ~OwnPart::before(static_cast<int>(begin - first_row));
      uint32_t both = static_cast<uint32_t>(__popcll(active[0] & counted)) |
                      static_cast<uint32_t>(__popcll(active[1] & counted)) << 16;
      both += __shfl_xor_sync(all_lanes, both, 1);
      both += __shfl_xor_sync(all_lanes, both, 2);
      const int i = lane() % 4;  // of the four lanes with the same latents
      const int64_t latent = first_latent + OwnPart::row(i);
      const uint32_t count = i == 0 ? both & 0xffffu : both >> 16;
      if (i < 2 && count != 0)  // a latent that is not there is never active
        atomicAdd(reinterpret_cast<uint32_t*>(task.counts) + segment * task.sae.W_enc.rows + latent, count);
      begin = until;
      ++segment;
    }
  }
};

// The part of the warps that multiply.
template <class Pairs, Activation kActivation>
__device__ __forceinline__ void multiply_and_count(const EncodeDensity& task, const TileOrder& order,
                                                   WarpgroupTile& tile, uint32_t rank, uint32_t first_tile,
                                                   uint32_t pairs) {
  using Tile = WarpgroupTile;
  const int64_t d_sae = task.sae.W_enc.rows;
  const uint32_t steps = static_cast<uint32_t>(task.depth / Tile::depth) * static_cast<uint32_t>(task.pieces);
  uint32_t fills = 0;
#pragma unroll 1
  for (uint32_t number = first_tile; number < order.tiles(); number += pairs) {
    uint32_t token_tile, latent_group;
    order.place_of(number, token_tile, latent_group);
    const int64_t first_token = static_cast<int64_t>(token_tile) * Tile::tokens;
    const int64_t first_latent = static_cast<int64_t>(latent_group * Tile::cluster + rank) * Tile::latents;
    TokenRange range(task, task.first_token + first_token);
    Gate<kActivation> gates[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (const int64_t latent = first_latent + OwnPart::row(i); latent < d_sae)
        gates[i] = Gate<kActivation>(task.sae, latent);

    float sums[128];
    multiply_tile<Pairs>(sums, tile, steps, fills);

    if constexpr (kActivation == Activation::topk) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t latent = first_latent + OwnPart::row(i);
        if (latent >= d_sae) continue;
#pragma unroll
        for (int bit = 0; bit < 64; ++bit)
          task.scores[(first_token + OwnPart::column(bit)) * d_sae + latent] =
              gates[i].score(OwnPart::sum(sums, i, bit));
      }
    } else {
      uint64_t active[2] = {};
      float check = 0.0f;  // NaN if a sum is not finite
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t words[2] = {};
#pragma unroll
        for (int bit = 0; bit < 64; ++bit) {
          const float sum = OwnPart::sum(sums, i, bit);
          check = fmaf(sum, 0.0f, check);
          words[bit / 32] |= static_cast<uint32_t>(gates[i].is_active(sum)) << bit % 32;
        }
        active[i] = static_cast<uint64_t>(words[1]) << 32 | words[0];
      }
      if (__any_sync(all_lanes, !(check == 0.0f)) != 0) {
        uint64_t suspects = 0;
#pragma unroll
        for (int bit = 0; bit < 64; ++bit)
          if (!finite(OwnPart::sum(sums, 0, bit)) || !finite(OwnPart::sum(sums, 1, bit)))
            suspects |= uint64_t{1} << bit;
        const uint64_t dirty = dirty_tokens<Pairs>(task, first_token, suspects);
        active[0] &= ~dirty;
        active[1] &= ~dirty;
      }
      range.count(task, task.first_token + first_token, first_latent, active);
    }
  }
}

template <class Pairs, Activation kActivation>
__device__ __forceinline__ void count_by_warpgroups(const EncodeDensity& task, const DensityMaps& maps,
                                                    const TileOrder& order, uint32_t pairs) {
  WarpgroupTile& tile = tile_in_shared<WarpgroupTile>();
  const Cluster cluster;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < WarpgroupTile::stages; ++stage) {
      ptx::barrier_begin(&tile.full[stage], 1);
      ptx::barrier_begin(&tile.empty[stage], WarpgroupTile::warps * WarpgroupTile::cluster);
    }
    ptx::barriers_have_begun();
  }
  cluster.barrier();
  const uint32_t first_tile = blockIdx.x / WarpgroupTile::cluster;
  if (warp() < WarpgroupTile::warps) {
    ptx::take_registers<WarpgroupTile::registers_to_multiply>();
    multiply_and_count<Pairs, kActivation>(task, order, tile, cluster.rank, first_tile, pairs);
  } else {
    ptx::leave_registers<WarpgroupTile::registers_to_bring>();
    if (threadIdx.x == 32 * WarpgroupTile::warps)
      bring_factors(task, maps, order, tile, cluster.rank, first_tile, pairs);
    __syncwarp();
  }
  cluster.barrier();  // the other block may still copy to this one, and arrive at its barriers
}

// Compiled for other GPUs than sm_90a the kernel is empty with blocks of one warp, which is what the launcher checks.
template <class Pairs, Activation kActivation>
__global__ void __launch_bounds__(ptx::has_warpgroup_products ? WarpgroupTile::threads : 32, 1)
    density_warpgroup_kernel(const __grid_constant__ EncodeDensity task, const __grid_constant__ DensityMaps maps,
                             TileOrder order, uint32_t pairs) {
  if constexpr (ptx::has_warpgroup_products) count_by_warpgroups<Pairs, kActivation>(task, maps, order, pairs);
}

}  // namespace dspa::cuda
