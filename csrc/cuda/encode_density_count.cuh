// What the kernels that multiply tiles share: shared memory, and counting a tile by segments.
#pragma once

#include "encoder.cuh"
#include "operations.h"

namespace dspa::cuda {

constexpr int density_threads = 256;
constexpr int depth_step = 32;
constexpr int64_t tile_tokens = 256;  // the most that a tile has

// A tile at the beginning of dynamic shared memory, which is aligned to 128 bytes only.
constexpr int64_t shared_alignment = 128;

template <class Tile>
constexpr int64_t shared_bytes_of() {
  return static_cast<int64_t>(sizeof(Tile)) + (alignof(Tile) > shared_alignment ? alignof(Tile) - shared_alignment : 0);
}

template <class Tile>
__device__ __forceinline__ Tile& tile_in_shared() {
  char* memory = ptx::dynamic_shared();
  if constexpr (alignof(Tile) > shared_alignment)
    memory += (alignof(Tile) - ptx::shared_address(memory) % alignof(Tile)) % alignof(Tile);
  return *reinterpret_cast<Tile*>(memory);
}

template <class Integer>
__device__ __forceinline__ Integer smaller(Integer a, Integer b) {
  return a < b ? a : b;
}

// In which order blocks, or pairs of them, go through the tiles. Those that are multiplied at the same time share few
// latents and few tokens, so that both stay in the second-level cache: some tiles of tokens go through all latents, then
// the next.
struct TileOrder {
  static constexpr uint32_t token_tiles_together = 8;
  uint32_t token_tiles, latent_groups;  // of the latents of a block, or a pair

  __host__ __device__ __forceinline__ uint32_t tiles() const { return token_tiles * latent_groups; }

  __device__ __forceinline__ void place_of(uint32_t tile, uint32_t& token_tile, uint32_t& latent_group) const {
    const uint32_t together = tile / (token_tiles_together * latent_groups) * token_tiles_together;
    const uint32_t count = smaller(token_tiles - together, token_tiles_together);
    const uint32_t within = tile - together * latent_groups;
    token_tile = together + within % count;
    latent_group = within / count;
  }
};

// Whether the factor of a token has a number that is not finite, by the whole warp. Looked for where a product is not:
// an input that is not finite leaves none of its token finite, and otherwise they may be too large for a float32.
template <class Pairs>
__device__ __forceinline__ bool is_dirty(const EncodeDensity& task, int64_t token) {
  constexpr uint32_t exponent = Pairs::exponent | Pairs::exponent << 16;
  bool dirty = false;
  for (int64_t column = lane() * 8; column < task.sae.W_enc.columns; column += 256) {
    const uint4 eight = ptx::load_16(task.factors + token * task.factor_stride + column);
    for (const uint32_t two : {eight.x, eight.y, eight.z, eight.w})
      dirty = dirty || (two & exponent & 0xffffu) == Pairs::exponent || (two & exponent) >> 16 == Pairs::exponent;
  }
  return __any_sync(all_lanes, dirty) != 0;
}

// What the gate of a latent depends on, loaded once for all its products. Decides as `score_of` does.
template <Activation kActivation>
struct Gate {
  float bias = 0.0f, norm = 1.0f, bound = 0.0f, magnitude_scale = 0.0f, magnitude_bias = 0.0f;

  Gate() = default;

  __device__ __forceinline__ Gate(const Sae& sae, int64_t latent) {
    bias = sae.b_enc[latent];
    if (sae.decoder_norm != nullptr) norm = sae.decoder_norm[latent];
    if constexpr (kActivation == Activation::gated) {
      magnitude_scale = sae.magnitude_scale[latent];
      magnitude_bias = sae.magnitude_bias[latent];
    } else if constexpr (kActivation == Activation::threshold) {
      const float threshold = sae.threshold[latent];
      bound = threshold < 0.0f ? 0.0f : threshold;  // NaN, which nothing exceeds, stays NaN
    }
  }

  // For topk: whether the latent is, if it is among the k largest.
  __device__ __forceinline__ bool is_active(float product) const {
    const bool active = (product + bias) * norm > bound;
    if constexpr (kActivation == Activation::gated)
      return active && product * magnitude_scale + magnitude_bias > 0.0f;
    else
      return active;
  }

  // For topk: what latents are ranked by, 0 for all that are not active.
  __device__ __forceinline__ float score(float product) const {
    const float z = (product + bias) * norm;
    return z > 0.0f ? z : 0.0f;
  }
};

// Adds a tile's active latents to the counts, segment by segment. `segments` holds the segment of each of the tile's
// tokens; `add_own(segment)` adds a thread's own counts of that segment to the `counters` of the tile's latents. Both
// arrays are shared.
template <int kTokens, int kLatents, class AddOwn>
__device__ __forceinline__ void count_tile(const EncodeDensity& task, int64_t first_latent, const int32_t* segments,
                                           uint32_t* counters, const AddOwn& add_own) {
  int32_t segment = -1;
  while (true) {  // over the segments of the tile, in ascending order
    int32_t next = INT32_MAX;
    for (int t = 0; t < kTokens; ++t)
      if (segments[t] > segment && segments[t] < next) next = segments[t];
    if (next == INT32_MAX) return;
    segment = next;
    for (int i = static_cast<int>(threadIdx.x); i < kLatents; i += static_cast<int>(blockDim.x)) counters[i] = 0;
    __syncthreads();
    add_own(segment);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kLatents; i += static_cast<int>(blockDim.x))
      if (counters[i] != 0)
        atomicAdd(reinterpret_cast<uint32_t*>(task.counts) + segment * task.sae.W_enc.rows + first_latent + i,
                  counters[i]);
    __syncthreads();
  }
}

// The own part of a thread with few tokens, `row(i)` of the tile, and few latents, `column(j)`: bit i of active[j].
template <int kOwnLatents, class Row, class Column>
__device__ __forceinline__ void add_columns(int own_tokens, const uint32_t (&active)[kOwnLatents], const Row& row,
                                            const Column& column, const int32_t* segments, int32_t segment,
                                            uint32_t* counters) {
  uint32_t mine = 0;
  for (int i = 0; i < own_tokens; ++i) mine |= static_cast<uint32_t>(segments[row(i)] == segment) << i;
#pragma unroll
  for (int j = 0; j < kOwnLatents; ++j) {
    const uint32_t count = static_cast<uint32_t>(__popc(active[j] & mine));
    if (count != 0) atomicAdd(counters + column(j), count);
  }
}

}  // namespace dspa::cuda
