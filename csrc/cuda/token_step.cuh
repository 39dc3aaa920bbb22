// The edit of one token per row in one launch: encode, select, and write the decoded difference back.
//
// Rows of the batch go in tiles of `kInputs`; the clusters of a tile share out the rows of W_enc. A cluster's place in
// this order is the ticket that it took, not its index, so what a cluster waits for is the work of clusters that run
// already: nothing depends on how many run at a time.
//
//   1. The edit lists of the tile's rows are items that its clusters take one by one: the input is encoded, the listed
//      latents are scored, and what needs no M_t is edited at once (lazy). In `dense` this comes after the pass, unless
//      ranks have to be counted for topk; else the clusters wait until all lists of their tile are done.
//   2. The pass over W_enc, once for all rows of the tile that need it: maxima, and ranks of listed latents for topk.
//   3. The last cluster of a tile to finish edits its rows and leaves the scratch as the next launch has to find it.
//
// Sums are added in one order whatever the batch, the mode and the shape of the launch, and maxima and counts do not
// depend on any order: the same input gives the same bits.
#pragma once

#include "encoder.cuh"
#include "lookup_row.cuh"
#include "operations.h"

namespace dspa::cuda {

constexpr int most_threads = 256;
constexpr int most_inputs = 8;       // rows of the batch in a tile
constexpr int most_stages = 4;       // of a ring of rows of W_enc
constexpr int ring_alignment = 128;
constexpr int unaligned_inputs = 4;  // of weights that cannot be loaded 16 bytes at a time
constexpr uint32_t not_finite = 0x7fffffffu;  // bits of a NaN: the score where the pre-activation is not finite

// At the beginning of a block's shared memory; the arrays whose length only the launch knows lie behind it.
struct SharedHeader {
  SelectionBuffer selection;
  double sums[most_warps];
  uint32_t slot;                   // for broadcasts
  uint32_t finite[most_inputs];    // whether the input is
  float scale[most_inputs];
  float reach[most_inputs];        // see Listed
  uint32_t maximum[most_inputs];   // bits of the largest activation in the block's share
  int32_t kept[most_inputs];       // entries of the edit
  uint64_t full[most_stages];      // barriers of the ring: a stage has been copied, and has been read
  uint64_t empty[most_stages];
};

constexpr int64_t header_bytes = (static_cast<int64_t>(sizeof(SharedHeader)) + 127) / 128 * 128;

// Without the ring, which is the last.
inline int64_t shared_bytes(int64_t inputs, int64_t input_size, int64_t capacity) {
  return header_bytes + inputs * (input_size + 4 * capacity) * 4;
}

// What a row's list amounts to.
struct Listed {
  bool finite;    // all pre-activations are
  bool any;       // one is active
  float largest;  // of the active ones; 0 without any
  float reach;    // the same, or NaN if an active one is augmented

  // Whether every active one is ablated to 0 if M_t is at least `bound`. Rounding is monotonic, so what holds for a
  // lower bound of M_t holds for M_t.
  __device__ __forceinline__ bool vanishes(float alpha, float bound) const { return reach <= alpha * bound; }
};

// kRing: the copy engine brings W_enc, for a batch of one; else all threads load it.
template <class Weights, int kInputs, bool kAligned, bool kRing>
class TokenStepBlock {
  static_assert(!kRing || (kInputs == 1 && kAligned));

 public:
  __device__ __forceinline__ explicit TokenStepBlock(const TokenStep& step)
      : step_(step),
        sae_(step.sae),
        d_model_(step.sae.W_enc.columns),
        size_(input_size<Weights>(step.sae.W_enc.columns)),
        capacity_(step.edits.capacity),
        policy_(ptx::evict_first_policy()) {}

  __device__ __forceinline__ void run() {
    if (cluster_.size > 1) cluster_.barrier();  // nobody writes into a block that has not begun
    const uint32_t ticket =
        cluster_.broadcast(&shared().slot, [&] { return ptx::add_acquire_release(step_.scratch.ticket, 1); });
    tile_ = ticket % step_.tiles;
    share_ = ticket / step_.tiles * cluster_.size + cluster_.rank;
    first_ = static_cast<int64_t>(tile_) * kInputs;
    const int64_t left = step_.hidden.rows - first_;
    rows_ = static_cast<int>(left < kInputs ? left : kInputs);

    const bool lists_first = step_.lazy || is_topk();
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {  // one copy of the code for either order
      if ((phase == 0) == lists_first)
        work_on_lists();
      else
        pass(lists_first);
    }
    if (is_last_of_tile()) finish_tile();
  }

 private:
  // Rows of W_enc that a warp reads at a time.
  static constexpr int rows_at_once = kInputs == 8 ? 4 : loads_in_flight;
  static constexpr int lanes_per_value = 32 / (rows_at_once * kInputs);

  // ---- what belongs to what -----------------------------------------------------------------------------------------

  __device__ __forceinline__ SharedHeader& shared() const {
    return *reinterpret_cast<SharedHeader*>(ptx::dynamic_shared());
  }
  __device__ __forceinline__ float* input(int slot) const {
    return reinterpret_cast<float*>(ptx::dynamic_shared() + header_bytes) + slot * size_;
  }
  __device__ __forceinline__ uint32_t* score_bits(int slot) const { return listed_array(0, slot); }
  __device__ __forceinline__ uint32_t* ranks(int slot) const { return listed_array(1, slot); }
  __device__ __forceinline__ float* coefficients(int slot) const {
    return reinterpret_cast<float*>(listed_array(2, slot));
  }
  __device__ __forceinline__ uint32_t* decoder_rows(int slot) const { return listed_array(3, slot); }
  __device__ __forceinline__ uint32_t* listed_array(int array, int slot) const {
    return reinterpret_cast<uint32_t*>(input(kInputs)) + (array * kInputs + slot) * capacity_;
  }

  __device__ __forceinline__ bool is_topk() const { return sae_.activation == Activation::topk; }

  __device__ __forceinline__ bool is_enabled(int64_t row) const {
    return step_.enabled == nullptr || step_.enabled[row];
  }

  __device__ __forceinline__ float alpha(int64_t row) const {
    return step_.alpha_of_row == nullptr ? step_.alpha : step_.alpha_of_row[row];
  }

  __device__ __forceinline__ int64_t list_size(int64_t row) const {
    const int64_t count = step_.edits.counts[row];
    return count < 0 ? 0 : count > capacity_ ? capacity_ : count;
  }

  __device__ __forceinline__ FromMemory<Weights, kAligned> from_memory() const { return {policy_}; }

  __device__ __forceinline__ const typename Weights::Storage* encoder_row(int64_t latent) const {
    return reinterpret_cast<const typename Weights::Storage*>(sae_.W_enc.data) + latent * d_model_;
  }

  // The row of W_dec, or -1 for a latent that cannot be edited.
  __device__ __forceinline__ int64_t decoder_row(int64_t latent) const {
    if (latent < 0 || latent >= sae_.W_enc.rows) return -1;
    const int64_t row = sae_.decoder_rows == nullptr ? latent : sae_.decoder_rows[latent];
    return row < sae_.W_dec.rows ? row : -1;
  }

  // ---- inputs -------------------------------------------------------------------------------------------------------

  // `h'` of those rows of the tile that are not there yet, by the whole block.
  __device__ __forceinline__ void load_inputs(uint32_t slots) {
#pragma unroll 1
    for (int slot = 0; slot < kInputs; ++slot)
      if (((slots & ~loaded_) >> slot & 1u) != 0) load_input(slot);
    loaded_ |= slots;
  }

  __device__ __forceinline__ void load_input(int slot) {
    const int64_t row = first_ + slot;
    const Normalizer normalizer = normalizer_of(step_.hidden, row, sae_.normalization, shared().sums);
    const char* from = row_of(step_.hidden, row);
    bool all_finite = finite(normalizer.scale);
    for (int64_t i = threadIdx.x; i < size_; i += blockDim.x) {
      const float value = i < d_model_ ? encoder_input(step_.hidden, from, i, sae_, normalizer) : 0.0f;
      all_finite = all_finite && finite(value);
      input(slot)[input_position<Weights>(i)] = value;
    }
    const int everywhere = __syncthreads_and(all_finite);
    if (threadIdx.x == 0) {
      shared().finite[slot] = everywhere != 0;
      shared().scale[slot] = normalizer.scale;
    }
    __syncthreads();
  }

  __device__ __forceinline__ uint32_t enabled_rows() const {
    uint32_t rows = 0;
    for (int slot = 0; slot < rows_; ++slot)
      if (is_enabled(first_ + slot)) rows |= 1u << slot;
    return rows;
  }

  __device__ __forceinline__ uint32_t finite_rows(uint32_t slots) const {
    uint32_t rows = 0;
    for (int slot = 0; slot < rows_; ++slot)
      if ((slots >> slot & 1u) != 0 && shared().finite[slot] != 0) rows |= 1u << slot;
    return rows;
  }

  // ---- 1. lists -----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void work_on_lists() {
    while (true) {
      const uint32_t taken = cluster_.broadcast(
          &shared().slot, [&] { return ptx::add_acquire_release(step_.scratch.lists_taken + tile_, 1); });
      if (taken >= static_cast<uint32_t>(rows_)) return;
      work_on_list(static_cast<int>(taken));
      cluster_.barrier();
      if (cluster_.leads()) ptx::add_acquire_release(step_.scratch.lists_done + tile_, 1);
    }
  }

  __device__ __forceinline__ void wait_for_lists() const {
    if (threadIdx.x == 0)
      while (ptx::load_acquire(step_.scratch.lists_done + tile_) < static_cast<uint32_t>(rows_)) ptx::wait_a_moment();
    __syncthreads();
  }

  __device__ __forceinline__ void work_on_list(int slot) {
    const int64_t row = first_ + slot;
    if (step_.looks_up) {
      if (cluster_.rank == 0) lookup_row(step_.lookup, row, shared().selection);
      cluster_.barrier();
    }
    if (!is_enabled(row)) {
      if (cluster_.leads()) step_.scratch.settled[row] = 1;
      return;
    }
    load_inputs(1u << slot);
    if (shared().finite[slot] == 0) {
      if (cluster_.leads()) {
        step_.scratch.settled[row] = 1;
        count_row(row, false, false, false, 0.0f);
      }
      return;
    }
    score_list(slot);
    cluster_.barrier();  // the scores are everywhere, and every block of the cluster has read the hidden state
    const Listed listed = look_at_list(slot, false);
    const bool certain = !is_topk() && listed.vanishes(alpha(row), listed.largest);
    if (listed.finite && (!step_.lazy || (listed.any && !certain))) return;
    edit_rows(1u << slot, false);
    if (cluster_.leads()) step_.scratch.settled[row] = 1;
  }

  // Scores of the listed latents, a warp for each, into the scratch and the shared memory of the whole cluster.
  __device__ __forceinline__ void score_list(int slot) const {
    const int64_t row = first_ + slot, count = list_size(row);
    const int32_t* latents = step_.edits.latents + row * capacity_;
    const int64_t stride = static_cast<int64_t>(cluster_.size) * warps();
    for (int64_t i = static_cast<int64_t>(cluster_.rank) * warps() + warp(); i < count; i += stride) {
      const int64_t latent = latents[i];
      float value = 0.0f;
      if (decoder_row(latent) >= 0) {
        const float product =
            multiply<Weights, 1, 1>(encoder_row(latent), 1, d_model_, input(slot), size_, from_memory());
        value = score_of(sae_, latent, product).value;
        if (!finite(product) || !finite(value)) value = __uint_as_float(not_finite);
      }
      if (lane() == 0) {
        step_.scratch.score[row * capacity_ + i] = value;
        cluster_.store_everywhere(score_bits(slot) + i, __float_as_uint(value));
      }
    }
  }

  // The scores of some rows' lists as other blocks found them, by the whole block; `ranked` if the ranks are known.
  __device__ __forceinline__ void load_lists(uint32_t slots, bool ranked) const {
    for (int slot = 0; slot < rows_; ++slot) {
      if ((slots >> slot & 1u) == 0) continue;
      const int64_t row = first_ + slot, count = list_size(row);
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        score_bits(slot)[i] = __float_as_uint(step_.scratch.score[row * capacity_ + i]);
        ranks(slot)[i] = ranked && is_topk() ? step_.scratch.rank[row * capacity_ + i] : 0;
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool is_active(int slot, int64_t i, bool ranked) const {
    const bool listed = step_.edits.signs[(first_ + slot) * capacity_ + i] != 0;
    const bool kept = !ranked || !is_topk() || ranks(slot)[i] < static_cast<uint64_t>(sae_.k);
    return listed && kept && __uint_as_float(score_bits(slot)[i]) > 0.0f;
  }

  // By one warp, whichever; `ranked` if the ranks are known.
  __device__ __forceinline__ Listed look_at_list(int slot, bool ranked) const {
    const int64_t row = first_ + slot, count = list_size(row);
    bool finite_scores = true, augmented = false;
    float largest = 0.0f;
    for (int64_t i = lane(); i < count; i += 32) {
      finite_scores = finite_scores && score_bits(slot)[i] != not_finite;
      if (!is_active(slot, i, ranked)) continue;
      largest = fmaxf(largest, __uint_as_float(score_bits(slot)[i]));
      augmented = augmented || step_.edits.signs[row * capacity_ + i] > 0;
    }
    largest = __uint_as_float(__reduce_max_sync(all_lanes, __float_as_uint(largest)));
    finite_scores = __all_sync(all_lanes, finite_scores) != 0;
    augmented = __any_sync(all_lanes, augmented) != 0;
    return {finite_scores, largest > 0.0f, largest, augmented ? __uint_as_float(not_finite) : largest};
  }

  // ---- 2. the pass --------------------------------------------------------------------------------------------------

  __device__ __forceinline__ uint32_t rows_not_settled() const {
    uint32_t rows = 0;
    for (int slot = 0; slot < rows_; ++slot)
      if (step_.scratch.settled[first_ + slot] == 0) rows |= 1u << slot;
    return rows;
  }

  __device__ __forceinline__ void pass(bool lists_are_known) {
    if (lists_are_known) wait_for_lists();
    uint32_t slots = lists_are_known ? rows_not_settled() : enabled_rows();
    load_inputs(slots);
    if (lists_are_known)
      load_lists(slots, false);
    else
      slots = finite_rows(slots);
    if (slots == 0) return;
    prepare_pass(slots);
    const int64_t shares = static_cast<int64_t>(step_.clusters_per_tile) * cluster_.size;
    const int64_t begin = sae_.W_enc.rows * share_ / shares, end = sae_.W_enc.rows * (share_ + 1) / shares;
    float largest = 0.0f;
    int slot = 0;
    if constexpr (kRing) {
      largest = pass_through_ring(begin, end);
    } else {
      slot = own_value() % kInputs;
      largest = pass_from_memory(slots, begin, end);
    }
    publish(slots, slot, largest);
  }

  // Which of a warp's products a lane ends with.
  static __device__ __forceinline__ int own_value() { return lane() / lanes_per_value; }

  // Each warp reads its own rows. The largest activation that a lane has seen, of row `own_value() % kInputs`.
  __device__ __forceinline__ float pass_from_memory(uint32_t slots, int64_t begin, int64_t end) const {
    const int slot = own_value() % kInputs;
    const bool wanted = (slots >> slot & 1u) != 0;
    const bool may_stop = step_.lazy && !is_topk();
    uint32_t* known_maximum = step_.scratch.maximum + first_ + (wanted ? slot : 0);
    float largest = 0.0f;
#pragma unroll 1
    for (int64_t first = begin + warp() * rows_at_once; first < end; first += warps() * rows_at_once) {
      const float known = may_stop && wanted ? __uint_as_float(ptx::load_relaxed(known_maximum)) : 0.0f;
      const float product = multiply<Weights, rows_at_once, kInputs>(encoder_row(first), end - first, d_model_,
                                                                     input(0), size_, from_memory());
      const int64_t latent = first + own_value() / kInputs;
      if (wanted && latent < end) {
        const Score score = score_of(sae_, latent, product);
        largest = fmaxf(largest, score.value);
        if (is_topk() && lane() % lanes_per_value == 0) count_ranks(slot, latent, score.z);
      }
      if (!may_stop) continue;
      if (wanted && largest > known) atomicMax(known_maximum, __float_as_uint(largest));
      const bool settled = !wanted || shared().reach[slot] <= alpha(first_ + slot) * fmaxf(largest, known);
      if (__all_sync(all_lanes, settled) != 0) break;
    }
    return largest;
  }

  // The copy engine brings one row for each warp at a time, a few times ahead. For one input; nobody stops early.
  __device__ __forceinline__ float pass_through_ring(int64_t begin, int64_t end) const {
    const uint32_t stages = step_.ring_stages;
    const int64_t row_bytes = d_model_ * static_cast<int64_t>(sizeof(typename Weights::Storage));
    const int64_t rounds = (end - begin + warps() - 1) / warps();
    char* ring = reinterpret_cast<char*>(listed_array(4, 0));
    ring += (ring_alignment - (ring - ptx::dynamic_shared()) % ring_alignment) % ring_alignment;
    const auto fetch = [&](int64_t round) {
      const uint32_t stage = static_cast<uint32_t>(round % stages);
      const int64_t first = begin + round * warps(), left = end - first;
      const uint32_t bytes = static_cast<uint32_t>((left < warps() ? left : warps()) * row_bytes);
      ptx::barrier_expect(&shared().full[stage], bytes);
      ptx::copy_bulk(ring + stage * warps() * row_bytes, encoder_row(first), bytes, &shared().full[stage], policy_);
    };
    if (threadIdx.x == 0) {
      for (uint32_t stage = 0; stage < stages; ++stage) {
        ptx::barrier_begin(&shared().full[stage], 1);
        ptx::barrier_begin(&shared().empty[stage], static_cast<uint32_t>(warps()));
      }
      ptx::barriers_have_begun();
      for (int64_t round = 0; round < stages && round < rounds; ++round) fetch(round);
    }
    __syncthreads();
    float largest = 0.0f;
#pragma unroll 1
    for (int64_t round = 0; round < rounds; ++round) {
      const uint32_t stage = static_cast<uint32_t>(round % stages), parity = static_cast<uint32_t>(round / stages % 2);
      ptx::barrier_wait(&shared().full[stage], parity);
      const int64_t latent = begin + round * warps() + warp();
      if (latent < end) {
        const char* held = ring + (stage * warps() + warp()) * row_bytes;
        const auto* row = reinterpret_cast<const typename Weights::Storage*>(held);
        const float product = multiply<Weights, 1, 1>(row, 1, d_model_, input(0), size_, FromShared<Weights>{});
        const Score score = score_of(sae_, latent, product);
        largest = fmaxf(largest, score.value);
        if (is_topk() && lane() == 0) count_ranks(0, latent, score.z);
      }
      __syncwarp();
      if (lane() == 0) ptx::barrier_arrive(&shared().empty[stage]);
      if (threadIdx.x == 0 && round + stages < rounds) {
        ptx::barrier_wait(&shared().empty[stage], parity);
        fetch(round + stages);
      }
    }
    return largest;
  }

  __device__ __forceinline__ void prepare_pass(uint32_t slots) const {
    for (int slot = 0; slot < kInputs; ++slot) {  // what is multiplied with W_enc all the same
      if ((loaded_ >> slot & 1u) != 0) continue;
      for (int64_t i = threadIdx.x; i < size_; i += blockDim.x) input(slot)[i] = 0.0f;
    }
    if (step_.lazy || is_topk()) {
      for (int slot = warp(); slot < rows_; slot += warps()) {
        if ((slots >> slot & 1u) == 0) continue;
        const Listed listed = look_at_list(slot, false);
        if (lane() == 0) shared().reach[slot] = listed.reach;
        const int64_t count = list_size(first_ + slot);
        for (int64_t i = lane(); i < count; i += 32) ranks(slot)[i] = 0;
      }
    }
    if (threadIdx.x < kInputs) shared().maximum[threadIdx.x] = 0;
    __syncthreads();
  }

  // Adds to the ranks of the listed latents that come after this one.
  __device__ __forceinline__ void count_ranks(int slot, int64_t latent, float z) const {
    if (!(z > 0.0f)) return;
    const int64_t row = first_ + slot, count = list_size(row);
    for (int64_t i = 0; i < count; ++i) {
      const float listed = __uint_as_float(score_bits(slot)[i]);
      if (!(listed > 0.0f) || z < listed) continue;
      if (z > listed || latent < step_.edits.latents[row * capacity_ + i]) atomicAdd(ranks(slot) + i, 1u);
    }
  }

  // What the block found, added to what the others did.
  __device__ __forceinline__ void publish(uint32_t slots, int slot, float largest) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      if (offset >= lanes_per_value * kInputs || offset < lanes_per_value)  // lanes that are offset apart share a slot
        largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, offset));
    if (largest > 0.0f && lane() < lanes_per_value * kInputs && lane() % lanes_per_value == 0)
      atomicMax(&shared().maximum[slot], __float_as_uint(largest));
    __syncthreads();
    if (threadIdx.x < kInputs && (slots >> threadIdx.x & 1u) != 0 && shared().maximum[threadIdx.x] != 0)
      atomicMax(step_.scratch.maximum + first_ + threadIdx.x, shared().maximum[threadIdx.x]);
    if (!is_topk()) return;
    for (int s = warp(); s < rows_; s += warps()) {
      if ((slots >> s & 1u) == 0) continue;
      const int64_t row = first_ + s, count = list_size(row);
      for (int64_t i = lane(); i < count; i += 32)
        if (ranks(s)[i] != 0) atomicAdd(step_.scratch.rank + row * capacity_ + i, ranks(s)[i]);
    }
  }

  // ---- 3. the edit --------------------------------------------------------------------------------------------------

  __device__ __forceinline__ bool is_last_of_tile() const {
    cluster_.barrier();
    return cluster_.broadcast(&shared().slot, [&] {
      return ptx::add_acquire_release(step_.scratch.clusters_done + tile_, 1);
    }) == step_.clusters_per_tile - 1;
  }

  __device__ __forceinline__ void finish_tile() {
    const uint32_t rows = rows_not_settled();
    load_lists(rows, true);
    edit_rows(rows, true);
    cluster_.barrier();  // nobody reads the scratch any more
    if (cluster_.rank != 0) return;
    for (int slot = warp(); slot < rows_; slot += warps()) {
      const int64_t row = first_ + slot;
      for (int64_t i = lane(); is_topk() && i < capacity_; i += 32) step_.scratch.rank[row * capacity_ + i] = 0;
      if (lane() == 0) step_.scratch.settled[row] = step_.scratch.maximum[row] = 0;
    }
    if (threadIdx.x != 0) return;
    step_.scratch.clusters_done[tile_] = step_.scratch.lists_taken[tile_] = step_.scratch.lists_done[tile_] = 0;
    if (ptx::add_acquire_release(step_.scratch.tiles_done, 1) == step_.tiles - 1)
      *step_.scratch.ticket = *step_.scratch.tiles_done = 0;
  }

  // Edits some rows and counts them: a warp decides for each row, then the whole cluster writes.
  __device__ __forceinline__ void edit_rows(uint32_t slots, bool after_pass) const {
    for (int slot = warp(); slot < rows_; slot += warps())
      if ((slots >> slot & 1u) != 0) decide(slot, after_pass);
    __syncthreads();
    constexpr int per_load = Weights::per_load;
    const int64_t pieces = (d_model_ + per_load - 1) / per_load;
    const int64_t stride = static_cast<int64_t>(cluster_.size) * blockDim.x;
#pragma unroll 1
    for (int64_t p = static_cast<int64_t>(cluster_.rank) * blockDim.x + threadIdx.x; p < rows_ * pieces; p += stride) {
      const int slot = static_cast<int>(p / pieces);
      if ((slots >> slot & 1u) != 0 && shared().kept[slot] > 0) write_piece(slot, p % pieces * per_load);
    }
    __syncthreads();
  }

  // What the edit makes of a row's listed latents: factors of decoder rows, in the order of the list.
  __device__ __forceinline__ void decide(int slot, bool after_pass) const {
    const int64_t row = first_ + slot, count = list_size(row);
    const Listed listed = look_at_list(slot, after_pass);
    float maximum = listed.largest;
    if (after_pass) maximum = fmaxf(maximum, __uint_as_float(step_.scratch.maximum[row]));
    const float row_alpha = alpha(row), shift = row_alpha * maximum;
    const bool needed = listed.any && !listed.vanishes(row_alpha, maximum);
    const auto difference = [&](int64_t i) {
      if (i >= count || !is_active(slot, i, after_pass)) return 0.0f;
      const float score = __uint_as_float(score_bits(slot)[i]);
      if (!needed) return -score;
      const float moved = step_.edits.signs[row * capacity_ + i] < 0 ? fmaxf(score - shift, 0.0f) : score + shift;
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
        const int64_t latent = step_.edits.latents[row * capacity_ + i];
        if (sae_.decoder_norm != nullptr) factor = factor / sae_.decoder_norm[latent];
        if (sae_.normalization != Normalization::none) factor = factor * shared().scale[slot];
        const int place = kept + __popc(changed & ((1u << lane()) - 1u));
        coefficients(slot)[place] = factor;
        decoder_rows(slot)[place] = static_cast<uint32_t>(decoder_row(latent));
        if (cluster_.rank == 0 && step_.stats.latent_edits != nullptr)
          atomicAdd(reinterpret_cast<unsigned long long*>(step_.stats.latent_edits + latent), 1ull);
      }
      kept += __popc(changed);
    }
    if (lane() != 0) return;
    shared().kept[slot] = kept;
    if (cluster_.rank == 0) count_row(row, good, kept > 0, good && (!step_.lazy || needed), maximum);
  }

  // Adds the decoded difference to the entries at `column` and behind it.
  __device__ __forceinline__ void write_piece(int slot, int64_t column) const {
    constexpr int per_load = Weights::per_load;
    const auto* decoder = reinterpret_cast<const typename Weights::Storage*>(sae_.W_dec.data) + column;
    float sums[per_load] = {};
#pragma unroll 4
    for (int i = 0; i < shared().kept[slot]; ++i) {
      float weights[per_load];
      const auto* from = decoder + static_cast<int64_t>(decoder_rows(slot)[i]) * d_model_;
      if constexpr (kAligned) {
        Weights::unpack(ptx::load_16(from), weights);
      } else {
#pragma unroll
        for (int j = 0; j < per_load; ++j) weights[j] = column + j < d_model_ ? Weights::number(from[j]) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < per_load; ++j) sums[j] = fmaf(coefficients(slot)[i], weights[j], sums[j]);
    }
    char* to = const_cast<char*>(row_of(step_.hidden, first_ + slot));
#pragma unroll
    for (int j = 0; j < per_load; ++j) {
      const int64_t position = (column + j) * step_.hidden.column_stride;
      if (column + j < d_model_)
        store_number(to, step_.hidden.dtype, position, load_number(to, step_.hidden.dtype, position) + sums[j]);
    }
  }

  __device__ __forceinline__ void count_row(int64_t row, bool all_finite, bool edited, bool known,
                                            float maximum) const {
    const cpu::Stats& stats = step_.stats;
    if (stats.seen == nullptr) return;
    stats.seen[row] += 1;
    stats.edited[row] += edited;
    stats.nonfinite[row] += !all_finite;
    stats.maximum[row] = known ? static_cast<double>(maximum) : static_cast<double>(__uint_as_float(not_finite));
    if (known) stats.maximum_sum[row] += static_cast<double>(maximum);
    stats.maximum_known[row] += known;
  }

  const TokenStep& step_;
  const Sae& sae_;
  const int64_t d_model_;
  const int64_t size_;  // of an input
  const int64_t capacity_;
  const uint64_t policy_;
  const Cluster cluster_;
  uint32_t tile_ = 0;
  uint32_t share_ = 0;   // of the rows of W_enc
  int64_t first_ = 0;    // row of the batch
  int rows_ = 0;         // of the batch, in this tile
  uint32_t loaded_ = 0;  // inputs that are in shared memory, a bit for each slot
};

template <class Weights, int kInputs, bool kAligned>
__global__ void __launch_bounds__(most_threads, kInputs == 1 ? 2 : 1)
    token_step_kernel(const __grid_constant__ TokenStep step) {
  TokenStepBlock<Weights, kInputs, kAligned, false>(step).run();
}

// In code for GPUs before sm_90 the kernel is empty and takes blocks of one warp, by which the launcher knows.
template <class Weights>
__global__ void __launch_bounds__(ptx::has_bulk_copies ? most_threads : 32, ptx::has_bulk_copies ? 2 : 1)
    token_step_ring_kernel(const __grid_constant__ TokenStep step) {
  if constexpr (ptx::has_bulk_copies) TokenStepBlock<Weights, 1, true, true>(step).run();
}

}  // namespace dspa::cuda
