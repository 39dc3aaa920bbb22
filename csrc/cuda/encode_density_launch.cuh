// The launches of encode_density: which kernels, their scratch memory, and how many tokens at a time.
#pragma once

#include <algorithm>

#include "encode_density.cuh"
#include "launch.cuh"

namespace dspa::cuda {

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// The tensor cores multiply numbers of the weights' own dtype. Inputs that are not exact in it go in three pieces of
// bfloat16, which have all bits of a float32; float16 has not the range for that.
inline int pieces_of(const StridedMatrix& hidden, const Sae& sae) {
  if (sae.W_enc.dtype == Dtype::float32 || !is_aligned(sae.W_enc)) return 0;
  const bool exact =
      hidden.dtype == sae.W_enc.dtype && sae.normalization == Normalization::none && sae.b_dec == nullptr;
  if (exact) return 1;
  return sae.W_enc.dtype == Dtype::bfloat16 ? 3 : 0;
}

bool has_warpgroup_products() {
  const auto kernel = &density_warpgroup_kernel<ptx::Bfloat16Pairs, Activation::threshold>;
  return takes_blocks_of(reinterpret_cast<const void*>(kernel), WarpgroupTile::threads);
}

// Whether the hidden states can be copied 16 bytes at a time, as the inputs of the products.
inline bool can_be_multiplied_in_place(const StridedMatrix& hidden) {
  return hidden.column_stride == 1 && hidden.row_stride % 8 == 0 && hidden.row_stride >= hidden.columns &&
         reinterpret_cast<uintptr_t>(hidden.data) % 16 == 0;
}

DensityPlan plan_density(const StridedMatrix& hidden, const Sae& sae) {
  DensityPlan plan;
  const bool topk = sae.activation == Activation::topk;
  plan.pieces = pieces_of(hidden, sae);
  plan.by_warpgroups = tuning().warpgroup_products && plan.pieces > 0 && has_warpgroup_products();
  plan.in_place = plan.pieces == 1 && can_be_multiplied_in_place(hidden);
  plan.depth = round_up(sae.W_enc.columns, plan.by_warpgroups ? WarpgroupTile::depth : depth_step);
  plan.tokens = round_up(hidden.rows, tile_tokens);
  if (plan.in_place && !topk) return plan;
  const int64_t input_bytes = plan.in_place ? 0 : plan.depth * (plan.pieces == 0 ? 4 : 2 * plan.pieces);
  const int64_t score_bytes = topk ? 4 * sae.W_enc.rows : 0;
  const int64_t fitting = tuning().density_bytes / std::max(input_bytes, score_bytes) / tile_tokens * tile_tokens;
  plan.tokens = std::min(std::max(fitting, tile_tokens), plan.tokens);
  plan.bytes = plan.tokens * (input_bytes + score_bytes + 4);
  return plan;
}

// Of groups of `latents`.
inline TileOrder order_of(const EncodeDensity& task, int64_t tokens, int64_t tile_of_tokens, int64_t latents) {
  TileOrder order;
  order.token_tiles = static_cast<uint32_t>(tokens / tile_of_tokens);
  order.latent_groups = static_cast<uint32_t>((task.sae.W_enc.rows + latents - 1) / latents);
  return order;
}

template <class Tile, class Kernel>
cudaError_t launch_tiles(Kernel kernel, const EncodeDensity& task, int64_t tokens, cudaStream_t stream) {
  constexpr int64_t shared = shared_bytes_of<Tile>();
  Room room;
  const cudaError_t error = room_for(reinterpret_cast<const void*>(kernel), density_threads, shared, room);
  if (error != cudaSuccess) return error;
  const TileOrder order = order_of(task, tokens, Tile::tokens, Tile::latents);
  return launch(kernel, dim3(order.tiles()), density_threads, shared, 1, stream, task, order);
}

template <class Pairs, Activation kActivation>
cudaError_t launch_warpgroups(const EncodeDensity& task, int64_t tokens, cudaStream_t stream) {
  using Tile = WarpgroupTile;
  constexpr int64_t shared = shared_bytes_of<Tile>();
  const auto kernel = &density_warpgroup_kernel<Pairs, kActivation>;
  Room room;
  cudaError_t error = room_for(reinterpret_cast<const void*>(kernel), Tile::threads, shared, room);
  const Matrix& weights = task.sae.W_enc;
  // The pieces of the inputs follow one another; what is past the last token is zero.
  const int64_t input_rows = task.pieces == 1 ? task.rows : task.pieces * task.tokens;
  DensityMaps maps;
  if (error == cudaSuccess)
    error = map_rows(maps.weights, weights.data, weights.rows, weights.columns, weights.columns, Tile::copied_rows);
  if (error == cudaSuccess)
    error = map_rows(maps.inputs, task.factors, input_rows, std::min(task.factor_stride, weights.columns),
                     task.factor_stride, Tile::copied_rows);
  if (error != cudaSuccess) return error;
  const TileOrder order = order_of(task, tokens, Tile::tokens, Tile::latents * Tile::cluster);
  const int64_t pairs = std::min<int64_t>(order.tiles(), std::max<int64_t>(room.blocks / Tile::cluster, 1));
  return launch(kernel, dim3(static_cast<unsigned>(pairs * Tile::cluster)), Tile::threads, shared, Tile::cluster,
                stream, task, maps, order, static_cast<uint32_t>(pairs));
}

template <class Pairs, Activation kActivation>
cudaError_t launch_pairs(const EncodeDensity& task, bool by_warpgroups, int64_t tokens, cudaStream_t stream) {
  if (by_warpgroups) return launch_warpgroups<Pairs, kActivation>(task, tokens, stream);
  return launch_tiles<MatrixTile>(&density_matrix_kernel<Pairs, kActivation>, task, tokens, stream);
}

template <class Pairs, bool kTopk>
cudaError_t launch_matrix(const EncodeDensity& task, bool by_warpgroups, int64_t tokens, cudaStream_t stream) {
  if constexpr (kTopk)
    return launch_pairs<Pairs, Activation::topk>(task, by_warpgroups, tokens, stream);
  else if (task.sae.activation == Activation::gated)
    return launch_pairs<Pairs, Activation::gated>(task, by_warpgroups, tokens, stream);
  else
    return launch_pairs<Pairs, Activation::threshold>(task, by_warpgroups, tokens, stream);
}

template <bool kTopk>
cudaError_t launch_products(const EncodeDensity& task, bool by_warpgroups, int64_t tokens, cudaStream_t stream) {
  const Dtype dtype = task.sae.W_enc.dtype;
  if (task.pieces > 0 && dtype == Dtype::bfloat16)
    return launch_matrix<ptx::Bfloat16Pairs, kTopk>(task, by_warpgroups, tokens, stream);
  if (task.pieces > 0) return launch_matrix<ptx::Float16Pairs, kTopk>(task, by_warpgroups, tokens, stream);
  if (dtype == Dtype::bfloat16)
    return launch_tiles<NumberTile>(&density_number_kernel<Bfloat16, kTopk>, task, tokens, stream);
  if (dtype == Dtype::float16)
    return launch_tiles<NumberTile>(&density_number_kernel<Float16, kTopk>, task, tokens, stream);
  return launch_tiles<NumberTile>(&density_number_kernel<Float32, kTopk>, task, tokens, stream);
}

inline cudaError_t encode_density(EncodeDensity task, const DensityPlan& plan, char* memory, cudaStream_t stream) {
  if (task.segments == 0) return cudaSuccess;
  const bool topk = task.sae.activation == Activation::topk;
  task.tokens = plan.tokens;
  task.depth = plan.depth;
  task.pieces = plan.pieces;
  if (!plan.in_place) {
    task.halves = reinterpret_cast<uint16_t*>(memory);
    task.inputs = reinterpret_cast<float*>(memory);
    memory += plan.tokens * plan.depth * (plan.pieces == 0 ? 4 : 2 * plan.pieces);
  }
  task.factor_stride = plan.in_place ? task.hidden.row_stride : plan.depth;
  task.segment_of = reinterpret_cast<int32_t*>(memory);
  task.scores = reinterpret_cast<float*>(memory + plan.tokens * 4);
  for (; task.first_token < task.hidden.rows; task.first_token += plan.tokens) {
    const int64_t left = task.hidden.rows - task.first_token;
    const int64_t tokens = std::min(plan.tokens, round_up(left, tile_tokens));
    task.rows = std::min(left, tokens);
    task.factors =
        plan.in_place ? reinterpret_cast<const uint16_t*>(task.hidden.row(task.first_token)) : task.halves;
    const dim3 blocks(static_cast<unsigned>(tokens));
    cudaError_t error = cudaSuccess;
    if (topk || !plan.in_place)  // otherwise nothing of what it writes is read
      error = launch(&density_inputs_kernel, blocks, density_threads,
                     static_cast<int64_t>(most_warps * sizeof(double)), 1, stream, task);
    if (error == cudaSuccess)
      error = topk ? launch_products<true>(task, plan.by_warpgroups, tokens, stream)
                   : launch_products<false>(task, plan.by_warpgroups, tokens, stream);
    if (error == cudaSuccess && topk)
      error = launch(&density_topk_kernel, blocks, density_threads, static_cast<int64_t>(sizeof(SelectionBuffer)), 1,
                     stream, task);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace dspa::cuda
