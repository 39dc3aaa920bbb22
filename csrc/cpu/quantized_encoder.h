// A copy of W_enc in 8 bits per weight, and the bounds it proves on products with the weights themselves.
#pragma once

#include <cstdint>

#include "../common/sae.h"
#include "parallel.h"

namespace dspa::cpu {

// Row i of W_enc is `scale[i] * values[i]` plus an error. Products with a token h, whose own code has the step `step`:
//
//   |W[i] . h - scale[i] * step * (values[i] . code of h)| <= error[i] * norm(h) + size[i] * (norm of h's own error)
//
// by Cauchy-Schwarz; `error` covers besides how far the float32 product that the kernels compute is from the true one.
struct QuantizedEncoder {
  const int8_t* values = nullptr;  // [d_sae, row_size], zero-padded
  const float* scale = nullptr;    // [d_sae]
  const float* error = nullptr;    // [d_sae], the norm of the quantization error
  const float* size = nullptr;     // [d_sae], the norm of `scale * values`
  int64_t row_size = 0;            // bytes, a multiple of 32

  const int8_t* row(int64_t index) const { return values + index * row_size; }
};

inline constexpr int64_t widest_quantized_model = 16384;  // the 32-bit sums of a wider one could overflow

// Quantizes all rows of a matrix; `factors` is [3, rows]: scale, error, size.
void quantize_rows(const Matrix& W, int8_t* values, int64_t row_size, float* factors, const ThreadPool& pool);

// A token in 16 bits per entry.
struct QuantizedToken {
  float step = 0.0f;
  float norm = 0.0f;   // of the token, rounded up
  float error = 0.0f;  // norm of the quantization error, rounded up
  bool usable = false;
};

// `input` is packed for rows of this dtype; `values` has `row_size` elements.
QuantizedToken quantize_token(const float* input, Dtype row_dtype, int64_t columns, int16_t* values, int64_t row_size);

// Bounds of the products of some rows with a token, from the products of their codes; may be infinite.
void bound_products(const QuantizedEncoder& codes, const QuantizedToken& token, int64_t first, int64_t count,
                    const float* code_products, float* lower, float* upper);

}  // namespace dspa::cpu
