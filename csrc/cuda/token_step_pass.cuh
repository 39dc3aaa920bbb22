// Phase 2 of a token step, the pass over W_enc for the rows of a tile: maxima, and ranks of listed latents for topk.
#pragma once

#include "token_step_lists.cuh"

namespace dspa::cuda {

// Adds to the ranks of the listed latents that come after this one.
template <class Tile>
__device__ __forceinline__ void count_ranks(const Tile& tile, int slot, int64_t latent, float z) {
  if (!(z > 0.0f)) return;
  const int count = tile.shared().count[slot];
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const float listed = __uint_as_float(tile.score_bits(slot)[i]);
    if (!(listed > 0.0f) || z < listed) continue;
    if (z > listed || latent < tile.latents(slot)[i]) atomicAdd(tile.ranks(slot) + i, 1u);
  }
}

// The rows that the pass is for.
template <class Tile>
__device__ __forceinline__ uint32_t rows_to_pass(const Tile& tile) {
  const bool decided = tile.lists_come_first();
  if (decided) load_scores_and_decide(tile);
  uint32_t found = 0;
  for (int slot = 0; slot < tile.rows; ++slot)
    if (tile.is_usable(slot) && (!decided || tile.shared().passes[slot] != 0)) found |= 1u << slot;
  return found;
}

// Each warp reads its own rows. Returns the largest activation that a lane has computed, of row
// `Tile::own_value() % Tile::inputs`.
template <class Tile>
__device__ __forceinline__ float pass_from_memory(const Tile& tile, uint32_t slots) {
  const int slot = Tile::own_value() % Tile::inputs;
  const bool in_use = (slots >> slot & 1u) != 0;
  const bool may_stop = tile.step.lazy && !tile.is_topk();
  uint32_t* known_maximum = tile.step.scratch.maximum + tile.first + (in_use ? slot : 0);
  float largest = 0.0f;
#pragma unroll 1
  for (int32_t first = tile.begin + warp() * Tile::rows_at_once; first < tile.end;
       first += warps() * Tile::rows_at_once) {
    const float known = may_stop && in_use ? __uint_as_float(ptx::load_relaxed(known_maximum)) : 0.0f;
    const int32_t latent = first + Tile::own_value() / Tile::inputs;
    const LatentParameters parameters = load_parameters(tile.sae, latent < tile.end ? latent : first);
    const float product = multiply<typename Tile::Weights, Tile::rows_at_once, Tile::inputs>(
        tile.encoder_row(first), tile.end - first, tile.d_model, tile.input(0), tile.size, tile.from_memory());
    if (in_use && latent < tile.end) {
      const Score score = score_of(tile.sae, parameters, product);
      largest = fmaxf(largest, score.value);
      if (tile.is_topk() && lane() % Tile::lanes_per_value == 0) count_ranks(tile, slot, latent, score.z);
    }
    if (!may_stop) continue;
    if (in_use && largest > known) atomicMax(known_maximum, __float_as_uint(largest));
    const bool settled = !in_use || tile.shared().reach[slot] <= tile.shared().alpha[slot] * fmaxf(largest, known);
    if (__all_sync(all_lanes, settled) != 0) break;
  }
  return largest;
}

// The copy engine brings one row for each warp at a time, a few rounds ahead. For one input; no block stops early.
template <class Tile>
struct Ring {
  using Storage = typename Tile::Storage;

  __device__ __forceinline__ explicit Ring(const Tile& tile_)
      : tile(tile_),
        row_bytes(static_cast<int32_t>(tile_.d_model) * static_cast<int32_t>(sizeof(Storage))),
        rounds((tile_.end - tile_.begin + warps() - 1) / warps()),
        stages(static_cast<int32_t>(tile_.step.ring_stages)),
        early(tile_.step.lazy ? 1 : stages) {
    const int64_t offset = reinterpret_cast<char*>(tile.listed_array(listed_arrays, 0)) - ptx::dynamic_shared();
    memory = ptx::dynamic_shared() + (offset + ring_alignment - 1) / ring_alignment * ring_alignment;
  }

  __device__ __forceinline__ void fetch(int32_t round) const {
    const int32_t stage = round % stages;
    const int32_t first = tile.begin + round * warps(), left = tile.end - first;
    const uint32_t bytes = static_cast<uint32_t>((left < warps() ? left : warps()) * row_bytes);
    ptx::barrier_expect(&tile.shared().full[stage], bytes);
    ptx::copy_bulk(memory + stage * warps() * row_bytes, tile.encoder_row(first), bytes, &tile.shared().full[stage],
                   tile.policy);
  }

  // Before anything else. The others may look at the barriers after the block's next one.
  __device__ __forceinline__ void begin() const {
    if (threadIdx.x != 0) return;
    for (int32_t stage = 0; stage < stages; ++stage) {
      ptx::barrier_begin(&tile.shared().full[stage], 1);
      ptx::barrier_begin(&tile.shared().empty[stage], static_cast<uint32_t>(warps()));
    }
    ptx::barriers_have_begun();
    for (int32_t round = 0; round < early && round < rounds; ++round) fetch(round);
  }

  // Instead of the pass: a block may not end before what is copied into its memory has arrived.
  __device__ __forceinline__ void drop() const {
    if (threadIdx.x != 0) return;
    for (int32_t round = 0; round < early && round < rounds; ++round) ptx::barrier_wait(&tile.shared().full[round], 0);
  }

  __device__ __forceinline__ float pass() const {
    if (threadIdx.x == 0)
      for (int32_t round = early; round < stages && round < rounds; ++round) fetch(round);
    float largest = 0.0f;
#pragma unroll 1
    for (int32_t round = 0; round < rounds; ++round) {
      const int32_t stage = round % stages;
      const uint32_t parity = static_cast<uint32_t>(round / stages % 2);
      const int32_t latent = tile.begin + round * warps() + warp();
      const LatentParameters parameters = load_parameters(tile.sae, latent < tile.end ? latent : tile.begin);
      ptx::barrier_wait(&tile.shared().full[stage], parity);
      if (latent < tile.end) {
        const auto* row = reinterpret_cast<const Storage*>(memory + (stage * warps() + warp()) * row_bytes);
        const float product = multiply<typename Tile::Weights, 1, 1>(row, 1, tile.d_model, tile.input(0), tile.size,
                                                                     FromShared<typename Tile::Weights>{});
        const Score score = score_of(tile.sae, parameters, product);
        largest = fmaxf(largest, score.value);
        if (tile.is_topk() && lane() == 0) count_ranks(tile, 0, latent, score.z);
      }
      __syncwarp();
      if (lane() == 0) ptx::barrier_arrive(&tile.shared().empty[stage]);
      if (threadIdx.x == 0 && round + stages < rounds) {
        ptx::barrier_wait(&tile.shared().empty[stage], parity);
        fetch(round + stages);
      }
    }
    return largest;
  }

  const Tile& tile;
  const int32_t row_bytes, rounds, stages;
  const int32_t early;  // in lazy mode the pass may not be needed, and lists are first to be read
  char* memory;
};

// Merges the maxima and ranks of the block into those of the launch.
template <class Tile>
__device__ __forceinline__ void publish(const Tile& tile, uint32_t slots, int slot, float largest) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    // Lanes that are `offset` apart share a slot.
    if (offset >= Tile::lanes_per_value * Tile::inputs || offset < Tile::lanes_per_value)
      largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, offset));
  if (largest > 0.0f && lane() < Tile::lanes_per_value * Tile::inputs && lane() % Tile::lanes_per_value == 0)
    atomicMax(&tile.shared().maximum[slot], __float_as_uint(largest));
  __syncthreads();
  if (threadIdx.x < Tile::inputs && (slots >> threadIdx.x & 1u) != 0 && tile.shared().maximum[threadIdx.x] != 0)
    atomicMax(tile.step.scratch.maximum + tile.first + threadIdx.x, tile.shared().maximum[threadIdx.x]);
  if (!tile.is_topk()) return;
  for (int s = warp(); s < tile.rows; s += warps()) {
    if ((slots >> s & 1u) == 0) continue;
    uint32_t* ranks = tile.step.scratch.rank + (tile.first + s) * tile.capacity;
#pragma unroll 1
    for (int i = lane(); i < tile.shared().count[s]; i += 32)
      if (tile.ranks(s)[i] != 0) atomicAdd(ranks + i, tile.ranks(s)[i]);
  }
}

template <class Tile>
__device__ __forceinline__ void pass(const Tile& tile) {
  const uint32_t slots = rows_to_pass(tile);
  if constexpr (Tile::ring) {
    const Ring<Tile> ring(tile);
    if (slots == 0)
      ring.drop();
    else
      publish(tile, slots, 0, ring.pass());
  } else {
    if (slots != 0) publish(tile, slots, Tile::own_value() % Tile::inputs, pass_from_memory(tile, slots));
  }
}

}  // namespace dspa::cuda
