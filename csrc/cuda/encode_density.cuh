// How many tokens of each segment activate each latent: a matrix product whose tiles are gated and counted where they
// are, in registers.
//
// Three kernels: one encodes the inputs, one multiplies tiles (on the tensor cores where the numbers are exact in 16
// bits, or sums of such, else with float32 additions), and for topk, whose latents compete with one another, one picks
// the k largest scores of each token. For topk the scores of some whole tokens are held, however many tokens there are.
#pragma once

#include "encoder.cuh"
#include "operations.h"
#include "select.cuh"

namespace dspa::cuda {

constexpr int density_threads = 256;
constexpr int depth_step = 32;
constexpr int64_t tile_tokens = 128;  // the most that a tile has

// ---- inputs ---------------------------------------------------------------------------------------------------------

// The segment of a row, or -1.
__device__ inline int32_t find_segment(const EncodeDensity& task, int64_t row) {
  if (row >= task.hidden.rows || row < task.offsets[0] || row >= task.offsets[task.segments]) return -1;
  int64_t low = 0, high = task.segments;  // the last offset that is not behind the row
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (task.offsets[middle] <= row)
      low = middle;
    else
      high = middle;
  }
  return static_cast<int32_t>(low);
}

// The leading 8 significant bits of a number. What is left has as many fewer: three such pieces are all of it.
__device__ __forceinline__ float leading_piece(float value) {
  return __uint_as_float(__float_as_uint(value) & 0xffff0000u);
}

// A block encodes one token.
__global__ void __launch_bounds__(density_threads, 2)
    density_inputs_kernel(const __grid_constant__ EncodeDensity task) {
  double* sums = reinterpret_cast<double*>(ptx::dynamic_shared());
  const int64_t token = blockIdx.x, row = task.first_token + token;
  const bool exists = row < task.hidden.rows;
  const char* from = row_of(task.hidden, exists ? row : 0);
  Normalizer normalizer;
  if (exists) normalizer = normalizer_of(task.hidden, row, task.sae.normalization, sums);
  bool all_finite = finite(normalizer.scale);
  for (int64_t i = threadIdx.x; i < task.depth; i += blockDim.x) {
    float value = 0.0f;
    if (exists && i < task.hidden.columns) value = encoder_input(task.hidden, from, i, task.sae, normalizer);
    all_finite = all_finite && finite(value);
    if (task.pieces == 0) task.inputs[token * task.depth + i] = value;
    for (int piece = 0; piece < task.pieces; ++piece) {
      const float part = task.pieces == 1 ? value : leading_piece(value);
      value -= part;
      task.halves[(piece * task.tokens + token) * task.depth + i] =
          task.sae.W_enc.dtype == Dtype::float16 ? ptx::float16_of_float(part) : ptx::bfloat16_of_float(part);
    }
  }
  const int everywhere = __syncthreads_and(all_finite);
  if (threadIdx.x == 0) task.segment_of[token] = everywhere != 0 ? find_segment(task, row) : -1;
}

// ---- counting a tile ------------------------------------------------------------------------------------------------

// What a thread does with its part of a tile of scores: `row(i)` and `column(j)` say which tokens and latents these
// are, and bit i of active[j] whether the latent is active there. `segments` and `counters` are shared.
template <int kTokens, int kLatents, int kOwnLatents, class Row, class Column>
__device__ __forceinline__ void count_tile(const EncodeDensity& task, int64_t first_latent, int own_tokens,
                                           const uint32_t (&active)[kOwnLatents], const Row& row, const Column& column,
                                           const int32_t* segments, uint32_t* counters) {
  int32_t segment = -1;
  while (true) {  // over the segments of the tile: few, and they rise
    int32_t next = INT32_MAX;
    for (int t = 0; t < kTokens; ++t)
      if (segments[t] > segment && segments[t] < next) next = segments[t];
    if (next == INT32_MAX) return;
    segment = next;
    for (int i = static_cast<int>(threadIdx.x); i < kLatents; i += static_cast<int>(blockDim.x)) counters[i] = 0;
    __syncthreads();
    uint32_t mine = 0;
    for (int i = 0; i < own_tokens; ++i) mine |= static_cast<uint32_t>(segments[row(i)] == segment) << i;
#pragma unroll
    for (int j = 0; j < kOwnLatents; ++j) {
      const uint32_t count = static_cast<uint32_t>(__popc(active[j] & mine));
      if (count != 0) atomicAdd(counters + column(j), count);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kLatents; i += static_cast<int>(blockDim.x))
      if (counters[i] != 0)
        atomicAdd(reinterpret_cast<uint32_t*>(task.counts) + segment * task.sae.W_enc.rows + first_latent + i,
                  counters[i]);
    __syncthreads();
  }
}

// ---- tiles on the tensor cores --------------------------------------------------------------------------------------

struct MatrixTile {
  static constexpr int tokens = 128, latents = 128, stages = 3;
  static constexpr int row_size = depth_step + 8;  // 80 bytes: eight rows lie in different banks
  uint16_t a[stages][tokens][row_size];
  uint16_t b[stages][latents][row_size];
  int32_t segments[tokens];
  uint32_t counters[latents];
};

template <class Pairs, bool kTopk>
__global__ void __launch_bounds__(density_threads, 1)
    density_matrix_kernel(const __grid_constant__ EncodeDensity task, uint32_t token_tiles) {
  MatrixTile& tile = *reinterpret_cast<MatrixTile*>(ptx::dynamic_shared());
  const int64_t first_token = static_cast<int64_t>(blockIdx.x % token_tiles) * MatrixTile::tokens;
  const int64_t first_latent = static_cast<int64_t>(blockIdx.x / token_tiles) * MatrixTile::latents;
  const int64_t d_sae = task.sae.W_enc.rows, d_model = task.sae.W_enc.columns;
  const auto* weights = reinterpret_cast<const uint16_t*>(task.sae.W_enc.data);
  const int64_t depth_steps = task.depth / depth_step, steps = depth_steps * task.pieces;
  const int thread = static_cast<int>(threadIdx.x);

  const auto fetch = [&](int64_t step) {
    const int stage = static_cast<int>(step % MatrixTile::stages);
    const int64_t piece = step / depth_steps, depth = step % depth_steps * depth_step;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int copy = thread + i * density_threads, row = copy / 4, column = copy % 4 * 8;
      ptx::copy_async(&tile.a[stage][row][column],
                      task.halves + (piece * task.tokens + first_token + row) * task.depth + depth + column, true);
      const int64_t latent = first_latent + row;
      const bool valid = latent < d_sae && depth + column < d_model;
      ptx::copy_async(&tile.b[stage][row][column], valid ? weights + latent * d_model + depth + column : weights,
                      valid);
    }
  };

  // Warps are 2 by 4, each with 64 tokens by 32 latents.
  const int warp_token = warp() / 4 * 64, warp_latent = warp() % 4 * 32;
  float sums[4][4][4] = {};
#pragma unroll
  for (int step = 0; step < MatrixTile::stages - 1; ++step) {
    if (step < steps) fetch(step);
    ptx::commit_copies();
  }
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    ptx::wait_for_copies<MatrixTile::stages - 2>();
    __syncthreads();  // everybody's copies are there, and everybody is done with the stage that is fetched next
    if (step + MatrixTile::stages - 1 < steps) fetch(step + MatrixTile::stages - 1);
    ptx::commit_copies();
    const int stage = static_cast<int>(step % MatrixTile::stages);
#pragma unroll
    for (int k = 0; k < depth_step; k += 16) {
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        ptx::load_matrices(a[m], &tile.a[stage][warp_token + 16 * m + lane() % 16][k + lane() / 16 * 8]);
#pragma unroll
      for (int n = 0; n < 2; ++n)
        ptx::load_matrices(
            b[n], &tile.b[stage][warp_latent + 16 * n + lane() / 16 * 8 + lane() % 8][k + lane() / 8 % 2 * 8]);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          ptx::multiply_add(Pairs{}, sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }

  if (thread < MatrixTile::tokens) tile.segments[thread] = task.segment_of[first_token + thread];
  __syncthreads();
  const auto row = [&](int i) { return warp_token + i / 2 * 16 + i % 2 * 8 + lane() / 4; };
  const auto column = [&](int j) { return warp_latent + j / 2 * 8 + lane() % 4 * 2 + j % 2; };
  uint32_t active[8] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int64_t latent = first_latent + column(j);
    if (latent >= d_sae) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = score_of(task.sae, latent, sums[i / 2][j / 2][i % 2 * 2 + j % 2]).value;
      if constexpr (kTopk)
        task.scores[(first_token + row(i)) * d_sae + latent] = value;
      else
        active[j] |= static_cast<uint32_t>(value > 0.0f) << i;
    }
  }
  if constexpr (!kTopk)
    count_tile<MatrixTile::tokens, MatrixTile::latents>(task, first_latent, 8, active, row, column, tile.segments,
                                                        tile.counters);
}

// ---- tiles in float32 -----------------------------------------------------------------------------------------------

struct NumberTile {
  static constexpr int tokens = 64, latents = 64, depth = 16;
  float a[depth][tokens + 4];
  float b[depth][latents + 4];
  int32_t segments[tokens];
  uint32_t counters[latents];
};

template <class Weights, bool kTopk>
__global__ void __launch_bounds__(density_threads, 2)
    density_number_kernel(const __grid_constant__ EncodeDensity task, uint32_t token_tiles) {
  NumberTile& tile = *reinterpret_cast<NumberTile*>(ptx::dynamic_shared());
  const int64_t first_token = static_cast<int64_t>(blockIdx.x % token_tiles) * NumberTile::tokens;
  const int64_t first_latent = static_cast<int64_t>(blockIdx.x / token_tiles) * NumberTile::latents;
  const int64_t d_sae = task.sae.W_enc.rows, d_model = task.sae.W_enc.columns;
  const auto* weights = reinterpret_cast<const typename Weights::Storage*>(task.sae.W_enc.data);
  const int thread = static_cast<int>(threadIdx.x);
  const int own_token = thread / 16 * 4, own_latent = thread % 16 * 4;

  float sums[4][4] = {};
  for (int64_t depth = 0; depth < task.depth; depth += NumberTile::depth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int number = thread + i * density_threads, row = number / NumberTile::depth, k = number % NumberTile::depth;
      tile.a[k][row] = task.inputs[(first_token + row) * task.depth + depth + k];
      const int64_t latent = first_latent + row;
      const bool valid = latent < d_sae && depth + k < d_model;
      tile.b[k][row] = valid ? Weights::number(weights[latent * d_model + depth + k]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < NumberTile::depth; ++k) {
      const float4 a = *reinterpret_cast<const float4*>(&tile.a[k][own_token]);
      const float4 b = *reinterpret_cast<const float4*>(&tile.b[k][own_latent]);
      const float of_tokens[4] = {a.x, a.y, a.z, a.w}, of_latents[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(of_tokens[i], of_latents[j], sums[i][j]);
    }
    __syncthreads();
  }

  if (thread < NumberTile::tokens) tile.segments[thread] = task.segment_of[first_token + thread];
  __syncthreads();
  uint32_t active[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t latent = first_latent + own_latent + j;
    if (latent >= d_sae) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = score_of(task.sae, latent, sums[i][j]).value;
      if constexpr (kTopk)
        task.scores[(first_token + own_token + i) * d_sae + latent] = value;
      else
        active[j] |= static_cast<uint32_t>(value > 0.0f) << i;
    }
  }
  if constexpr (!kTopk)
    count_tile<NumberTile::tokens, NumberTile::latents>(
        task, first_latent, 4, active, [&](int i) { return own_token + i; }, [&](int j) { return own_latent + j; },
        tile.segments, tile.counters);
}

// ---- topk -----------------------------------------------------------------------------------------------------------

// A block picks the k largest scores of one token; ties go to the lower index, and what is not positive does not count.
__global__ void __launch_bounds__(density_threads, 2) density_topk_kernel(const __grid_constant__ EncodeDensity task) {
  SelectionBuffer& buffer = *reinterpret_cast<SelectionBuffer*>(ptx::dynamic_shared());
  const int64_t d_sae = task.sae.W_enc.rows;
  const int64_t segment = task.segment_of[blockIdx.x];
  if (segment < 0) return;
  const float* scores = task.scores + static_cast<int64_t>(blockIdx.x) * d_sae;
  const auto key_of = [&](int64_t latent) { return __float_as_uint(scores[latent]); };
  const auto selection = select_largest<uint32_t>(d_sae, static_cast<uint32_t>(task.sae.k), key_of, buffer);
  for_each_selected(
      d_sae, selection, key_of,
      [&](int64_t latent, uint32_t) {
        if (scores[latent] > 0.0f) atomicAdd(reinterpret_cast<uint32_t*>(task.counts) + segment * d_sae + latent, 1u);
      },
      buffer);
}

}  // namespace dspa::cuda
