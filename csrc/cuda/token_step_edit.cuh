// The edit of the rows of a tile: factors of decoder rows, the new hidden states, and the counters.
#pragma once

#include "token_step_tile.cuh"

namespace dspa::cuda {

template <class Tile>
__device__ __forceinline__ void count_row(const Tile& tile, int64_t row, bool all_finite, bool edited, bool known,
                                          float maximum) {
  const Stats& stats = tile.step.stats;
  if (stats.seen == nullptr) return;
  stats.seen[row] += 1;
  stats.edited[row] += edited;
  stats.nonfinite[row] += !all_finite;
  stats.maximum[row] = known ? static_cast<double>(maximum) : static_cast<double>(__uint_as_float(not_finite));
  if (known) stats.maximum_sum[row] += static_cast<double>(maximum);
  stats.maximum_known[row] += known;
}

// The edit of a row's listed latents (docs/method.md, section 4), as factors of decoder rows in the order of the list.
template <class Tile>
__device__ __forceinline__ void compute_edit(const Tile& tile, int slot, bool after_pass) {
  const int64_t row = tile.first + slot, count = tile.list_size(row);
  const Listed listed = tile.summary_of_list(slot, after_pass);
  float maximum = listed.largest;
  if (after_pass) maximum = fmaxf(maximum, __uint_as_float(tile.step.scratch.maximum[row]));
  const float row_alpha = tile.alpha(row), shift = row_alpha * maximum;
  const bool needed = listed.any && !listed.vanishes(row_alpha, maximum);
  const auto difference = [&](int64_t i) {
    if (i >= count || !tile.is_active(slot, i, after_pass)) return 0.0f;
    const float score = __uint_as_float(tile.score_bits(slot)[i]);
    if (!needed) return -score;
    const bool ablated = tile.step.edits.signs[row * tile.capacity + i] < 0;
    const float moved = ablated ? fmaxf(score - shift, 0.0f) : score + shift;
    return moved - score;
  };
  bool good = listed.finite && !(needed && !finite(maximum));
  for (int64_t i = lane(); i < count; i += 32) good = good && finite(difference(i));
  good = __all_sync(all_lanes, good) != 0;

  int kept = 0;
  for (int64_t first = 0; good && first < count; first += 32) {
    const int64_t i = first + lane();
    float factor = difference(i);
    const uint32_t changed = __ballot_sync(all_lanes, factor != 0.0f);
    if (factor != 0.0f) {
      const int64_t latent = tile.step.edits.latents[row * tile.capacity + i];
      if (tile.sae.decoder_norm != nullptr) factor = factor / tile.sae.decoder_norm[latent];
      if (tile.sae.normalization != Normalization::none) factor = factor * tile.shared().scale[slot];
      const int place = kept + __popc(changed & ((1u << lane()) - 1u));
      tile.coefficients(slot)[place] = factor;
      tile.decoder_rows(slot)[place] = static_cast<uint32_t>(tile.decoder_row(latent));
      if (tile.cluster.rank == 0 && tile.step.stats.latent_edits != nullptr)
        atomicAdd(reinterpret_cast<unsigned long long*>(tile.step.stats.latent_edits + latent), 1ull);
    }
    kept += __popc(changed);
  }
  if (lane() != 0) return;
  tile.shared().kept[slot] = kept;
  if (tile.cluster.rank == 0) count_row(tile, row, good, kept > 0, good && (!tile.step.lazy || needed), maximum);
}

// Adds the decoded difference to the entries from `column` on.
template <class Tile>
__device__ __forceinline__ void write_piece(const Tile& tile, int slot, int64_t column) {
  constexpr int per_load = Tile::Weights::per_load;
  const auto* decoder = reinterpret_cast<const typename Tile::Storage*>(tile.sae.W_dec.data) + column;
  float sums[per_load] = {};
#pragma unroll 4
  for (int i = 0; i < tile.shared().kept[slot]; ++i) {
    float weights[per_load];
    const auto* from = decoder + static_cast<int64_t>(tile.decoder_rows(slot)[i]) * tile.d_model;
    if constexpr (Tile::aligned) {
      Tile::Weights::unpack(ptx::load_16(from), weights);
    } else {
#pragma unroll
      for (int j = 0; j < per_load; ++j) weights[j] = column + j < tile.d_model ? Tile::Weights::number(from[j]) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < per_load; ++j) sums[j] = fmaf(tile.coefficients(slot)[i], weights[j], sums[j]);
  }
  char* to = const_cast<char*>(row_of(tile.step.hidden, tile.first + slot));
#pragma unroll
  for (int j = 0; j < per_load; ++j) {
    const int64_t position = (column + j) * tile.step.hidden.column_stride;
    if (column + j < tile.d_model)
      store_number(to, tile.step.hidden.dtype, position, load_number(to, tile.step.hidden.dtype, position) + sums[j]);
  }
}

// Edits some rows and counts them: a warp computes the edit of each row, then the whole cluster writes.
template <class Tile>
__device__ __forceinline__ void edit_rows(const Tile& tile, uint32_t slots, bool after_pass) {
  for (int slot = warp(); slot < tile.rows; slot += warps())
    if ((slots >> slot & 1u) != 0) compute_edit(tile, slot, after_pass);
  __syncthreads();
  constexpr int per_load = Tile::Weights::per_load;
  const int64_t pieces = (tile.d_model + per_load - 1) / per_load;
  const int64_t stride = static_cast<int64_t>(tile.cluster.size) * blockDim.x;
#pragma unroll 1
  for (int64_t p = static_cast<int64_t>(tile.cluster.rank) * blockDim.x + threadIdx.x; p < tile.rows * pieces;
       p += stride) {
    const int slot = static_cast<int>(p / pieces);
    if ((slots >> slot & 1u) != 0 && tile.shared().kept[slot] > 0) write_piece(tile, slot, p % pieces * per_load);
  }
  __syncthreads();
}

}  // namespace dspa::cuda
