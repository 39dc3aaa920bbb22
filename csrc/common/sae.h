// An SAE as a plain structure: its weights, and the rules by which it encodes (docs/method.md, section 1).
#pragma once

#include <cstdint>

#include "matrix.h"

namespace dspa {

// relu and batchtopk are threshold gates as well: with a threshold of 0, or one threshold for all latents.
enum class Activation { threshold, gated, topk };
enum class Normalization { none, constant_norm_rescale, layer_norm };

// A null pointer stands for a tensor that the SAE does not have. Vectors are `[d_sae]`, except `b_dec`: `[d_model]`.
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

}  // namespace dspa
