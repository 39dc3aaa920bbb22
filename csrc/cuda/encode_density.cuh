// How many tokens of each segment activate each latent: a matrix product whose tiles are gated and counted where they
// are, in registers.
//
// Three kernels: one encodes the inputs, one multiplies tiles (on the tensor cores where the numbers are exact in 16
// bits, or sums of such, by warps or on sm_90a by warpgroups, else with float32 additions), and for topk, whose latents
// compete with one another, one picks the k largest scores of each token. For topk the scores of some whole tokens are
// held, however many tokens there are.
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

// A tile at the beginning of dynamic shared memory, which is aligned to 128 bytes whatever the tile asks for.
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

// ---- counting a tile ------------------------------------------------------------------------------------------------

// Adds a tile's active latents to the counts, segment by segment. `segments` says whose each of the tile's tokens is;
// `add_own(segment)` adds what a thread has found of that segment to the `counters` of the tile's latents. Both arrays
// are shared.
template <int kTokens, int kLatents, class AddOwn>
__device__ __forceinline__ void count_tile(const EncodeDensity& task, int64_t first_latent, const int32_t* segments,
                                           uint32_t* counters, const AddOwn& add_own) {
  int32_t segment = -1;
  while (true) {  // over the segments of the tile: few, and they rise
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
  MatrixTile& tile = tile_in_shared<MatrixTile>();
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
    count_tile<MatrixTile::tokens, MatrixTile::latents>(
        task, first_latent, tile.segments, tile.counters, [&](int32_t segment) {
          add_columns(8, active, row, column, tile.segments, segment, tile.counters);
        });
}

// ---- tiles by warpgroups (sm_90a) -----------------------------------------------------------------------------------

// What the tensor cores are told of a matrix: rows of 64 16-bit numbers, 128 bytes, one behind the other, where piece c
// (16 bytes) of row r lies at place c ^ r % 8. `first` is in row 0, which begins at a multiple of 1024 bytes; columns
// before it are skipped, 16 at a time.
__device__ __forceinline__ uint64_t swizzled_rows(const void* first) {
  constexpr uint64_t of_eight_rows = 1024, not_used = 1, swizzle_of_128_bytes = 1;
  const uint64_t start = ptx::shared_address(first) & 0x3ffff;
  return start >> 4 | not_used << 16 | of_eight_rows >> 4 << 32 | swizzle_of_128_bytes << 62;
}

struct alignas(1024) WarpgroupTile {
  static constexpr int tokens = 128, latents = 256, depth = 64, stages = 4;
  static constexpr int copies_ahead = stages - 2;  // of the products; the stage that is left is still being multiplied
  uint16_t a[stages][tokens][depth];               // rows whose pieces of 16 bytes are permuted: see swizzled_rows
  uint16_t b[stages][latents][depth];
  int32_t segments[tokens];
  uint32_t counters[latents];
};

// The lowest four bits, a byte each.
__device__ __forceinline__ uint32_t bytes_of_bits(uint32_t bits) { return (bits & 15u) * 0x00204081u & 0x01010101u; }

// Two warpgroups share a tile, each with 64 of its tokens and all of its latents. All threads bring the next stages
// while the tensor cores multiply.
template <class Pairs, bool kTopk>
__device__ __forceinline__ void count_by_warpgroups(const EncodeDensity& task, uint32_t token_tiles) {
  WarpgroupTile& tile = tile_in_shared<WarpgroupTile>();
  const int64_t first_token = static_cast<int64_t>(blockIdx.x % token_tiles) * WarpgroupTile::tokens;
  const int64_t first_latent = static_cast<int64_t>(blockIdx.x / token_tiles) * WarpgroupTile::latents;
  const int64_t d_sae = task.sae.W_enc.rows, d_model = task.sae.W_enc.columns;
  const auto* weights = reinterpret_cast<const uint16_t*>(task.sae.W_enc.data);
  const int depth_steps = static_cast<int>(task.depth / WarpgroupTile::depth), steps = depth_steps * task.pieces;
  const int thread = static_cast<int>(threadIdx.x);

  // Eight threads bring a row: each one piece of 16 bytes of every 32nd row.
  constexpr int rows_at_once = density_threads / 8;
  const int own_row = thread / 8, own_piece = thread % 8, place = (own_piece ^ own_row % 8) * 8;
  const auto fetch = [&](int step) {
    const int stage = step % WarpgroupTile::stages;
    const int64_t piece = step / depth_steps, column = step % depth_steps * WarpgroupTile::depth + own_piece * 8;
#pragma unroll
    for (int i = 0; i < WarpgroupTile::tokens / rows_at_once; ++i) {
      const int row = own_row + i * rows_at_once;
      ptx::copy_async(&tile.a[stage][row][place],
                      task.halves + (piece * task.tokens + first_token + row) * task.depth + column, true);
    }
#pragma unroll
    for (int i = 0; i < WarpgroupTile::latents / rows_at_once; ++i) {
      const int row = own_row + i * rows_at_once;
      const int64_t latent = first_latent + row;
      const bool valid = latent < d_sae && column < d_model;
      ptx::copy_async(&tile.b[stage][row][place], valid ? weights + latent * d_model + column : weights, valid);
    }
  };

  const int group_token = warp() / 4 * 64;
  float sums[128] = {};
#pragma unroll
  for (int step = 0; step < WarpgroupTile::copies_ahead; ++step) {
    if (step < steps) fetch(step);
    ptx::commit_copies();
  }
  ptx::settle(sums);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::wait_for_copies<WarpgroupTile::copies_ahead - 1>();
    ptx::show_to_tensor_cores();
    __syncthreads();  // everybody's copies are there, and everybody's products but those of the last step are done
    const int stage = step % WarpgroupTile::stages;
    ptx::begin_products();
#pragma unroll
    for (int k = 0; k < WarpgroupTile::depth; k += 16)
      ptx::multiply_add(Pairs{}, sums, swizzled_rows(&tile.a[stage][group_token][k]),
                        swizzled_rows(&tile.b[stage][0][k]));
    ptx::commit_products();
    if (step + WarpgroupTile::copies_ahead < steps) fetch(step + WarpgroupTile::copies_ahead);
    ptx::commit_copies();
    ptx::wait_for_products<1>();
  }
  ptx::wait_for_products<0>();
  ptx::settle(sums);

  if (thread < WarpgroupTile::tokens) tile.segments[thread] = task.segment_of[first_token + thread];
  __syncthreads();
  // A thread has two tokens and 64 latents, of which those that the lanes l, l + 4, l + 8, ... have are the same.
  const auto row = [&](int i) { return group_token + warp() % 4 * 16 + lane() / 4 + 8 * i; };
  const auto column = [&](int j) { return j / 2 * 8 + lane() % 4 * 2 + j % 2; };
  uint32_t active[2][2] = {};  // of each token, a bit for each latent
#pragma unroll
  for (int j = 0; j < 64; ++j) {
    const int64_t latent = first_latent + column(j);
    if (latent >= d_sae) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float value = score_of(task.sae, latent, sums[j / 2 * 4 + i * 2 + j % 2]).value;
      if constexpr (kTopk)
        task.scores[(first_token + row(i)) * d_sae + latent] = value;
      else
        active[i][j / 32] |= static_cast<uint32_t>(value > 0.0f) << j % 32;
    }
  }
  if constexpr (!kTopk)
    count_tile<WarpgroupTile::tokens, WarpgroupTile::latents>(
        task, first_latent, tile.segments, tile.counters, [&](int32_t segment) {
          const bool mine[2] = {tile.segments[row(0)] == segment, tile.segments[row(1)] == segment};
#pragma unroll
          for (int j = 0; j < 64; j += 4) {  // four latents at a time, a byte each: a warp has 16 tokens
            uint32_t found = 0;
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (mine[i]) found += bytes_of_bits(active[i][j / 32] >> j % 32);
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) found += __shfl_xor_sync(all_lanes, found, offset);
            if (j / 4 % 8 != lane() / 4) continue;  // all of these lanes have the sum; one adds it
#pragma unroll
            for (int byte = 0; byte < 4; ++byte)
              if ((found >> 8 * byte & 255u) != 0)
                atomicAdd(tile.counters + column(j + byte), found >> 8 * byte & 255u);
          }
        });
}

// In code for other GPUs than sm_90a the kernel is empty and takes blocks of one warp, by which the launcher knows.
template <class Pairs, bool kTopk>
__global__ void __launch_bounds__(ptx::has_warpgroup_products ? density_threads : 32, 1)
    density_warpgroup_kernel(const __grid_constant__ EncodeDensity task, uint32_t token_tiles) {
  if constexpr (ptx::has_warpgroup_products) count_by_warpgroups<Pairs, kTopk>(task, token_tiles);
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
  NumberTile& tile = tile_in_shared<NumberTile>();
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
  const auto row = [&](int i) { return own_token + i; };
  const auto column = [&](int j) { return own_latent + j; };
  uint32_t active[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t latent = first_latent + column(j);
    if (latent >= d_sae) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = score_of(task.sae, latent, sums[i][j]).value;
      if constexpr (kTopk)
        task.scores[(first_token + row(i)) * d_sae + latent] = value;
      else
        active[j] |= static_cast<uint32_t>(value > 0.0f) << i;
    }
  }
  if constexpr (!kTopk)
    count_tile<NumberTile::tokens, NumberTile::latents>(
        task, first_latent, tile.segments, tile.counters, [&](int32_t segment) {
          add_columns(4, active, row, column, tile.segments, segment, tile.counters);
        });
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
