// The arguments of the kernels and their launchers, for the binding, without CUDA and without torch. A launcher puts
// its work on the stream, a cudaStream_t, and returns CUDA's error code; 0 is success.
#pragma once

#include <cstdint>

#include "../common/adapter.h"
#include "../common/csr_map.h"
#include "../common/edit_lists.h"
#include "../common/sae.h"

namespace dspa::cuda {

// ---- lookup ---------------------------------------------------------------------------------------------------------

template <class Density, class Value>
struct Lookup {
  const Density* density = nullptr;  // [batch, map.rows]
  CsrMap<Value> map;
  LookupOptions options;
  EditLists lists;
  Value* scores = nullptr;      // [batch, map.columns_count] scratch
  int32_t* latents = nullptr;   // [batch, k_prompt + 4 k_diff] scratch
};

int run_lookup(const Lookup<float, float>& lookup, int64_t batch, void* stream);
int run_lookup(const Lookup<float, double>& lookup, int64_t batch, void* stream);
int run_lookup(const Lookup<double, float>& lookup, int64_t batch, void* stream);
int run_lookup(const Lookup<double, double>& lookup, int64_t batch, void* stream);

// ---- token_step -----------------------------------------------------------------------------------------------------

// What clusters exchange. All zero between launches, except for the scores.
struct Scratch {
  uint32_t* tasks_taken = nullptr;    // of each tile: lookups of its rows, then entries of its lists
  uint32_t* tasks_done = nullptr;     // of each tile: rows looked up, and entries
  uint32_t* clusters_done = nullptr;  // of each tile: those that have passed, and 65536 for each that has edited
  uint32_t* slices_taken = nullptr;   // of each tile: of its edit
  uint32_t* maximum = nullptr;        // of each row: bits of the largest activation
  uint32_t* rank = nullptr;           // of each listed latent: how many come before it
  float* score = nullptr;             // of each listed latent, NaN for a row that is not finite
};

// A row has four words for the tile that may begin with it, and one of its own. Scratch for more rows than a batch has
// serves it as well.
inline int64_t scratch_words(int64_t rows, int64_t capacity) { return 5 * rows + 2 * rows * capacity; }
inline int64_t scratch_rows(int64_t words, int64_t capacity) { return words / (5 + 2 * capacity); }

inline Scratch scratch_in(uint32_t* words, int64_t rows, int64_t capacity) {
  Scratch scratch;
  const auto take = [&](int64_t count) {
    uint32_t* taken = words;
    words += count;
    return taken;
  };
  scratch.tasks_taken = take(rows);
  scratch.tasks_done = take(rows);
  scratch.clusters_done = take(rows);
  scratch.slices_taken = take(rows);
  scratch.maximum = take(rows);
  scratch.rank = take(rows * capacity);
  scratch.score = reinterpret_cast<float*>(take(rows * capacity));
  return scratch;
}

struct TokenStep {
  StridedMatrix hidden;
  Sae sae;
  Edits edits;
  float alpha = 0.0f;
  const float* alpha_of_row = nullptr;  // instead of alpha
  const bool* enabled = nullptr;        // null for all
  Stats stats;
  bool lazy = false;
  bool looks_up = false;  // fills the edit lists in first
  Lookup<float, float> lookup;
  Scratch scratch;
  uint32_t tiles = 1;
  uint32_t clusters_per_tile = 1;
  uint32_t share_rows = 0;     // of W_enc, for a block; one more for the first `larger_shares` blocks of a tile
  uint32_t larger_shares = 0;
  uint32_t entries_at_once = 1;  // of lists, for a cluster to take
  uint32_t ring_stages = 0;      // where the copy engine brings W_enc
};

// One launch. The scratch must be zero, and is again when the kernel is done: no other step may use it meanwhile.
int run_token_step(const TokenStep& step, void* stream);

// ---- adapter_step ---------------------------------------------------------------------------------------------------

constexpr int64_t adapter_tile = 64;  // latents of a block

// What the three launches of an adapter step exchange; each writes what the next one reads.
struct AdapterLists {
  int32_t* fired = nullptr;         // [rows, tiles], how many latents of a tile fire
  uint32_t* bad = nullptr;          // [rows, tiles], whether something in it is not finite
  float* scale = nullptr;           // [rows], what maps a decoded difference back
  int32_t* tile_latents = nullptr;  // [rows, d_sae], the latents that fire, from the first latent of each tile on
  float* tile_values = nullptr;     // [rows, d_sae], their v
  int32_t* latents = nullptr;       // [rows, d_sae], the same latents without gaps
  float* changes = nullptr;         // [rows, d_sae], by how much each changes
};

struct AdapterStep {
  StridedMatrix hidden;
  Sae sae;  // not topk, if the adapter clips
  Adapter adapter;
  const bool* enabled = nullptr;  // null for all
  AdapterStats stats;
  AdapterLists lists;
};

inline int64_t adapter_tiles(int64_t d_sae) { return (d_sae + adapter_tile - 1) / adapter_tile; }

inline int64_t adapter_words(int64_t rows, int64_t d_sae) { return rows * (2 * adapter_tiles(d_sae) + 1 + 4 * d_sae); }

inline AdapterLists adapter_lists_in(uint32_t* words, int64_t rows, int64_t d_sae) {
  const int64_t tiles = adapter_tiles(d_sae);
  const auto take = [&](int64_t count) {
    uint32_t* taken = words;
    words += rows * count;
    return taken;
  };
  AdapterLists lists;
  lists.fired = reinterpret_cast<int32_t*>(take(tiles));
  lists.bad = take(tiles);
  lists.scale = reinterpret_cast<float*>(take(1));
  lists.tile_latents = reinterpret_cast<int32_t*>(take(d_sae));
  lists.tile_values = reinterpret_cast<float*>(take(d_sae));
  lists.latents = reinterpret_cast<int32_t*>(take(d_sae));
  lists.changes = reinterpret_cast<float*>(take(d_sae));
  return lists;
}

// Three launches, for at least one row.
int run_adapter_step(const AdapterStep& step, void* stream);

// ---- encode_density -------------------------------------------------------------------------------------------------

struct EncodeDensity {
  StridedMatrix hidden;
  Sae sae;
  const int64_t* offsets = nullptr;  // [segments + 1]
  int64_t segments = 0;
  int32_t* counts = nullptr;         // [segments, d_sae], added to
  // Scratch, for the tokens from `first_token` on.
  int64_t first_token = 0;
  int64_t tokens = 0;             // at a time: whole tiles
  int64_t rows = 0;               // of these, those that there are
  int64_t depth = 0;              // d_model, rounded up to whole steps
  int pieces = 0;                 // 16-bit numbers that add up to one entry of the input; 0 for float32
  uint16_t* halves = nullptr;     // [pieces, tokens, depth]
  const uint16_t* factors = nullptr;  // these, or the hidden states themselves
  int64_t factor_stride = 0;          // from one token to the next
  float* inputs = nullptr;        // or [tokens, depth]
  int32_t* segment_of = nullptr;  // [tokens], -1 for a token that activates nothing
  float* scores = nullptr;        // [tokens, d_sae], for topk
};

// The scratch memory of a call.
struct DensityPlan {
  int64_t tokens = 0;
  int64_t depth = 0;
  int pieces = 0;
  bool by_warpgroups = false;
  bool in_place = false;  // multiplies the hidden states where they are
  int64_t bytes = 0;
};

DensityPlan plan_density(const StridedMatrix& hidden, const Sae& sae);

// Adds to the counts. `memory` has `plan.bytes`, aligned to 16.
int run_encode_density(const EncodeDensity& task, const DensityPlan& plan, char* memory, void* stream);

// ---- launches -------------------------------------------------------------------------------------------------------

// Shapes of launches, to be set by benchmarks. They do not change results, except the rounding of norms (threads).
struct Tuning {
  int threads = 256;  // of a block of token_step: a multiple of 32, at most 256
  int cluster = 1;    // blocks of a cluster of token_step, on sm_90 and later: 1, 2, 4 or 8
  // Bytes of inputs, or for topk of scores, that encode_density holds: about the second-level cache of a large device.
  int64_t density_bytes = int64_t{64} << 20;
  // These take effect only where the current device supports them. The last two were slower, or no faster, on an H100.
  bool warpgroup_products = true;   // encode_density multiplies by warpgroups
  bool bulk_copies = false;         // the copy engine brings W_enc to token_step for a batch of one
  bool early_launch = false;        // token_step begins, and prefetches W_enc, while the kernel before it ends
};

Tuning& tuning();

bool has_warpgroup_products();  // the current device, in code for sm_90a
bool has_bulk_copies();         // in code for sm_90 or later

const char* error_text(int error);

}  // namespace dspa::cuda
