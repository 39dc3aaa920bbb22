// The encoder on the device: `h'` in shared memory, products with rows of W_enc, and activations.
#pragma once

#include "../common/sae.h"
#include "block.cuh"
#include "numbers.cuh"

namespace dspa::cuda {


constexpr double layer_norm_epsilon = 1e-5;
constexpr int loads_in_flight = 8;  // 16 bytes each, for every thread

__device__ __forceinline__ const char* row_of(const StridedMatrix& matrix, int64_t row) {
  return matrix.data + row * matrix.row_stride * (matrix.dtype == Dtype::float32 ? 4 : 2);
}

// `(value - shift) * factor` normalises a row; `scale` maps a decoded difference back.
struct Normalizer {
  double shift = 0.0;
  double factor = 1.0;
  float scale = 1.0f;

  __device__ __forceinline__ float normalized(float value) const {
    return static_cast<float>((value - shift) * factor);
  }
};

// By the whole block, in an order that depends on the number of its threads alone.
__device__ inline Normalizer normalizer_of(const StridedMatrix& hidden, int64_t row, Normalization kind,
                                           double* buffer) {
  const char* from = row_of(hidden, row);
  const double count = static_cast<double>(hidden.columns);
  Normalizer normalizer;
  if (kind == Normalization::none) return normalizer;
  double sum = 0.0;
  if (kind == Normalization::layer_norm) {
    for (int64_t i = threadIdx.x; i < hidden.columns; i += blockDim.x)
      sum += load_number(from, hidden.dtype, i * hidden.column_stride);
    normalizer.shift = sum_over_block(sum, buffer) / count;
  }
  double squares = 0.0;
  for (int64_t i = threadIdx.x; i < hidden.columns; i += blockDim.x) {
    const double centred = load_number(from, hidden.dtype, i * hidden.column_stride) - normalizer.shift;
    squares += centred * centred;
  }
  squares = sum_over_block(squares, buffer);
  if (kind == Normalization::layer_norm) {
    const double deviation = sqrt(squares / (count - 1.0));
    normalizer.scale = static_cast<float>(deviation);
    normalizer.factor = 1.0 / (deviation + layer_norm_epsilon);
  } else {
    const double norm = sqrt(squares);
    normalizer.scale = static_cast<float>(norm / sqrt(count));
    normalizer.factor = sqrt(count) / norm;
  }
  return normalizer;
}

// Entry `column` of `h'`, from that of the hidden state.
__device__ __forceinline__ float encoder_input(float value, int64_t column, const Sae& sae,
                                               const Normalizer& normalizer) {
  if (sae.normalization != Normalization::none) value = normalizer.normalized(value);
  return sae.b_dec == nullptr ? value : value - sae.b_dec[column];
}

__device__ __forceinline__ float encoder_input(const StridedMatrix& hidden, const char* row, int64_t column,
                                               const Sae& sae, const Normalizer& normalizer) {
  return encoder_input(load_number(row, hidden.dtype, column * hidden.column_stride), column, sae, normalizer);
}

struct Score {
  float z;      // the value by which latents are ranked
  float value;  // its activation, for topk if it is among the k largest; 0 where it is not active
};

// What the activation of a latent depends on, besides the product.
struct LatentParameters {
  float bias = 0.0f, norm = 0.0f, threshold = 0.0f;
  float magnitude_scale = 0.0f, magnitude_bias = 0.0f;
};

// Loaded before the product is known, so that nobody waits for it afterwards.
__device__ __forceinline__ LatentParameters load_parameters(const Sae& sae, int64_t latent) {
  LatentParameters parameters;
  parameters.bias = sae.b_enc[latent];
  if (sae.decoder_norm != nullptr) parameters.norm = sae.decoder_norm[latent];
  if (sae.activation == Activation::gated) {
    parameters.magnitude_scale = sae.magnitude_scale[latent];
    parameters.magnitude_bias = sae.magnitude_bias[latent];
  } else if (sae.activation == Activation::threshold) {
    parameters.threshold = sae.threshold[latent];
  }
  return parameters;
}

// The activation of a latent from the bare product. NaN is not active.
__device__ __forceinline__ Score score_of(const Sae& sae, const LatentParameters& parameters, float product) {
  float z = product + parameters.bias;
  if (sae.decoder_norm != nullptr) z = z * parameters.norm;
  float value = z;
  bool active = z > 0.0f;
  if (sae.activation == Activation::gated) {
    value = product * parameters.magnitude_scale + parameters.magnitude_bias;
    active = active && value > 0.0f;
  } else if (sae.activation == Activation::threshold) {
    active = active && z > parameters.threshold;
  }
  return {z, active ? value : 0.0f};
}

__device__ __forceinline__ Score score_of(const Sae& sae, int64_t latent, float product) {
  return score_of(sae, load_parameters(sae, latent), product);
}

// ---- products of rows of weights with inputs in shared memory -------------------------------------------------------

// The position of entry i of an input. The lanes of a warp, each with the numbers of one 16-byte load of weights, read
// neighbouring 16 bytes of it.
template <class Weights>
__device__ __forceinline__ int64_t input_position(int64_t i) {
  constexpr int per_load = Weights::per_load;
  const int64_t chunk = i / (32 * per_load), within = i % (32 * per_load);
  const int64_t thread = within / per_load, j = within % per_load;
  return chunk * 32 * per_load + j / 4 * 128 + thread * 4 + j % 4;
}

template <class Weights>
__host__ __device__ inline int64_t input_size(int64_t d_model) {
  constexpr int64_t chunk = 32 * Weights::per_load;
  return (d_model + chunk - 1) / chunk * chunk;
}

struct LoadedInput {
  bool finite;  // the whole input, and the scale
  float scale;
};

// Writes `h'` of one row to shared memory, zero-padded to `size`, by the whole block.
template <class Weights>
__device__ __forceinline__ LoadedInput load_input(const StridedMatrix& hidden, int64_t row, const Sae& sae,
                                                  float* input, int64_t size, double* buffer) {
  const Normalizer normalizer = normalizer_of(hidden, row, sae.normalization, buffer);
  const char* from = row_of(hidden, row);
  bool all_finite = finite(normalizer.scale);
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    const float value = i < hidden.columns ? encoder_input(hidden, from, i, sae, normalizer) : 0.0f;
    all_finite = all_finite && finite(value);
    input[input_position<Weights>(i)] = value;
  }
  return {__syncthreads_and(all_finite) != 0, normalizer.scale};
}

// How the numbers of a row are loaded, 16 bytes from `column` on, with zeros past the end of the row.

template <class Weights, bool kAligned>
struct FromMemory {  // where they are read once
  uint64_t policy;

  __device__ __forceinline__ uint4 operator()(const typename Weights::Storage* row, int64_t column,
                                              int64_t d_model) const {
    if constexpr (kAligned) {
      return ptx::load_streaming(row + column, policy);
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < Weights::per_load; ++j) {
        if (column + j >= d_model) continue;
        if constexpr (Weights::per_load == 4)
          words[j] = __float_as_uint(row[column + j]);
        else
          words[j / 2] |= static_cast<uint32_t>(row[column + j]) << (16 * (j % 2));
      }
      return uint4{words[0], words[1], words[2], words[3]};
    }
  }
};

template <class Weights>
struct FromShared {
  __device__ __forceinline__ uint4 operator()(const typename Weights::Storage* row, int64_t column, int64_t) const {
    return ptx::load_16(row + column);
  }
};

// Products of `kRows` neighbouring rows, of which the first `count` exist, with `kInputs` inputs: the lane's own is
// that of row `v / kInputs` and input `v % kInputs`, v = lane * kRows * kInputs / 32. The order of the additions does
// not depend on kRows and kInputs.
template <class Weights, int kRows, int kInputs, class Load>
__device__ __forceinline__ float multiply(const typename Weights::Storage* rows, int64_t count, int64_t d_model,
                                          const float* inputs, int64_t size, const Load& load) {
  constexpr int per_load = Weights::per_load;
  constexpr int chunk_size = 32 * per_load;
  constexpr int chunks_in_flight = kRows >= loads_in_flight ? 1 : loads_in_flight / kRows;
  const int columns = static_cast<int>(d_model), padded = static_cast<int>(size);
  float sums[kRows * kInputs] = {};
#pragma unroll 1
  for (int first = 0; first < padded; first += chunks_in_flight * chunk_size) {
    uint4 loaded[chunks_in_flight][kRows];
#pragma unroll
    for (int c = 0; c < chunks_in_flight; ++c)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int column = first + c * chunk_size + lane() * per_load;
        loaded[c][r] = r < count && column < columns ? load(rows + r * d_model, column, d_model) : uint4{0, 0, 0, 0};
      }
#pragma unroll
    for (int c = 0; c < chunks_in_flight; ++c) {
      if (first + c * chunk_size >= padded) break;
#pragma unroll
      for (int n = 0; n < kInputs; ++n) {
        float input[per_load];
#pragma unroll
        for (int quarter = 0; quarter < per_load / 4; ++quarter) {
          const float4 four = *reinterpret_cast<const float4*>(inputs + n * padded + first + c * chunk_size +
                                                               quarter * 128 + lane() * 4);
          input[4 * quarter] = four.x;
          input[4 * quarter + 1] = four.y;
          input[4 * quarter + 2] = four.z;
          input[4 * quarter + 3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float weights[per_load];
          Weights::unpack(loaded[c][r], weights);
#pragma unroll
          for (int j = 0; j < per_load; ++j)
            sums[r * kInputs + n] = fmaf(weights[j], input[j], sums[r * kInputs + n]);
        }
      }
    }
  }
  return sum_over_warp(sums);
}

}  // namespace dspa::cuda
