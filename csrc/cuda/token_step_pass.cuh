// Phase 2 of a token step, the pass over W_enc for the rows of a tile: maxima, and ranks of listed latents for topk.
#pragma once

#include "token_step_lists.cuh"

namespace dspa::cuda {

// Adds to the ranks of the listed latents that come after this one.
template <class Tile>
__device__ __forceinline__ void count_ranks(const Tile& tile, int slot, int64_t latent, float z) {
  if (!(z > 0.0f)) return;
  const int64_t row = tile.first + slot, count = tile.list_size(row);
  for (int64_t i = 0; i < count; ++i) {
    const float listed = __uint_as_float(tile.score_bits(slot)[i]);
    if (!(listed > 0.0f) || z < listed) continue;
    if (z > listed || latent < tile.step.edits.latents[row * tile.capacity + i]) atomicAdd(tile.ranks(slot) + i, 1u);
  }
}

template <class Tile>
__device__ __forceinline__ void prepare_pass(const Tile& tile, uint32_t slots) {
  for (int slot = 0; slot < Tile::inputs; ++slot) {  // rows without an input are multiplied as zeros
    if ((tile.loaded >> slot & 1u) != 0) continue;
    for (int64_t i = threadIdx.x; i < tile.size; i += blockDim.x) tile.input(slot)[i] = 0.0f;
  }
  if (tile.step.lazy || tile.is_topk()) {
    for (int slot = warp(); slot < tile.rows; slot += warps()) {
      if ((slots >> slot & 1u) == 0) continue;
      const Listed listed = tile.summary_of_list(slot, false);
      if (lane() == 0) tile.shared().reach[slot] = listed.reach;
      const int64_t count = tile.list_size(tile.first + slot);
      for (int64_t i = lane(); i < count; i += 32) tile.ranks(slot)[i] = 0;
    }
  }
  if (threadIdx.x < Tile::inputs) tile.shared().maximum[threadIdx.x] = 0;
  __syncthreads();
}

// Each warp reads its own rows. Returns the largest activation that a lane has computed, of row
// `Tile::own_value() % Tile::inputs`.
template <class Tile>
__device__ __forceinline__ float pass_from_memory(const Tile& tile, uint32_t slots, int64_t begin, int64_t end) {
  const int slot = Tile::own_value() % Tile::inputs;
  const bool in_use = (slots >> slot & 1u) != 0;
  const bool may_stop = tile.step.lazy && !tile.is_topk();
  uint32_t* known_maximum = tile.step.scratch.maximum + tile.first + (in_use ? slot : 0);
  float largest = 0.0f;
#pragma unroll 1
  for (int64_t first = begin + warp() * Tile::rows_at_once; first < end; first += warps() * Tile::rows_at_once) {
    const float known = may_stop && in_use ? __uint_as_float(ptx::load_relaxed(known_maximum)) : 0.0f;
    const float product = multiply<typename Tile::Weights, Tile::rows_at_once, Tile::inputs>(
        tile.encoder_row(first), end - first, tile.d_model, tile.input(0), tile.size, tile.from_memory());
    const int64_t latent = first + Tile::own_value() / Tile::inputs;
    if (in_use && latent < end) {
      const Score score = score_of(tile.sae, latent, product);
      largest = fmaxf(largest, score.value);
      if (tile.is_topk() && lane() % Tile::lanes_per_value == 0) count_ranks(tile, slot, latent, score.z);
    }
    if (!may_stop) continue;
    if (in_use && largest > known) atomicMax(known_maximum, __float_as_uint(largest));
    const bool settled = !in_use || tile.shared().reach[slot] <= tile.alpha(tile.first + slot) * fmaxf(largest, known);
    if (__all_sync(all_lanes, settled) != 0) break;
  }
  return largest;
}

// The copy engine brings one row for each warp at a time, a few rounds ahead. For one input; no block stops early.
template <class Tile>
__device__ __forceinline__ float pass_through_ring(const Tile& tile, int64_t begin, int64_t end) {
  const uint32_t stages = tile.step.ring_stages;
  const int64_t row_bytes = tile.d_model * static_cast<int64_t>(sizeof(typename Tile::Storage));
  const int64_t rounds = (end - begin + warps() - 1) / warps();
  char* ring = reinterpret_cast<char*>(tile.listed_array(4, 0));
  ring += (ring_alignment - (ring - ptx::dynamic_shared()) % ring_alignment) % ring_alignment;
  const auto fetch = [&](int64_t round) {
    const uint32_t stage = static_cast<uint32_t>(round % stages);
    const int64_t first = begin + round * warps(), left = end - first;
    const uint32_t bytes = static_cast<uint32_t>((left < warps() ? left : warps()) * row_bytes);
    ptx::barrier_expect(&tile.shared().full[stage], bytes);
    ptx::copy_bulk(ring + stage * warps() * row_bytes, tile.encoder_row(first), bytes, &tile.shared().full[stage],
                   tile.policy);
  };
  if (threadIdx.x == 0) {
    for (uint32_t stage = 0; stage < stages; ++stage) {
      ptx::barrier_begin(&tile.shared().full[stage], 1);
      ptx::barrier_begin(&tile.shared().empty[stage], static_cast<uint32_t>(warps()));
    }
    ptx::barriers_have_begun();
    for (int64_t round = 0; round < stages && round < rounds; ++round) fetch(round);
  }
  __syncthreads();
  float largest = 0.0f;
#pragma unroll 1
  for (int64_t round = 0; round < rounds; ++round) {
    const uint32_t stage = static_cast<uint32_t>(round % stages), parity = static_cast<uint32_t>(round / stages % 2);
    ptx::barrier_wait(&tile.shared().full[stage], parity);
    const int64_t latent = begin + round * warps() + warp();
    if (latent < end) {
      const char* held = ring + (stage * warps() + warp()) * row_bytes;
      const auto* row = reinterpret_cast<const typename Tile::Storage*>(held);
      const float product = multiply<typename Tile::Weights, 1, 1>(row, 1, tile.d_model, tile.input(0), tile.size,
                                                                   FromShared<typename Tile::Weights>{});
      const Score score = score_of(tile.sae, latent, product);
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
    const int64_t row = tile.first + s, count = tile.list_size(row);
    for (int64_t i = lane(); i < count; i += 32)
      if (tile.ranks(s)[i] != 0) atomicAdd(tile.step.scratch.rank + row * tile.capacity + i, tile.ranks(s)[i]);
  }
}

template <class Tile>
__device__ __forceinline__ void pass(Tile& tile, bool lists_are_known) {
  if (lists_are_known) wait_for_lists(tile);
  uint32_t slots = lists_are_known ? tile.rows_not_settled() : tile.enabled_rows();
  tile.load_inputs(slots);
  if (lists_are_known)
    tile.load_lists(slots, false);
  else
    slots = tile.finite_rows(slots);
  if (slots == 0) return;
  prepare_pass(tile, slots);
  const int64_t shares = static_cast<int64_t>(tile.step.clusters_per_tile) * tile.cluster.size;
  const int64_t begin = tile.sae.W_enc.rows * tile.share / shares;
  const int64_t end = tile.sae.W_enc.rows * (tile.share + 1) / shares;
  float largest = 0.0f;
  int slot = 0;
  if constexpr (Tile::ring) {
    largest = pass_through_ring(tile, begin, end);
  } else {
    slot = Tile::own_value() % Tile::inputs;
    largest = pass_from_memory(tile, slots, begin, end);
  }
  publish(tile, slots, slot, largest);
}

}  // namespace dspa::cuda
