// `h'`, the input of the encoder (docs/method.md, section 1): the hidden state, normalised, minus the decoder bias.
#pragma once

#include "../common/sae.h"

namespace dspa::cpu {

struct EncoderInput {
  bool finite = false;
  float scale = 1.0f;  // maps a decoded difference back to the residual stream
};

// Writes `h'` of one row of `hidden`, packed for the rows of `sae.W_enc`.
EncoderInput encoder_input(const StridedMatrix& hidden, int64_t row, const Sae& sae, float* packed);

}  // namespace dspa::cpu
