// torch.ops.dspa.*: schemas, checks, and tensors turned into the plain operands of the kernels.
// Only LibTorch's stable ABI is used here, and nowhere else any of LibTorch: one build serves later torch releases too.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // torch's own headers
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <optional>
#include <string>
#include <tuple>

#include "cpu/encode_density.h"
#include "cpu/lookup.h"
#include "cpu/row_kernels.h"
#include "cpu/stream_read.h"
#include "cpu/token_step.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
namespace cpu = dspa::cpu;

// The threads that torch is set to use.
cpu::ThreadPool torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int threads, void (*task)(void*), void* context) {
            torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(context);
            });
          }};
}

cpu::Dtype dtype_of(const Tensor& tensor, const char* name) {
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
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == scalar_type_of<T>() &&
                      tensor.numel() == size,
                  name, " must be a contiguous CPU tensor of the right dtype with ", size, " elements; it has ",
                  tensor.numel());
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* elements(const OptionalTensor& tensor, int64_t size, const char* name) {
  return tensor.has_value() ? elements<T>(*tensor, size, name) : nullptr;
}

cpu::Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.is_contiguous(), name,
                  " must be a contiguous CPU matrix");
  return {static_cast<const char*>(tensor.data_ptr()), dtype_of(tensor, name), tensor.size(0), tensor.size(1)};
}

cpu::StridedMatrix strided_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2, name, " must be a CPU matrix");
  return {static_cast<char*>(tensor.data_ptr()), dtype_of(tensor, name), tensor.size(0), tensor.size(1),
          tensor.stride(0),                      tensor.stride(1)};
}

cpu::Activation activation_of(const std::string& name) {
  if (name == "jumprelu" || name == "relu" || name == "batchtopk") return cpu::Activation::threshold;
  if (name == "gated") return cpu::Activation::gated;
  STD_TORCH_CHECK(name == "topk", "activation ", name, " is not known");
  return cpu::Activation::topk;
}

cpu::Normalization normalization_of(const std::string& name) {
  if (name == "none") return cpu::Normalization::none;
  if (name == "constant_norm_rescale") return cpu::Normalization::constant_norm_rescale;
  STD_TORCH_CHECK(name == "layer_norm", "normalization ", name, " is not known");
  return cpu::Normalization::layer_norm;
}

cpu::Mode mode_of(const std::string& name) {
  if (name == "dense") return cpu::Mode::dense;
  if (name == "lazy") return cpu::Mode::lazy;
  STD_TORCH_CHECK(name == "screened", "mode ", name, " is not known");
  return cpu::Mode::screened;
}

cpu::EditKind edit_kind_of(const std::string& name) {
  if (name == "ablate") return cpu::EditKind::ablate;
  if (name == "augment") return cpu::EditKind::augment;
  STD_TORCH_CHECK(name == "both", "edit ", name, " is not known");
  return cpu::EditKind::both;
}

// What encoding needs of an SAE.
#define DSPA_ENCODER_SCHEMA                                                                                      \
  "Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor? b_dec, Tensor? decoder_norm, Tensor? magnitude_scale, " \
  "Tensor? magnitude_bias, str activation, int k, str normalization"

cpu::Sae encoder(const Tensor& W_enc, const Tensor& b_enc, const Tensor& threshold, const OptionalTensor& b_dec,
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

// Row-wise codes `[d_sae, row_size]` and their factors `[3, d_sae]`.
cpu::Codes codes_of(const Tensor& values, const OptionalTensor& factors, const cpu::Matrix& W) {
  STD_TORCH_CHECK(values.dim() == 2 && values.size(0) == W.rows && values.size(1) == cpu::packed_size(W.columns) &&
                      W.columns <= cpu::widest_coded_model && factors.has_value(),
                  "codes must be [d_sae, d_model rounded up to a multiple of 32] with their factors");
  const float* factor = elements<float>(*factors, 3 * W.rows, "code_factors");
  return {elements<int8_t>(values, W.rows * values.size(1), "codes"), factor, factor + W.rows, factor + 2 * W.rows,
          values.size(1)};
}

void encode_rows(Tensor W, Tensor values, Tensor factors) {
  const cpu::Matrix rows = matrix(W, "W");
  codes_of(values, factors, rows);
  cpu::encode_rows(rows, static_cast<int8_t*>(values.data_ptr()), values.size(1),
                   static_cast<float*>(factors.data_ptr()), torch_threads());
}

constexpr int64_t work_counters = 7;

void token_step(Tensor hidden, Tensor W_enc, Tensor b_enc, Tensor threshold, OptionalTensor b_dec,
                OptionalTensor decoder_norm, OptionalTensor magnitude_scale, OptionalTensor magnitude_bias,
                std::string activation, int64_t k, std::string normalization, Tensor W_dec, OptionalTensor decoder_rows,
                Tensor latents, Tensor signs, Tensor counts, double alpha, OptionalTensor alpha_of_row,
                OptionalTensor enabled, OptionalTensor seen, OptionalTensor edited, OptionalTensor nonfinite,
                OptionalTensor maximum, OptionalTensor maximum_sum, OptionalTensor maximum_known,
                OptionalTensor latent_edits, OptionalTensor leaders, OptionalTensor codes, OptionalTensor code_factors,
                OptionalTensor work, std::string step_mode) {
  cpu::TokenStep step;
  step.hidden = strided_matrix(hidden, "hidden");
  step.sae = encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias, activation, k,
                     normalization);
  step.sae.W_dec = matrix(W_dec, "W_dec");
  const int64_t batch = step.hidden.rows, d_sae = step.sae.d_sae();
  STD_TORCH_CHECK(step.hidden.columns == step.sae.d_model() && step.sae.W_dec.columns == step.sae.d_model(),
                  "hidden, W_enc and W_dec must have as many columns");
  step.sae.decoder_rows = elements<int32_t>(decoder_rows, d_sae, "decoder_rows");
  STD_TORCH_CHECK(latents.dim() == 2, "latents must be [B, k]");
  step.edits.capacity = latents.size(1);
  step.edits.latents = elements<int32_t>(latents, batch * step.edits.capacity, "latents");
  step.edits.signs = elements<int8_t>(signs, batch * step.edits.capacity, "signs");
  step.edits.counts = elements<int32_t>(counts, batch, "counts");
  step.alpha = static_cast<float>(alpha);
  step.alpha_of_row = elements<float>(alpha_of_row, batch, "alpha");
  step.enabled = elements<bool>(enabled, batch, "enabled");
  if (seen.has_value()) {
    STD_TORCH_CHECK(edited.has_value() && nonfinite.has_value() && maximum.has_value() && maximum_sum.has_value() &&
                        maximum_known.has_value() && latent_edits.has_value(),
                    "all counters or none");
    step.stats.seen = elements<int64_t>(seen, batch, "seen");
    step.stats.edited = elements<int64_t>(edited, batch, "edited");
    step.stats.nonfinite = elements<int64_t>(nonfinite, batch, "nonfinite");
    step.stats.maximum = elements<double>(maximum, batch, "maximum");
    step.stats.maximum_sum = elements<double>(maximum_sum, batch, "maximum_sum");
    step.stats.maximum_known = elements<int64_t>(maximum_known, batch, "maximum_known");
    step.stats.latent_edits = elements<int64_t>(latent_edits, d_sae, "latent_edits");
  }
  if (leaders.has_value()) step.leaders = {elements<int32_t>(leaders, leaders->numel(), "leaders"), leaders->numel()};
  if (codes.has_value()) step.codes = codes_of(*codes, code_factors, step.sae.W_enc);
  if (int64_t* counters = elements<int64_t>(work, work_counters, "work"))
    step.work = {counters, counters + 1, counters + 2, counters + 3, counters + 4, counters + 5, counters + 6};
  step.mode = mode_of(step_mode);
  cpu::token_step(step, torch_threads());
}

void encode_density(Tensor hidden, Tensor offsets, Tensor W_enc, Tensor b_enc, Tensor threshold, OptionalTensor b_dec,
                    OptionalTensor decoder_norm, OptionalTensor magnitude_scale, OptionalTensor magnitude_bias,
                    std::string activation, int64_t k, std::string normalization, Tensor counts) {
  const cpu::Sae sae = encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias,
                               activation, k, normalization);
  const cpu::StridedMatrix rows = strided_matrix(hidden, "hidden");
  STD_TORCH_CHECK(rows.columns == sae.d_model(), "hidden and W_enc must have as many columns");
  const int64_t segments = offsets.numel() - 1;
  const int64_t* bounds = elements<int64_t>(offsets, segments + 1, "offsets");
  STD_TORCH_CHECK(segments >= 0, "offsets must have at least one element");
  for (int64_t s = 0; s <= segments; ++s)
    STD_TORCH_CHECK(bounds[s] >= (s == 0 ? 0 : bounds[s - 1]) && bounds[s] <= rows.rows,
                    "offsets must rise from 0 or more to at most ", rows.rows, "; offset ", s, " is ", bounds[s]);
  cpu::encode_density(rows, bounds, segments, sae, elements<int32_t>(counts, segments * sae.d_sae(), "counts"),
                      torch_threads());
}

template <class Density, class Value>
void lookup_of(const Tensor& density, const Tensor& row_offsets, const Tensor& columns, const Tensor& values,
               int64_t d_sae_out, const cpu::LookupOptions& options, const cpu::EditLists& lists) {
  const int64_t batch = density.size(0), nonzeros = values.numel();
  cpu::CsrMap<Value> map;
  map.rows = density.size(1);
  map.columns_count = d_sae_out;
  map.row_offsets = elements<int64_t>(row_offsets, map.rows + 1, "row_offsets");
  map.columns = elements<int32_t>(columns, nonzeros, "columns");
  map.values = elements<Value>(values, nonzeros, "values");
  cpu::lookup(elements<Density>(density, batch * map.rows, "density"), batch, map, options, lists, torch_threads());
}

void lookup(Tensor density, Tensor row_offsets, Tensor columns, Tensor values, int64_t d_sae_out, int64_t k_prompt,
            int64_t k_diff, std::string edit, bool sign_guard, Tensor latents, Tensor signs, Tensor counts) {
  STD_TORCH_CHECK(density.dim() == 2, "density must be [B, d_sae_in]");
  const cpu::LookupOptions options{k_prompt, k_diff, edit_kind_of(edit), sign_guard};
  STD_TORCH_CHECK(k_prompt >= 0 && k_prompt <= density.size(1) && k_diff >= 0 && k_diff <= d_sae_out,
                  "k_prompt or k_diff is out of range");
  const int64_t batch = density.size(0);
  const int64_t capacity = options.edit == cpu::EditKind::both ? 2 * k_diff : k_diff;
  const cpu::EditLists lists{elements<int32_t>(latents, batch * capacity, "latents"),
                             elements<int8_t>(signs, batch * capacity, "signs"),
                             elements<int32_t>(counts, batch, "counts"), capacity};
  const bool wide_density = density.scalar_type() == ScalarType::Double;
  const bool wide_values = values.scalar_type() == ScalarType::Double;
  const auto call = wide_density ? (wide_values ? lookup_of<double, double> : lookup_of<double, float>)
                                 : (wide_values ? lookup_of<float, double> : lookup_of<float, float>);
  call(density, row_offsets, columns, values, d_sae_out, options, lists);
}

int64_t stream_read(Tensor tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), "the tensor must be contiguous, on the CPU");
  return static_cast<int64_t>(cpu::stream_read(static_cast<const char*>(tensor.data_ptr()),
                                               tensor.numel() * static_cast<int64_t>(tensor.element_size()),
                                               torch_threads()));
}

std::string cpu_capability() { return cpu::row_kernels().name; }

// The operations write into tensors they were given, so their shapes are known and there is nothing to compute.
template <class... Arguments>
struct Nothing {
  static void call(Arguments...) {}
};

template <class... Arguments>
constexpr auto fake_of(void (*)(Arguments...)) {
  return Nothing<Arguments...>{};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dspa, library) {
  // An argument called "mode" would collide with one inside torch.compile.
  library.def("token_step(Tensor(a!) hidden, " DSPA_ENCODER_SCHEMA
              ", Tensor W_dec, Tensor? decoder_rows, Tensor latents, Tensor signs, Tensor counts, float alpha, "
              "Tensor? alpha_of_row, Tensor? enabled, Tensor(b!)? seen, Tensor(c!)? edited, Tensor(d!)? nonfinite, "
              "Tensor(e!)? maximum, Tensor(f!)? maximum_sum, Tensor(g!)? maximum_known, Tensor(h!)? latent_edits, "
              "Tensor(i!)? leaders, Tensor? codes, Tensor? code_factors, Tensor(j!)? work, str step_mode) -> ()");
  library.def("encode_density(Tensor hidden, Tensor offsets, " DSPA_ENCODER_SCHEMA ", Tensor(a!) counts) -> ()");
  library.def("lookup(Tensor density, Tensor row_offsets, Tensor columns, Tensor values, int d_sae_out, int k_prompt, "
              "int k_diff, str edit, bool sign_guard, Tensor(a!) latents, Tensor(b!) signs, Tensor(c!) counts) -> ()");
  library.def("encode_rows(Tensor W, Tensor(a!) codes, Tensor(b!) code_factors) -> ()");
  library.def("stream_read(Tensor tensor) -> int");
  library.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dspa, CPU, library) {
  library.impl("token_step", TORCH_BOX(&token_step));
  library.impl("encode_density", TORCH_BOX(&encode_density));
  library.impl("lookup", TORCH_BOX(&lookup));
  library.impl("encode_rows", TORCH_BOX(&encode_rows));
  library.impl("stream_read", TORCH_BOX(&stream_read));
}

STABLE_TORCH_LIBRARY_IMPL(dspa, CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(dspa, Meta, library) {
  library.impl("token_step", TORCH_BOX(&decltype(fake_of(&token_step))::call));
  library.impl("encode_density", TORCH_BOX(&decltype(fake_of(&encode_density))::call));
  library.impl("lookup", TORCH_BOX(&decltype(fake_of(&lookup))::call));
  library.impl("encode_rows", TORCH_BOX(&decltype(fake_of(&encode_rows))::call));
}
