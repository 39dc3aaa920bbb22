// The inputs of encode_density: `h'` of each token, in float32 or in pieces of 16 bits, and its segment.
#pragma once

#include "encode_density_count.cuh"

namespace dspa::cuda {

// The segment of a row, or -1.
__device__ inline int32_t find_segment(const EncodeDensity& task, int64_t row) {
  if (row >= task.hidden.rows || row < task.offsets[0] || row >= task.offsets[task.segments]) return -1;
  int64_t low = 0, high = task.segments;  // the last offset at or before the row
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (task.offsets[middle] <= row)
      low = middle;
    else
      high = middle;
  }
  return static_cast<int32_t>(low);
}

// The leading 8 significant bits of a number. Three such pieces, each of the remainder, add up to a float32.
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
    if (!finite(normalizer.scale)) value = normalizer.scale - normalizer.scale;  // NaN: nothing of the token is finite
    for (int piece = 0; piece < task.pieces && task.halves != nullptr; ++piece) {
      const float part = task.pieces == 1 ? value : leading_piece(value);
      value -= part;
      task.halves[(piece * task.tokens + token) * task.depth + i] =
          task.sae.W_enc.dtype == Dtype::float16 ? ptx::float16_of_float(part) : ptx::bfloat16_of_float(part);
    }
  }
  const int everywhere = __syncthreads_and(all_finite);
  if (threadIdx.x == 0) task.segment_of[token] = everywhere != 0 ? find_segment(task, row) : -1;
}

}  // namespace dspa::cuda
