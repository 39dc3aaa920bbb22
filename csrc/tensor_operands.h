// What the libraries share: schemas, checks, and tensors turned into the plain operands of the kernels.
// Only LibTorch's stable ABI is used here, and nowhere else any of LibTorch: one build serves later torch releases too.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // torch's own headers
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <optional>
#include <string>
#include <tuple>

#include "cpu/lookup.h"
#include "cpu/operands.h"

// ---- schemas --------------------------------------------------------------------------------------------------------

// What encoding needs of an SAE.
#define DSPA_ENCODER_SCHEMA                                                                                      \
  "Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor? b_dec, Tensor? decoder_norm, Tensor? magnitude_scale, " \
  "Tensor? magnitude_bias, str activation, int k, str normalization"

// An argument called "mode" would collide with one inside torch.compile.
#define DSPA_TOKEN_STEP_SCHEMA                                                                                    \
  "token_step(Tensor(a!) hidden, " DSPA_ENCODER_SCHEMA                                                            \
  ", Tensor W_dec, Tensor? decoder_rows, Tensor latents, Tensor signs, Tensor counts, float alpha, "              \
  "Tensor? alpha_of_row, Tensor? enabled, Tensor(b!)? seen, Tensor(c!)? edited, Tensor(d!)? nonfinite, "          \
  "Tensor(e!)? maximum, Tensor(f!)? maximum_sum, Tensor(g!)? maximum_known, Tensor(h!)? latent_edits, "           \
  "Tensor(i!)? leaders, Tensor? codes, Tensor? code_factors, Tensor(j!)? work, str step_mode) -> ()"

#define DSPA_ENCODE_DENSITY_SCHEMA \
  "encode_density(Tensor hidden, Tensor offsets, " DSPA_ENCODER_SCHEMA ", Tensor(a!) counts) -> ()"

#define DSPA_LOOKUP_SCHEMA                                                                                         \
  "lookup(Tensor density, Tensor row_offsets, Tensor columns, Tensor values, int d_sae_out, int k_prompt, "        \
  "int k_diff, str edit, bool sign_guard, Tensor(a!) latents, Tensor(b!) signs, Tensor(c!) counts) -> ()"

namespace dspa::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Each library says which device its tensors are on.
bool is_here(const Tensor& tensor);
extern const char* const device;

// ---- operands -------------------------------------------------------------------------------------------------------

inline cpu::Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cpu::Dtype::float32;
    case ScalarType::BFloat16: return cpu::Dtype::bfloat16;
    case ScalarType::Half: return cpu::Dtype::float16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

template <class T>
constexpr ScalarType scalar_type_of();
template <> constexpr ScalarType scalar_type_of<float>() { return ScalarType::Float; }
template <> constexpr ScalarType scalar_type_of<double>() { return ScalarType::Double; }
template <> constexpr ScalarType scalar_type_of<bool>() { return ScalarType::Bool; }
template <> constexpr ScalarType scalar_type_of<int8_t>() { return ScalarType::Char; }
template <> constexpr ScalarType scalar_type_of<int32_t>() { return ScalarType::Int; }
template <> constexpr ScalarType scalar_type_of<int64_t>() { return ScalarType::Long; }

// The contiguous elements of a tensor that must have just so many, of this type.
template <class T>
T* elements(const Tensor& tensor, int64_t size, const char* name) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.is_contiguous() && tensor.scalar_type() == scalar_type_of<T>() &&
                      tensor.numel() == size,
                  name, " must be a contiguous tensor of the right dtype on the ", device, " with ", size,
                  " elements; it has ", tensor.numel());
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* elements(const OptionalTensor& tensor, int64_t size, const char* name) {
  return tensor.has_value() ? elements<T>(*tensor, size, name) : nullptr;
}

inline cpu::Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.dim() == 2 && tensor.is_contiguous(), name,
                  " must be a contiguous matrix on the ", device);
  return {static_cast<const char*>(tensor.data_ptr()), dtype_of(tensor, name), tensor.size(0), tensor.size(1)};
}

inline cpu::StridedMatrix strided_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_here(tensor) && tensor.dim() == 2, name, " must be a matrix on the ", device);
  return {static_cast<char*>(tensor.data_ptr()), dtype_of(tensor, name), tensor.size(0), tensor.size(1),
          tensor.stride(0),                      tensor.stride(1)};
}

inline cpu::Activation activation_of(const std::string& name) {
  if (name == "jumprelu" || name == "relu" || name == "batchtopk") return cpu::Activation::threshold;
  if (name == "gated") return cpu::Activation::gated;
  STD_TORCH_CHECK(name == "topk", "activation ", name, " is not known");
  return cpu::Activation::topk;
}

inline cpu::Normalization normalization_of(const std::string& name) {
  if (name == "none") return cpu::Normalization::none;
  if (name == "constant_norm_rescale") return cpu::Normalization::constant_norm_rescale;
  STD_TORCH_CHECK(name == "layer_norm", "normalization ", name, " is not known");
  return cpu::Normalization::layer_norm;
}

inline cpu::EditKind edit_kind_of(const std::string& name) {
  if (name == "ablate") return cpu::EditKind::ablate;
  if (name == "augment") return cpu::EditKind::augment;
  STD_TORCH_CHECK(name == "both", "edit ", name, " is not known");
  return cpu::EditKind::both;
}

inline cpu::Sae encoder(const Tensor& W_enc, const Tensor& b_enc, const Tensor& threshold, const OptionalTensor& b_dec,
                 const OptionalTensor& decoder_norm, const OptionalTensor& magnitude_scale,
                 const OptionalTensor& magnitude_bias, const std::string& activation, int64_t k,
                 const std::string& normalization) {
  cpu::Sae sae;
  sae.W_enc = matrix(W_enc, "W_enc");
  sae.b_enc = elements<float>(b_enc, sae.d_sae(), "b_enc");
  sae.threshold = elements<float>(threshold, sae.d_sae(), "threshold");
  sae.b_dec = elements<float>(b_dec, sae.d_model(), "b_dec");
  sae.decoder_norm = elements<float>(decoder_norm, sae.d_sae(), "decoder_norm");
  sae.magnitude_scale = elements<float>(magnitude_scale, sae.d_sae(), "magnitude_scale");
  sae.magnitude_bias = elements<float>(magnitude_bias, sae.d_sae(), "magnitude_bias");
  sae.activation = activation_of(activation);
  sae.normalization = normalization_of(normalization);
  sae.k = k;
  STD_TORCH_CHECK(sae.activation != cpu::Activation::gated ||
                      (sae.magnitude_scale != nullptr && sae.magnitude_bias != nullptr),
                  "a gated SAE needs magnitude_scale and magnitude_bias");
  STD_TORCH_CHECK(sae.activation != cpu::Activation::topk || k >= 1, "a topk SAE needs k");
  return sae;
}

inline cpu::Edits edits_of(const Tensor& latents, const Tensor& signs, const Tensor& counts, int64_t batch) {
  STD_TORCH_CHECK(latents.dim() == 2, "latents must be [B, k]");
  const int64_t capacity = latents.size(1);
  return {elements<int32_t>(latents, batch * capacity, "latents"), elements<int8_t>(signs, batch * capacity, "signs"),
          elements<int32_t>(counts, batch, "counts"), capacity};
}

// All counters, or none.
inline cpu::Stats stats_of(const OptionalTensor& seen, const OptionalTensor& edited, const OptionalTensor& nonfinite,
                           const OptionalTensor& maximum, const OptionalTensor& maximum_sum,
                           const OptionalTensor& maximum_known, const OptionalTensor& latent_edits, int64_t batch,
                           int64_t d_sae) {
  cpu::Stats stats;
  if (!seen.has_value()) return stats;
  STD_TORCH_CHECK(edited.has_value() && nonfinite.has_value() && maximum.has_value() && maximum_sum.has_value() &&
                      maximum_known.has_value() && latent_edits.has_value(),
                  "all counters or none");
  stats.seen = elements<int64_t>(seen, batch, "seen");
  stats.edited = elements<int64_t>(edited, batch, "edited");
  stats.nonfinite = elements<int64_t>(nonfinite, batch, "nonfinite");
  stats.maximum = elements<double>(maximum, batch, "maximum");
  stats.maximum_sum = elements<double>(maximum_sum, batch, "maximum_sum");
  stats.maximum_known = elements<int64_t>(maximum_known, batch, "maximum_known");
  stats.latent_edits = elements<int64_t>(latent_edits, d_sae, "latent_edits");
  return stats;
}

// ---- fake implementations -------------------------------------------------------------------------------------------

// The operations write into tensors they were given, so their shapes are known and there is nothing to compute.
template <class... Arguments>
struct Nothing {
  static void call(Arguments...) {}
};

template <class... Arguments>
constexpr auto fake_of(void (*)(Arguments...)) {
  return Nothing<Arguments...>{};
}

}  // namespace dspa::binding
