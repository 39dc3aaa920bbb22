// What a block of a token step does before it knows anything: it asks for its first rows of W_enc, and loads the inputs
// and the lists of its tile.
#pragma once

#include "token_step_tile.cuh"

namespace dspa::cuda {

// Brings the first rows that each warp will read into the second-level cache: while a launch waits for the one before,
// and while its inputs are on the way.
template <class Tile>
__device__ __forceinline__ void prefetch_encoder(const Tile& tile) {
  if constexpr (Tile::aligned) {
    constexpr int rows = Tile::ring ? 1 : Tile::rows_at_once;
    constexpr int64_t most_bytes = loads_in_flight * 32 * 16 / rows;  // what a warp has in flight
    const int64_t row_bytes = tile.d_model * static_cast<int64_t>(sizeof(typename Tile::Storage));
    const int64_t latent = tile.begin + warp() * rows + lane();
    if (lane() < rows && latent < tile.end)
      ptx::prefetch(tile.encoder_row(latent), static_cast<uint32_t>(row_bytes < most_bytes ? row_bytes : most_bytes));
  }
}

// 16 bytes of hidden states at a time, of all rows of the tile. Only for rows that are whole 16 bytes and are not
// normalised: this is the common case, and its code is short, as every instruction has to be fetched once.
template <class Tile>
struct HiddenLoader {
  static constexpr int loads = 3;  // of a thread, in flight

  __device__ __forceinline__ explicit HiddenLoader(const Tile& tile_)
      : tile(tile_),
        per_load(tile_.step.hidden.dtype == Dtype::float32 ? 4 : 8),
        of_row(static_cast<uint32_t>(tile_.size) / per_load),
        count(of_row * static_cast<uint32_t>(tile_.rows)) {}

  __device__ __forceinline__ uint32_t place(uint32_t from, int i) const {
    return from + threadIdx.x + static_cast<uint32_t>(i) * blockDim.x;
  }

  __device__ __forceinline__ void load(uint32_t from, uint4 (&loaded)[loads]) const {
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      const uint32_t p = place(from, i), column = p % of_row * per_load;
      loaded[i] = p < count && column < static_cast<uint32_t>(tile.d_model)
                      ? ptx::load_16(row_of(tile.step.hidden, tile.first + p / of_row) + column * (16 / per_load))
                      : uint4{0, 0, 0, 0};
    }
  }

  __device__ __forceinline__ void store(uint32_t from, const uint4 (&loaded)[loads]) const {
    if (tile.step.hidden.dtype == Dtype::float32)
      store_numbers<Float32>(from, loaded);
    else if (tile.step.hidden.dtype == Dtype::bfloat16)
      store_numbers<Bfloat16>(from, loaded);
    else
      store_numbers<Float16>(from, loaded);
  }

  template <class Numbers>
  __device__ __forceinline__ void store_numbers(uint32_t from, const uint4 (&loaded)[loads]) const {
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      const uint32_t p = place(from, i), column = p % of_row * Numbers::per_load;
      if (p >= count) break;
      const int slot = static_cast<int>(p / of_row);
      float numbers[Numbers::per_load];
      Numbers::unpack(loaded[i], numbers);
      if (tile.sae.b_dec != nullptr && column < static_cast<uint32_t>(tile.d_model)) {
#pragma unroll
        for (int j = 0; j < Numbers::per_load; ++j) numbers[j] = numbers[j] - tile.sae.b_dec[column + j];
      }
      bool all_finite = true;
#pragma unroll
      for (int j = 0; j < Numbers::per_load; ++j) all_finite = all_finite & finite(numbers[j]);
#pragma unroll
      for (int j = 0; j < Numbers::per_load; j += 4)
        *reinterpret_cast<float4*>(tile.input(slot) + input_position<typename Tile::Weights>(column + j)) =
            float4{numbers[j], numbers[j + 1], numbers[j + 2], numbers[j + 3]};
      if (!all_finite) atomicMax(&tile.shared().nonfinite[slot], 1u);
    }
  }

  const Tile& tile;
  const uint32_t per_load, of_row, count;
};

template <class Tile>
__device__ __forceinline__ bool hidden_is_whole_16_bytes(const Tile& tile) {
  const StridedMatrix& hidden = tile.step.hidden;
  const int64_t size = hidden.dtype == Dtype::float32 ? 4 : 2;
  return hidden.column_stride == 1 && hidden.columns * size % 16 == 0 && hidden.row_stride * size % 16 == 0 &&
         reinterpret_cast<uintptr_t>(hidden.data) % 16 == 0;
}

// The lists as they are, whatever their length: nothing waits for the counts.
template <class Tile>
__device__ __forceinline__ void load_lists(const Tile& tile) {
  const int64_t listed = tile.rows * tile.capacity;
#pragma unroll 1
  for (int64_t e = threadIdx.x; e < listed; e += blockDim.x) {
    const int64_t latent = tile.step.edits.latents[tile.first * tile.capacity + e];
    tile.latents(0)[e] = static_cast<int32_t>(latent);
    tile.signs(0)[e] = tile.step.edits.signs[tile.first * tile.capacity + e];
    tile.decoder_rows(0)[e] = static_cast<uint32_t>(tile.decoder_row(latent));
  }
  if (threadIdx.x < static_cast<uint32_t>(tile.rows)) {
    const int64_t row = tile.first + threadIdx.x, count = tile.step.edits.counts[row];
    tile.shared().enabled[threadIdx.x] = tile.step.enabled == nullptr || tile.step.enabled[row];
    tile.shared().alpha[threadIdx.x] =
        tile.step.alpha_of_row == nullptr ? tile.step.alpha : tile.step.alpha_of_row[row];
    tile.shared().count[threadIdx.x] =
        static_cast<int32_t>(count < 0 ? 0 : count > tile.capacity ? tile.capacity : count);
  }
}

// By the whole block; all of it is in shared memory after the next barrier.
template <class Tile>
__device__ __forceinline__ void load_rows(const Tile& tile) {
  SharedHeader& shared = tile.shared();
  if (threadIdx.x < Tile::inputs) {
    shared.nonfinite[threadIdx.x] = shared.maximum[threadIdx.x] = 0;
    shared.kept[threadIdx.x] = 0;
  }
  __syncthreads();
#pragma unroll 1
  for (int64_t i = tile.rows * tile.size + threadIdx.x; i < Tile::inputs * tile.size; i += blockDim.x)
    tile.input(0)[i] = 0.0f;
  if (tile.sae.normalization == Normalization::none && hidden_is_whole_16_bytes(tile)) {
    const HiddenLoader<Tile> loader(tile);
#pragma unroll 1
    for (uint32_t from = 0; from < loader.count; from += HiddenLoader<Tile>::loads * blockDim.x) {
      uint4 loaded[HiddenLoader<Tile>::loads];
      loader.load(from, loaded);
      if (from == 0) load_lists(tile);
      loader.store(from, loaded);
    }
    return;
  }
  load_lists(tile);
#pragma unroll 1
  for (int slot = 0; slot < tile.rows; ++slot) {
    const Normalizer normalizer =
        normalizer_of(tile.step.hidden, tile.first + slot, tile.sae.normalization, shared.sums);
    if (threadIdx.x == 0) shared.scale[slot] = normalizer.scale;
    bool all_finite = finite(normalizer.scale);
    const char* from = row_of(tile.step.hidden, tile.first + slot);
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < tile.size; i += blockDim.x) {
      const float value = i < tile.d_model ? encoder_input(tile.step.hidden, from, i, tile.sae, normalizer) : 0.0f;
      all_finite = all_finite && finite(value);
      tile.input(slot)[input_position<typename Tile::Weights>(i)] = value;
    }
    if (!all_finite) atomicMax(&shared.nonfinite[slot], 1u);
  }
}

// Scores, and ranks if they are known, from the scratch, by the whole block.
template <class Tile>
__device__ __forceinline__ void load_scores(const Tile& tile, bool ranked) {
#pragma unroll 1
  for (int64_t e = threadIdx.x; e < tile.rows * tile.capacity; e += blockDim.x) {
    tile.score_bits(0)[e] = __float_as_uint(tile.step.scratch.score[tile.first * tile.capacity + e]);
    tile.ranks(0)[e] = ranked ? tile.step.scratch.rank[tile.first * tile.capacity + e] : 0;
  }
  __syncthreads();
}

}  // namespace dspa::cuda
