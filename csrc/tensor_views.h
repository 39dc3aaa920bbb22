// Tensors, once checked, as the plain structures of common/ that the kernels read and write.
// Only LibTorch's stable ABI is used, so one build serves later torch releases as well.
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

#include "common/adapter.h"
#include "common/edit_lists.h"
#include "common/sae.h"
#include "word.h"

namespace dspa::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Defined by each library: the device of its tensors.
bool is_on_device(const Tensor& tensor);
extern const char* const device;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
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

// The elements of a contiguous tensor; checks its device, dtype and number of elements.
template <class T>
T* elements(const Tensor& tensor, int64_t size, const char* name) {
  STD_TORCH_CHECK(is_on_device(tensor) && tensor.is_contiguous() && tensor.scalar_type() == scalar_type_of<T>() &&
                      tensor.numel() == size,
                  name, " must be a contiguous tensor of the right dtype on the ", device, " with ", size,
                  " elements; it has ", tensor.numel());
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* elements(const OptionalTensor& tensor, int64_t size, const char* name) {
  return tensor.has_value() ? elements<T>(*tensor, size, name) : nullptr;
}

inline Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_on_device(tensor) && tensor.dim() == 2 && tensor.is_contiguous(), name,
                  " must be a contiguous matrix on the ", device);
  return {static_cast<const char*>(tensor.data_ptr()), dtype_of(tensor, name), tensor.size(0), tensor.size(1)};
}

inline StridedMatrix strided_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_on_device(tensor) && tensor.dim() == 2, name, " must be a matrix on the ", device);
  return {static_cast<char*>(tensor.data_ptr()), dtype_of(tensor, name), tensor.size(0), tensor.size(1),
          tensor.stride(0),                      tensor.stride(1)};
}

inline Activation activation_of(const std::string& name) {
  if (name == "jumprelu" || name == "relu" || name == "batchtopk") return Activation::threshold;
  if (name == "gated") return Activation::gated;
  STD_TORCH_CHECK(name == "topk", "activation ", name, " is not known");
  return Activation::topk;
}

inline Normalization normalization_of(const std::string& name) {
  if (name == "none") return Normalization::none;
  if (name == "constant_norm_rescale") return Normalization::constant_norm_rescale;
  STD_TORCH_CHECK(name == "layer_norm", "normalization ", name, " is not known");
  return Normalization::layer_norm;
}

inline EditKind edit_kind_of(const std::string& name) {
  if (name == "ablate") return EditKind::ablate;
  if (name == "augment") return EditKind::augment;
  STD_TORCH_CHECK(name == "both", "edit ", name, " is not known");
  return EditKind::both;
}

inline Sae encoder(const Tensor& W_enc, const Tensor& b_enc, const Tensor& threshold, const OptionalTensor& b_dec,
                 const OptionalTensor& decoder_norm, const OptionalTensor& magnitude_scale,
                 const OptionalTensor& magnitude_bias, const std::string& activation, int64_t k,
                 const std::string& normalization) {
  Sae sae;
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
  STD_TORCH_CHECK(sae.activation != Activation::gated ||
                      (sae.magnitude_scale != nullptr && sae.magnitude_bias != nullptr),
                  "a gated SAE needs magnitude_scale and magnitude_bias");
  STD_TORCH_CHECK(sae.activation != Activation::topk || k >= 1, "a topk SAE needs k");
  return sae;
}

inline Adapter adapter_of(const Tensor& weight, const Tensor& bias, const Tensor& threshold,
                          const std::string& activation, bool clip, const Sae& sae) {
  Adapter adapter;
  adapter.weight = matrix(weight, "weight");
  STD_TORCH_CHECK(adapter.weight.rows == sae.d_sae() && adapter.weight.columns == sae.d_model(),
                  "the adapter's weight and W_enc must have the same shape");
  adapter.bias = elements<float>(bias, sae.d_sae(), "bias");
  adapter.threshold = elements<float>(threshold, sae.d_sae(), "adapter_threshold");
  const bool one_sided = activation == "relu" || activation == "jump_relu";
  STD_TORCH_CHECK(one_sided || activation == "soft_threshold", "adapter activation ", activation, " is not known");
  adapter.activation = one_sided ? AdapterActivation::one_sided : AdapterActivation::soft_threshold;
  adapter.clip = clip;
  STD_TORCH_CHECK(!clip || sae.activation != Activation::topk, "a topk SAE with the clip is not served");
  return adapter;
}

// All counters, or none.
inline AdapterStats adapter_stats_of(const OptionalTensor& seen, const OptionalTensor& edited,
                                     const OptionalTensor& nonfinite, const OptionalTensor& latent_edits,
                                     int64_t batch, int64_t d_sae) {
  if (!seen.has_value()) return {};
  STD_TORCH_CHECK(edited.has_value() && nonfinite.has_value() && latent_edits.has_value(), "all counters or none");
  return {elements<int64_t>(seen, batch, "seen"), elements<int64_t>(edited, batch, "edited"),
          elements<int64_t>(nonfinite, batch, "nonfinite"), elements<int64_t>(latent_edits, d_sae, "latent_edits")};
}

inline Edits edits_of(const Tensor& latents, const Tensor& signs, const Tensor& counts, int64_t batch) {
  STD_TORCH_CHECK(latents.dim() == 2, "latents must be [B, k]");
  const int64_t capacity = latents.size(1);
  return {elements<int32_t>(latents, batch * capacity, "latents"), elements<int8_t>(signs, batch * capacity, "signs"),
          elements<int32_t>(counts, batch, "counts"), capacity};
}

// All counters, or none.
inline Stats stats_of(const OptionalTensor& seen, const OptionalTensor& edited, const OptionalTensor& nonfinite,
                           const OptionalTensor& maximum, const OptionalTensor& maximum_sum,
                           const OptionalTensor& maximum_known, const OptionalTensor& latent_edits, int64_t batch,
                           int64_t d_sae) {
  Stats stats;
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

// The operations write into their arguments, so there is no output whose shape has to be computed.
template <class... Arguments>
struct NoOutput {
  static void call(Arguments...) {}
};

template <class... Arguments>
constexpr auto fake_of(void (*)(Arguments...)) {
  return NoOutput<Arguments...>{};
}

}  // namespace dspa::binding
