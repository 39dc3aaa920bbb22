// What the operations work on, as plain structures: the binding fills them in from tensors.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dspa::cpu {

// `[rows, columns]`, each row contiguous.
struct Matrix {
  const char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t rows = 0;
  int64_t columns = 0;

  DSPA_INLINE_MEMBER int64_t row_bytes() const { return columns * size_of(dtype); }
  DSPA_INLINE_MEMBER const char* row(int64_t index) const { return data + index * row_bytes(); }
};

// `[rows, columns]` with any strides, counted in elements.
struct StridedMatrix {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 1;

  char* row(int64_t index) const { return data + index * row_stride * size_of(dtype); }
};

// relu and batchtopk are threshold gates too, with a threshold of 0 or one for all latents.
enum class Activation { threshold, gated, topk };
enum class Normalization { none, constant_norm_rescale, layer_norm };

// One SAE; a null pointer stands for a tensor that it does not have. Vectors are `[d_sae]`, but `b_dec` is `[d_model]`.
struct Sae {
  Matrix W_enc;
  const float* b_enc = nullptr;
  const float* threshold = nullptr;
  const float* decoder_norm = nullptr;
  const float* magnitude_scale = nullptr;
  const float* magnitude_bias = nullptr;
  const float* b_dec = nullptr;  // only where the SAE subtracts it from its input
  Activation activation = Activation::threshold;
  int64_t k = 0;  // kept by topk
  Normalization normalization = Normalization::none;
  Matrix W_dec;
  const int32_t* decoder_rows = nullptr;

  DSPA_INLINE_MEMBER int64_t d_sae() const { return W_enc.rows; }
  DSPA_INLINE_MEMBER int64_t d_model() const { return W_enc.columns; }
};

// Row b edits `latents[b * capacity + i]` for i below `counts[b]`.
struct Edits {
  const int32_t* latents = nullptr;
  const int8_t* signs = nullptr;
  const int32_t* counts = nullptr;
  int64_t capacity = 0;
};

// The counters of `TokenStats`; all null where nobody counts.
struct Stats {
  int64_t* seen = nullptr;
  int64_t* edited = nullptr;
  int64_t* nonfinite = nullptr;
  double* maximum = nullptr;
  double* maximum_sum = nullptr;
  int64_t* maximum_known = nullptr;
  int64_t* latent_edits = nullptr;
};

}  // namespace dspa::cpu
