#include "encoder_input.h"

#include <cmath>

#include "row_kernels.h"

namespace dspa::cpu {
namespace {

constexpr double layer_norm_epsilon = 1e-5;

// `(value - shift) * factor` normalises a row.
struct Normalizer {
  double shift = 0.0;
  double factor = 1.0;
};

Normalizer normalizer(const char* row, const StridedMatrix& hidden, Normalization kind, float& scale) {
  const double count = static_cast<double>(hidden.columns);
  double shift = 0.0;
  if (kind == Normalization::layer_norm) {
    for (int64_t i = 0; i < hidden.columns; ++i) shift += load_element(row, hidden.dtype, i * hidden.column_stride);
    shift /= count;
  }
  double squares = 0.0;
  for (int64_t i = 0; i < hidden.columns; ++i) {
    const double centred = load_element(row, hidden.dtype, i * hidden.column_stride) - shift;
    squares += centred * centred;
  }
  if (kind == Normalization::layer_norm) {
    const double deviation = std::sqrt(squares / (count - 1.0));
    scale = static_cast<float>(deviation);
    return {shift, 1.0 / (deviation + layer_norm_epsilon)};
  }
  const double norm = std::sqrt(squares);
  scale = static_cast<float>(norm / std::sqrt(count));
  return {0.0, std::sqrt(count) / norm};
}

// One loop for each dtype, column stride of 1 or not, so that the compiler sees constants.
DSPA_INLINE bool pack(const char* row, Dtype dtype, int64_t stride, const Sae& sae, const Normalizer* normalizer,
                      float* packed) {
  const int64_t columns = sae.d_model();
  bool finite = true;
  for (int64_t i = 0; i < columns; ++i) {
    float value = load_element(row, dtype, i * stride);
    if (normalizer != nullptr) value = static_cast<float>((value - normalizer->shift) * normalizer->factor);
    if (sae.b_dec != nullptr) value -= sae.b_dec[i];
    finite &= is_finite(value);
    packed[packed_position(sae.W_enc.dtype, i)] = value;
  }
  for (int64_t i = columns; i < packed_size(columns); ++i) packed[packed_position(sae.W_enc.dtype, i)] = 0.0f;
  return finite;
}

}  // namespace

EncoderInput encoder_input(const StridedMatrix& hidden, int64_t row, const Sae& sae, float* packed) {
  EncoderInput input;
  const char* from = hidden.row(row);
  Normalizer factors;
  const Normalizer* normalizer_or_null = nullptr;
  if (sae.normalization != Normalization::none) {
    factors = normalizer(from, hidden, sae.normalization, input.scale);
    normalizer_or_null = &factors;
  }
  switch (hidden.dtype) {
    case Dtype::float32:
      input.finite = pack(from, Dtype::float32, hidden.column_stride, sae, normalizer_or_null, packed);
      break;
    case Dtype::bfloat16:
      input.finite = pack(from, Dtype::bfloat16, hidden.column_stride, sae, normalizer_or_null, packed);
      break;
    case Dtype::float16:
      input.finite = pack(from, Dtype::float16, hidden.column_stride, sae, normalizer_or_null, packed);
      break;
  }
  return input;
}

}  // namespace dspa::cpu
