// FSRL's edit of one token per row (docs/method.md, section 6), in three launches, one after the other.
//
//   1. fire: a block multiplies one tile of the adapter's weight with some rows of the batch, and lists for each which
//      latents of the tile fire.
//   2. change: a block turns the list of one tile and row into its part of the row's list, by ascending latent; with
//      the clip it computes the activations of latents that fall.
//   3. decode: a block adds the decoded changes to a slice of one row.
//
// Sums are added in one order whatever the batch and the shape of the launch.
#pragma once

#include "encoder.cuh"
#include "operations.h"

namespace dspa::cuda {

constexpr int adapter_threads = 256;
constexpr int adapter_inputs = 8;     // rows of the batch of a block of `fire`
constexpr int unaligned_adapter_inputs = 4;
constexpr int decode_parts = 8;       // of a row's list, added up one by one and then together

// At the beginning of a block's shared memory; inputs follow it.
struct AdapterShared {
  double sums[most_warps];
  uint32_t usable[adapter_inputs];  // whether a row is enabled
  uint32_t finite[adapter_inputs];
  float scale[adapter_inputs];
  float y[adapter_inputs][adapter_tile];
};

constexpr int64_t adapter_shared_bytes = (static_cast<int64_t>(sizeof(AdapterShared)) + 127) / 128 * 128;

__device__ __forceinline__ AdapterShared& adapter_shared() {
  return *reinterpret_cast<AdapterShared*>(ptx::dynamic_shared());
}

__device__ __forceinline__ float* adapter_input() {
  return reinterpret_cast<float*>(ptx::dynamic_shared() + adapter_shared_bytes);
}

__device__ __forceinline__ int64_t tiles_of(const AdapterStep& step) {
  return (step.adapter.weight.rows + adapter_tile - 1) / adapter_tile;
}

// The threshold that a value has to exceed: a negative one counts as 0; NaN and Inf are never exceeded.
__device__ __forceinline__ float least_of(float threshold) { return threshold < 0.0f ? 0.0f : threshold; }

__device__ __forceinline__ bool is_masked(float least) { return !(least <= 3.402823466e+38f); }

// Writes which latents of the tile fire for one row, by one warp, in ascending order.
__device__ __forceinline__ void list_tile(const AdapterStep& step, int64_t tile, int64_t count, int64_t row, int slot) {
  const bool soft = step.adapter.activation == AdapterActivation::soft_threshold;
  const int64_t first = tile * adapter_tile, tiles = tiles_of(step);
  int32_t* latents = step.lists.tile_latents + row * step.sae.W_enc.rows + first;
  float* values = step.lists.tile_values + row * step.sae.W_enc.rows + first;
  int found = 0;
  bool all_finite = adapter_shared().finite[slot] != 0;
  for (int64_t base = 0; base < count; base += 32) {
    const int64_t i = base + lane();
    bool fires = false;
    float v = 0.0f;
    if (i < count) {
      const float y = adapter_shared().y[slot][i], threshold = step.adapter.threshold[first + i];
      const float least = least_of(threshold), size = soft ? fabsf(y) : y;
      v = soft ? copysignf(size - least, y) : y;
      fires = !(size <= least) && !is_masked(least);
      all_finite = all_finite && (finite(y) || (threshold > 0.0f && is_masked(threshold)));
    }
    const uint32_t firing = __ballot_sync(all_lanes, fires);
    const int place = found + __popc(firing & ((1u << lane()) - 1u));
    if (fires) {
      latents[place] = static_cast<int32_t>(first + i);
      values[place] = v;
    }
    found += __popc(firing);
  }
  all_finite = __all_sync(all_lanes, all_finite) != 0;
  if (lane() != 0) return;
  step.lists.fired[row * tiles + tile] = found;
  step.lists.bad[row * tiles + tile] = all_finite ? 0u : 1u;
  if (tile == 0) step.lists.scale[row] = adapter_shared().scale[slot];
}

template <class Weights, int kInputs, bool kAligned>
__global__ void __launch_bounds__(adapter_threads, kInputs == 1 ? 2 : 1)
    adapter_fire_kernel(const __grid_constant__ AdapterStep step) {
  // Rows of the weight that a warp reads at a time.
  constexpr int rows_at_once = kInputs == adapter_inputs ? 4 : loads_in_flight;
  constexpr int lanes_per_value = 32 / (rows_at_once * kInputs);
  const Matrix& W = step.adapter.weight;
  const int64_t size = input_size<Weights>(W.columns);
  const int64_t groups = (step.hidden.rows + kInputs - 1) / kInputs;
  const int64_t tile = blockIdx.x / groups, first_row = blockIdx.x % groups * kInputs;
  const int64_t first = tile * adapter_tile;
  const int64_t left = W.rows - first, count = left < adapter_tile ? left : adapter_tile;
#pragma unroll 1
  for (int slot = 0; slot < kInputs; ++slot) {
    const int64_t row = first_row + slot;
    const bool usable = row < step.hidden.rows && (step.enabled == nullptr || step.enabled[row]);
    float* input = adapter_input() + slot * size;
    if (!usable) {  // multiplied as zeros
      for (int64_t i = threadIdx.x; i < size; i += blockDim.x) input[i] = 0.0f;
    } else {
      const LoadedInput loaded = load_input<Weights>(step.hidden, row, step.sae, input, size, adapter_shared().sums);
      if (threadIdx.x == 0) {
        adapter_shared().finite[slot] = loaded.finite;
        adapter_shared().scale[slot] = loaded.scale;
      }
    }
    if (threadIdx.x == 0) adapter_shared().usable[slot] = usable;
  }
  __syncthreads();

  const FromMemory<Weights, kAligned> from_memory{ptx::evict_first_policy()};
  const auto* rows = reinterpret_cast<const typename Weights::Storage*>(W.data) + first * W.columns;
#pragma unroll 1
  for (int64_t r = warp() * rows_at_once; r < count; r += warps() * rows_at_once) {
    const float product = multiply<Weights, rows_at_once, kInputs>(rows + r * W.columns, count - r, W.columns,
                                                                   adapter_input(), size, from_memory);
    const int own = lane() / lanes_per_value;
    const int64_t i = r + own / kInputs;
    if (lane() % lanes_per_value == 0 && i < count)
      adapter_shared().y[own % kInputs][i] = product + step.adapter.bias[first + i];
  }
  __syncthreads();
#pragma unroll 1
  for (int slot = warp(); slot < kInputs; slot += warps()) {
    const int64_t row = first_row + slot;
    if (adapter_shared().usable[slot] != 0)
      list_tile(step, tile, count, row, slot);
    else if (row < step.hidden.rows && lane() == 0)
      step.lists.fired[row * tiles_of(step) + tile] = 0;
  }
}

// The sum over the tiles before `end` of what fires in a row, the same in every thread. Integers are exact in a double.
__device__ __forceinline__ int64_t fired_before(const AdapterStep& step, int64_t row, int64_t end, double* buffer) {
  double sum = 0.0;
  for (int64_t tile = threadIdx.x; tile < end; tile += blockDim.x) sum += step.lists.fired[row * tiles_of(step) + tile];
  return static_cast<int64_t>(sum_over_block(sum, buffer));
}

template <class Weights, bool kAligned>
__global__ void __launch_bounds__(adapter_threads, 2) adapter_change_kernel(const __grid_constant__ AdapterStep step) {
  const Sae& sae = step.sae;
  const int64_t tiles = tiles_of(step), row = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t count = step.lists.fired[row * tiles + tile];
  if (count == 0) return;
  const int64_t d_model = sae.W_enc.columns, size = input_size<Weights>(d_model);
  const int32_t* latents = step.lists.tile_latents + row * sae.W_enc.rows + tile * adapter_tile;
  const float* values = step.lists.tile_values + row * sae.W_enc.rows + tile * adapter_tile;
  const int64_t to = row * sae.W_enc.rows + fired_before(step, row, tile, adapter_shared().sums);
  bool falls = false;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) falls = falls || values[i] < 0.0f;
  if (__syncthreads_or(step.adapter.clip && falls) != 0)
    load_input<Weights>(step.hidden, row, sae, adapter_input(), size, adapter_shared().sums);

  const FromMemory<Weights, kAligned> from_memory{ptx::evict_first_policy()};
#pragma unroll 1
  for (int64_t i = warp(); i < count; i += warps()) {
    float delta = values[i];
    bool all_finite = true;
    if (step.adapter.clip && delta < 0.0f) {
      const auto* from = reinterpret_cast<const typename Weights::Storage*>(sae.W_enc.data) + latents[i] * d_model;
      const float product = multiply<Weights, 1, 1>(from, 1, d_model, adapter_input(), size, from_memory);
      const float f = score_of(sae, latents[i], product).value;
      all_finite = finite(product) && finite(f);
      delta = fmaxf(delta, -f);
    }
    if (lane() != 0) continue;
    step.lists.latents[to + i] = latents[i];
    step.lists.changes[to + i] = delta;
    if (!all_finite) atomicMax(step.lists.bad + row * tiles + tile, 1u);
  }
}

template <class Weights, bool kAligned>
__global__ void __launch_bounds__(adapter_threads, 2) adapter_decode_kernel(const __grid_constant__ AdapterStep step) {
  using Storage = typename Weights::Storage;
  constexpr int per_load = Weights::per_load;
  constexpr int columns_per_slice = 32 * per_load;
  const Sae& sae = step.sae;
  const int64_t d_model = sae.W_enc.columns, tiles = tiles_of(step);
  const int64_t slices = (d_model + columns_per_slice - 1) / columns_per_slice;
  const int64_t row = blockIdx.x / slices, slice = blockIdx.x % slices;
  if (step.enabled != nullptr && !step.enabled[row]) return;
  uint32_t bad = 0;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += blockDim.x) bad |= step.lists.bad[row * tiles + tile];
  const bool all_finite = __syncthreads_or(bad != 0) == 0;
  const int64_t fired = fired_before(step, row, tiles, adapter_shared().sums);
  const int64_t count = all_finite ? fired : 0;
  const int32_t* latents = step.lists.latents + row * sae.W_enc.rows;
  const float* changes = step.lists.changes + row * sae.W_enc.rows;
  bool changed = false;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    if (changes[i] == 0.0f) continue;
    changed = true;
    if (slice == 0 && step.stats.latent_edits != nullptr)
      atomicAdd(reinterpret_cast<unsigned long long*>(step.stats.latent_edits + latents[i]), 1ull);
  }
  const bool edited = __syncthreads_or(changed) != 0;
  if (slice == 0 && threadIdx.x == 0 && step.stats.seen != nullptr) {
    step.stats.seen[row] += 1;
    step.stats.edited[row] += edited;
    step.stats.nonfinite[row] += !all_finite;
  }
  if (!edited) return;

  float* parts = adapter_input();  // [decode_parts, columns_per_slice]
  const int64_t column = slice * columns_per_slice + lane() * per_load;
#pragma unroll 1
  for (int part = warp(); part < decode_parts; part += warps()) {
    float sums[per_load] = {};
#pragma unroll 1
    for (int64_t i = part; i < count; i += decode_parts) {
      const int64_t latent = latents[i];
      const int64_t decoder_row = sae.decoder_rows == nullptr ? latent : sae.decoder_rows[latent];
      float factor = changes[i];
      if (factor == 0.0f || decoder_row < 0) continue;
      if (sae.decoder_norm != nullptr) factor = factor / sae.decoder_norm[latent];
      if (sae.normalization != Normalization::none) factor = factor * step.lists.scale[row];
      float weights[per_load] = {};
      const auto* from = reinterpret_cast<const Storage*>(sae.W_dec.data) + decoder_row * d_model + column;
      if constexpr (kAligned) {
        if (column < d_model) Weights::unpack(ptx::load_16(from), weights);
      } else {
#pragma unroll
        for (int j = 0; j < per_load; ++j) weights[j] = column + j < d_model ? Weights::number(from[j]) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < per_load; ++j) sums[j] = fmaf(factor, weights[j], sums[j]);
    }
#pragma unroll
    for (int j = 0; j < per_load; ++j) parts[part * columns_per_slice + lane() * per_load + j] = sums[j];
  }
  __syncthreads();
  char* to = const_cast<char*>(row_of(step.hidden, row));
  for (int64_t c = threadIdx.x; c < columns_per_slice; c += blockDim.x) {
    const int64_t at = slice * columns_per_slice + c;
    if (at >= d_model) break;
    float decoded = 0.0f;
    for (int part = 0; part < decode_parts; ++part) decoded += parts[part * columns_per_slice + c];
    const int64_t position = at * step.hidden.column_stride;
    store_number(to, step.hidden.dtype, position, load_number(to, step.hidden.dtype, position) + decoded);
  }
}

}  // namespace dspa::cuda
