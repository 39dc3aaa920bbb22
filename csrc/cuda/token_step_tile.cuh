// A tile of a token step: the rows of the batch that some clusters share, and their lists, in shared memory.
#pragma once

#include "encoder.cuh"
#include "operations.h"
#include "select.cuh"

namespace dspa::cuda {

constexpr int most_threads = 256;
constexpr int most_inputs = 8;       // rows of the batch in a tile
constexpr int most_stages = 4;       // of a ring of rows of W_enc
constexpr int ring_alignment = 128;
constexpr int unaligned_inputs = 4;  // of weights that cannot be loaded 16 bytes at a time
constexpr uint32_t not_finite = 0x7fffffffu;  // bits of a NaN: the score where the pre-activation is not finite

// At the beginning of a block's shared memory; the arrays whose length depends on the launch follow it.
struct SharedHeader {
  SelectionBuffer selection;
  double sums[most_warps];
  float scale[most_inputs];           // what maps a decoded difference back, where inputs are normalised
  uint32_t slot;                      // for broadcasts
  uint32_t task;                      // the first that the cluster has taken
  uint32_t enabled[most_inputs];
  uint32_t nonfinite[most_inputs];    // whether the input or its scale is not finite
  int32_t count[most_inputs];         // entries of the list
  uint32_t passes[most_inputs];       // whether the row needs the pass over W_enc
  float reach[most_inputs];           // see Listed
  float alpha[most_inputs];
  uint32_t maximum[most_inputs];      // bits of the largest activation in the block's share, then of all
  uint32_t outcome[most_inputs];      // of the edit: the flags below
  int32_t kept[most_inputs];          // entries of the edit
  uint64_t full[most_stages];         // barriers of the ring: a stage has been copied, and has been read
  uint64_t empty[most_stages];
};

constexpr uint32_t is_finite = 1, maximum_is_known = 2;

constexpr int64_t header_bytes = (static_cast<int64_t>(sizeof(SharedHeader)) + 127) / 128 * 128;
constexpr int listed_arrays = 5;  // a word for each entry of each list

// Without the ring, which is the last.
inline int64_t shared_bytes(int64_t inputs, int64_t input_size, int64_t capacity) {
  return header_bytes + inputs * (input_size + listed_arrays * capacity) * 4;
}

// A summary of a row's list.
struct Listed {
  bool finite;    // all pre-activations are
  bool any;       // one is active
  float largest;  // of the active ones; 0 without any
  float reach;    // the same, or NaN if an active one is augmented

  // Whether every active one is ablated to 0 if M_t is at least `bound`. Rounding is monotonic, so what holds for a
  // lower bound of M_t holds for M_t.
  __device__ __forceinline__ bool vanishes(float alpha, float bound) const { return reach <= alpha * bound; }
};

// The part of a tile that one block holds. kRing: the copy engine brings W_enc, for a batch of one; else all threads
// load it.
template <class WeightsOfTile, int kInputs, bool kAligned, bool kRing>
struct StepTile {
  static_assert(!kRing || (kInputs == 1 && kAligned));

  using Weights = WeightsOfTile;
  using Storage = typename Weights::Storage;
  static constexpr int inputs = kInputs;
  static constexpr bool aligned = kAligned, ring = kRing;
  // Rows of W_enc that a warp reads at a time.
  static constexpr int rows_at_once = kInputs == 8 ? 4 : loads_in_flight;
  static constexpr int lanes_per_value = 32 / (rows_at_once * kInputs);

  __device__ __forceinline__ explicit StepTile(const TokenStep& token_step)
      : step(token_step),
        sae(token_step.sae),
        d_model(token_step.sae.W_enc.columns),
        size(input_size<Weights>(token_step.sae.W_enc.columns)),
        capacity(token_step.edits.capacity),
        policy(ptx::evict_first_policy()),
        index(blockIdx.x / cluster.size % token_step.tiles),
        first(static_cast<int64_t>(index) * kInputs) {
    const int64_t left = step.hidden.rows - first;
    rows = static_cast<int>(left < kInputs ? left : kInputs);
    const uint32_t share = blockIdx.x / cluster.size / step.tiles * cluster.size + cluster.rank;
    const uint32_t before = share < step.larger_shares ? share : step.larger_shares;
    begin = static_cast<int32_t>(share * step.share_rows + before);
    end = begin + static_cast<int32_t>(step.share_rows + (share < step.larger_shares ? 1 : 0));
  }

  // The index of the warp's product that a lane holds after `multiply`.
  static __device__ __forceinline__ int own_value() { return lane() / lanes_per_value; }

  // ---- addresses ----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ SharedHeader& shared() const {
    return *reinterpret_cast<SharedHeader*>(ptx::dynamic_shared());
  }
  __device__ __forceinline__ float* input(int slot) const {
    return reinterpret_cast<float*>(ptx::dynamic_shared() + header_bytes) + slot * size;
  }
  __device__ __forceinline__ uint32_t* score_bits(int slot) const { return listed_array(0, slot); }
  __device__ __forceinline__ uint32_t* ranks(int slot) const { return listed_array(1, slot); }
  __device__ __forceinline__ float* coefficients(int slot) const {
    return reinterpret_cast<float*>(listed_array(2, slot));
  }
  __device__ __forceinline__ uint32_t* decoder_rows(int slot) const { return listed_array(3, slot); }
  // The list, its signs where coefficients of the edit will be, its rows of W_dec likewise: -1 for a latent that cannot
  // be edited.
  __device__ __forceinline__ int32_t* latents(int slot) const {
    return reinterpret_cast<int32_t*>(listed_array(4, slot));
  }
  __device__ __forceinline__ float* signs(int slot) const { return coefficients(slot); }
  __device__ __forceinline__ uint32_t* listed_array(int array, int slot) const {
    return reinterpret_cast<uint32_t*>(input(kInputs)) + (array * kInputs + slot) * capacity;
  }

  __device__ __forceinline__ bool is_topk() const { return sae.activation == Activation::topk; }

  // Whether the pass has to know the scores of the lists.
  __device__ __forceinline__ bool lists_come_first() const { return step.lazy || is_topk(); }

  __device__ __forceinline__ FromMemory<Weights, kAligned> from_memory() const { return {policy}; }

  __device__ __forceinline__ const Storage* encoder_row(int64_t latent) const {
    return reinterpret_cast<const Storage*>(sae.W_enc.data) + latent * d_model;
  }

  // The row of W_dec, or -1 for a latent that cannot be edited.
  __device__ __forceinline__ int32_t decoder_row(int64_t latent) const {
    if (latent < 0 || latent >= sae.W_enc.rows) return -1;
    const int64_t row = sae.decoder_rows == nullptr ? latent : sae.decoder_rows[latent];
    return row < sae.W_dec.rows ? static_cast<int32_t>(row) : -1;
  }

  // ---- what is in shared memory -------------------------------------------------------------------------------------

  __device__ __forceinline__ bool is_usable(int slot) const {
    return shared().enabled[slot] != 0 && shared().nonfinite[slot] == 0;
  }

  __device__ __forceinline__ bool is_active(int slot, int64_t i, bool ranked) const {
    const bool listed = signs(slot)[i] != 0.0f;
    const bool kept = !ranked || !is_topk() || ranks(slot)[i] < static_cast<uint64_t>(sae.k);
    return listed && kept && __uint_as_float(score_bits(slot)[i]) > 0.0f;
  }

  // Computed by one warp; `ranked` if the ranks are known.
  __device__ __forceinline__ Listed summary_of_list(int slot, bool ranked) const {
    const int count = shared().count[slot];
    bool finite_scores = true, augmented = false;
    float largest = 0.0f;
#pragma unroll 1
    for (int i = lane(); i < count; i += 32) {
      finite_scores = finite_scores && score_bits(slot)[i] != not_finite;
      if (!is_active(slot, i, ranked)) continue;
      largest = fmaxf(largest, __uint_as_float(score_bits(slot)[i]));
      augmented = augmented || signs(slot)[i] > 0.0f;
    }
    largest = __uint_as_float(__reduce_max_sync(all_lanes, __float_as_uint(largest)));
    finite_scores = __all_sync(all_lanes, finite_scores) != 0;
    augmented = __any_sync(all_lanes, augmented) != 0;
    return {finite_scores, largest > 0.0f, largest, augmented ? __uint_as_float(not_finite) : largest};
  }

  const TokenStep& step;
  const Sae& sae;
  const int64_t d_model;
  const int64_t size;  // of an input
  const int64_t capacity;
  const uint64_t policy;
  const Cluster cluster;
  const uint32_t index;  // of the tile
  const int64_t first;   // row of the batch
  int rows;              // of the batch, in this tile
  int32_t begin, end;    // the block's rows of W_enc
};

}  // namespace dspa::cuda
