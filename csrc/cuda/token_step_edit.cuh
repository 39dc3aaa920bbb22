// The edit of the rows of a tile: factors of decoder rows, the new hidden states, and the counters.
#pragma once

#include "token_step_tile.cuh"

namespace dspa::cuda {

// Counts the rows of the tile, a lane for each. All counters are loaded before any is stored: nothing says that they are
// not the same memory, and each would wait for the one before.
template <class Tile>
__device__ __forceinline__ void count_rows(const Tile& tile) {
  const Stats& stats = tile.step.stats;
  const SharedHeader& shared = tile.shared();
  if (stats.seen == nullptr || lane() >= tile.rows || shared.enabled[lane()] == 0) return;
  const int64_t row = tile.first + lane();
  const uint32_t outcome = shared.outcome[lane()];
  const bool known = (outcome & maximum_is_known) != 0;
  const float maximum = __uint_as_float(shared.maximum[lane()]);
  const int64_t seen = stats.seen[row], edited = stats.edited[row], nonfinite = stats.nonfinite[row];
  const int64_t maximum_known = stats.maximum_known[row];
  const double maximum_sum = stats.maximum_sum[row];
  stats.seen[row] = seen + 1;
  stats.edited[row] = edited + (shared.kept[lane()] > 0);
  stats.nonfinite[row] = nonfinite + ((outcome & is_finite) == 0);
  stats.maximum[row] = static_cast<double>(known ? maximum : __uint_as_float(not_finite));
  if (known) stats.maximum_sum[row] = maximum_sum + static_cast<double>(maximum);
  stats.maximum_known[row] = maximum_known + known;
}

// The edit of a row's listed latents (docs/method.md, section 4), as factors of decoder rows in the order of the list,
// by a warp. `counts`: this block counts it.
template <class Tile>
__device__ __forceinline__ void compute_edit(const Tile& tile, int slot, bool counts) {
  SharedHeader& shared = tile.shared();
  if (lane() == 0) shared.outcome[slot] = 0;
  if (!tile.is_usable(slot)) return;
  const int count = shared.count[slot];
  const Listed listed = tile.summary_of_list(slot, true);
  const float maximum = fmaxf(listed.largest, __uint_as_float(shared.maximum[slot]));
  const float row_alpha = shared.alpha[slot], shift = row_alpha * maximum;
  const bool needed = listed.any && !listed.vanishes(row_alpha, maximum);
  const auto difference = [&](int i) {
    if (i >= count || !tile.is_active(slot, i, true)) return 0.0f;
    const float score = __uint_as_float(tile.score_bits(slot)[i]);
    if (!needed) return -score;
    const float moved = tile.signs(slot)[i] < 0.0f ? fmaxf(score - shift, 0.0f) : score + shift;
    return moved - score;
  };
  bool good = listed.finite && !(needed && !finite(maximum));
#pragma unroll 1
  for (int i = lane(); i < count; i += 32) good = good && finite(difference(i));
  good = __all_sync(all_lanes, good) != 0;

  int kept = 0;
#pragma unroll 1
  for (int first = 0; good && first < count; first += 32) {
    const int i = first + lane();
    float factor = difference(i);
    const uint32_t changed = __ballot_sync(all_lanes, factor != 0.0f);
    const uint32_t decoder_row = factor != 0.0f ? tile.decoder_rows(slot)[i] : 0;
    __syncwarp();  // what is kept takes the place of signs and rows that have been read
    if (factor != 0.0f) {
      const int64_t latent = tile.latents(slot)[i];
      if (tile.sae.decoder_norm != nullptr) factor = factor / tile.sae.decoder_norm[latent];
      if (tile.sae.normalization != Normalization::none) factor = factor * shared.scale[slot];
      const int place = kept + __popc(changed & ((1u << lane()) - 1u));
      tile.coefficients(slot)[place] = factor;
      tile.decoder_rows(slot)[place] = decoder_row;
      if (counts && tile.step.stats.latent_edits != nullptr)
        atomicAdd(reinterpret_cast<unsigned long long*>(tile.step.stats.latent_edits + latent), 1ull);
    }
    kept += __popc(changed);
  }
  if (lane() != 0) return;
  shared.kept[slot] = kept;
  shared.maximum[slot] = __float_as_uint(maximum);
  shared.outcome[slot] = good ? is_finite | (!tile.step.lazy || needed ? maximum_is_known : 0u) : 0u;
}

constexpr int piece_size = 4;  // entries of a row that a thread edits

// Of a row of W_dec, for a piece.
template <class Weights>
struct PieceOfWeights {
  static constexpr bool is_wide = Weights::per_load == piece_size;  // 16 bytes, else 8
  static constexpr int in_flight = 8;
  uint32_t words[is_wide ? 4 : 2];

  __device__ __forceinline__ void load(const typename Weights::Storage* from) {
    if constexpr (is_wide) {
      const uint4 loaded = ptx::load_16(from);
      words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    } else {
      const uint2 loaded = ptx::load_8(from);
      words[0] = loaded.x, words[1] = loaded.y;
    }
  }

  __device__ __forceinline__ void unpack(float (&numbers)[piece_size]) const {
    float all[Weights::per_load];
    if constexpr (is_wide)
      Weights::unpack(uint4{words[0], words[1], words[2], words[3]}, all);
    else
      Weights::unpack(uint4{words[0], words[1], 0, 0}, all);
#pragma unroll
    for (int j = 0; j < piece_size; ++j) numbers[j] = all[j];
  }
};

// Adds the decoded difference to the entries from `column` on.
template <class Tile>
__device__ __forceinline__ void write_piece(const Tile& tile, int slot, int64_t column) {
  using Piece = PieceOfWeights<typename Tile::Weights>;
  const auto* decoder = reinterpret_cast<const typename Tile::Storage*>(tile.sae.W_dec.data) + column;
  char* to = const_cast<char*>(row_of(tile.step.hidden, tile.first + slot));
  const auto position = [&](int j) { return (column + j) * tile.step.hidden.column_stride; };
  float sums[piece_size] = {}, before[piece_size];
#pragma unroll
  for (int j = 0; j < piece_size; ++j)
    before[j] = column + j < tile.d_model ? load_number(to, tile.step.hidden.dtype, position(j)) : 0.0f;
  const int kept = tile.shared().kept[slot];
  const auto decoder_row = [&](int i) {
    return decoder + static_cast<int64_t>(tile.decoder_rows(slot)[i]) * tile.d_model;
  };
  const auto add = [&](int i, const float (&weights)[piece_size]) {
#pragma unroll
    for (int j = 0; j < piece_size; ++j) sums[j] = fmaf(tile.coefficients(slot)[i], weights[j], sums[j]);
  };
  float weights[piece_size];
  if constexpr (Tile::aligned) {
#pragma unroll 1
    for (int first = 0; first < kept; first += Piece::in_flight) {
      Piece loaded[Piece::in_flight];
#pragma unroll
      for (int i = 0; i < Piece::in_flight; ++i)
        if (first + i < kept) loaded[i].load(decoder_row(first + i));
#pragma unroll
      for (int i = 0; i < Piece::in_flight; ++i) {
        if (first + i >= kept) break;
        loaded[i].unpack(weights);
        add(first + i, weights);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kept; ++i) {
#pragma unroll
      for (int j = 0; j < piece_size; ++j)
        weights[j] = column + j < tile.d_model ? Tile::Weights::number(decoder_row(i)[j]) : 0.0f;
      add(i, weights);
    }
  }
#pragma unroll
  for (int j = 0; j < piece_size; ++j)
    if (column + j < tile.d_model) store_number(to, tile.step.hidden.dtype, position(j), before[j] + sums[j]);
}

// The edit of a tile by the clusters that come last. A slice of it is a piece for each thread, but for those of
// the last warp, which takes slices meanwhile.
template <class Tile>
struct TileEdit {
  static constexpr uint32_t has_edited = 65536;  // in clusters_done
  static constexpr int most_looks = 64;          // for clusters that have not passed yet, before the others give up

  __device__ __forceinline__ explicit TileEdit(const Tile& tile_)
      : tile(tile_),
        cluster(tile_.cluster),
        clusters(tile_.step.clusters_per_tile),
        is_clerk(warp() == warps() - 1 && tile_.cluster.rank == 0),
        writers(warps() > 1 ? blockDim.x - 32 : 32),
        row_pieces(static_cast<uint32_t>((tile_.d_model + piece_size - 1) / piece_size)),
        pieces(row_pieces * static_cast<uint32_t>(tile_.rows)),
        slices((pieces + cluster.size * writers - 1) / (cluster.size * writers)),
        hands(clusters < slices ? clusters : slices) {}

  // The last clusters that arrive wait for a moment until all have, and help. What they leave, the last one does: no
  // cluster depends on others that may not run yet.
  __device__ __forceinline__ void run() const {
    uint32_t* arrivals = tile.step.scratch.clusters_done + tile.index;
    cluster.barrier();
    const uint32_t arrived = cluster.broadcast(
        &tile.shared().slot, [&] { return ptx::add_acquire_release(arrivals, 1) % has_edited; });
    if (arrived + hands < clusters) return;
    bool all = arrived + 1 == clusters;
    if (!all) all = cluster.broadcast(&tile.shared().slot, [&] { return all_arrive(arrivals); }) != 0;
    if (all)
      edit(arrived + 1 == clusters);
    else if (is_clerk)
      leave();
  }

  __device__ __forceinline__ uint32_t all_arrive(const uint32_t* arrivals) const {
#pragma unroll 1
    for (int look = 0; look < most_looks; ++look) {
      if (ptx::load_acquire(arrivals) % has_edited == clusters) return 1;
      ptx::wait_a_moment();
    }
    return 0;
  }

  __device__ __forceinline__ void edit(bool is_last) const {
    if (is_clerk) take_slice();
    if (threadIdx.x < static_cast<uint32_t>(tile.rows))
      tile.shared().maximum[threadIdx.x] = tile.step.scratch.maximum[tile.first + threadIdx.x];
    load_scores(tile, tile.is_topk());
#pragma unroll 1
    for (int slot = warp(); slot < tile.rows; slot += warps()) compute_edit(tile, slot, is_last && cluster.rank == 0);
    cluster.barrier();
    uint32_t slice = tile.shared().slot;
    if (is_clerk && slice >= slices) leave();
    if (is_clerk && is_last) count_rows(tile);
#pragma unroll 1
    while (slice < slices) {
      cluster.barrier();  // everyone has read which it is
      if (is_clerk && take_slice()) leave();
      write(slice);
      cluster.barrier();
      slice = tile.shared().slot;
    }
  }

  // By the clerk. Returns whether there is none left.
  __device__ __forceinline__ bool take_slice() const {
    uint32_t taken = 0;
    if (lane() == 0) {
      taken = atomicAdd(tile.step.scratch.slices_taken + tile.index, 1u);
      cluster.store_everywhere(&tile.shared().slot, taken);
    }
    return __any_sync(all_lanes, taken >= slices) != 0;
  }

  // By the clerk, when its cluster no longer reads the scratch. Whoever is the last clears it for the next launch.
  __device__ __forceinline__ void leave() const {
    const Scratch& scratch = tile.step.scratch;
    const bool last = lane() == 0 && ptx::add_acquire_release(scratch.clusters_done + tile.index, has_edited) /
                                             has_edited == hands - 1;
    if (__any_sync(all_lanes, last) == 0) return;
    __syncwarp();
    if (tile.is_topk())
#pragma unroll 1
      for (int64_t e = lane(); e < tile.rows * tile.capacity; e += 32) scratch.rank[tile.first * tile.capacity + e] = 0;
    if (lane() < tile.rows) scratch.maximum[tile.first + lane()] = 0;
    if (lane() == 0)
      scratch.tasks_taken[tile.index] = scratch.tasks_done[tile.index] = scratch.clusters_done[tile.index] =
          scratch.slices_taken[tile.index] = 0;
  }

  __device__ __forceinline__ void write(uint32_t slice) const {
    const uint32_t piece = (slice * cluster.size + cluster.rank) * writers + threadIdx.x;
    if (threadIdx.x >= writers || piece >= pieces) return;
    const int slot = static_cast<int>(piece / row_pieces);
    if (tile.shared().kept[slot] > 0) write_piece(tile, slot, static_cast<int64_t>(piece % row_pieces) * piece_size);
  }

  const Tile& tile;
  const Cluster& cluster;
  const uint32_t clusters;
  const bool is_clerk;
  const uint32_t writers, row_pieces, pieces, slices;
  const uint32_t hands;  // clusters that may edit
};

}  // namespace dspa::cuda
