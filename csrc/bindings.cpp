// torch.ops.dspa.* on the CPU. Only LibTorch's stable ABI is used, so one build serves later torch releases as well.
#include "schemas.h"
#include "tensor_views.h"

#include "cpu/adapter_step.h"
#include "cpu/encode_density.h"
#include "cpu/lookup.h"
#include "cpu/row_kernels.h"
#include "cpu/stream_read.h"
#include "cpu/token_step.h"

#ifdef DSPA_STD_THREADS
#include <thread>
#include <vector>
#endif

namespace dspa::binding {

bool is_on_device(const Tensor& tensor) { return tensor.is_cpu(); }
const char* const device = "CPU";

}  // namespace dspa::binding

namespace {

using namespace dspa::binding;
namespace cpu = dspa::cpu;

#ifdef DSPA_STD_THREADS
// So many threads of our own, for ThreadSanitizer, which cannot see how those of OpenMP wait for each other.
cpu::ThreadPool torch_threads() {
  return {DSPA_STD_THREADS, [](int threads, void (*task)(void*), void* context) {
            std::vector<std::thread> started;
            for (int i = 0; i < threads; ++i) started.emplace_back(task, context);
            for (std::thread& thread : started) thread.join();
          }};
}
#else
// torch's thread pool.
cpu::ThreadPool torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int threads, void (*task)(void*), void* context) {
            torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(context);
            });
          }};
}
#endif

cpu::Mode mode_of(const std::string& name) {
  if (name == "dense") return cpu::Mode::dense;
  if (name == "lazy") return cpu::Mode::lazy;
  STD_TORCH_CHECK(name == "screened", "mode ", name, " is not known");
  return cpu::Mode::screened;
}

// The quantized encoder: codes `[d_sae, row_size]` and their factors `[3, d_sae]`.
cpu::QuantizedEncoder quantized_encoder_of(const Tensor& values, const OptionalTensor& factors, const dspa::Matrix& W) {
  STD_TORCH_CHECK(values.dim() == 2 && values.size(0) == W.rows && values.size(1) == cpu::packed_size(W.columns) &&
                      W.columns <= cpu::widest_quantized_model && factors.has_value(),
                  "codes must be [d_sae, d_model rounded up to a multiple of 32] with their factors");
  const float* factor = elements<float>(*factors, 3 * W.rows, "code_factors");
  return {elements<int8_t>(values, W.rows * values.size(1), "codes"), factor, factor + W.rows, factor + 2 * W.rows,
          values.size(1)};
}

void quantize_rows(Tensor W, Tensor values, Tensor factors) {
  const dspa::Matrix rows = matrix(W, "W");
  quantized_encoder_of(values, factors, rows);
  cpu::quantize_rows(rows, static_cast<int8_t*>(values.data_ptr()), values.size(1),
                   static_cast<float*>(factors.data_ptr()), torch_threads());
}

constexpr int64_t work_counters = 7;

void token_step(Tensor hidden, Tensor W_enc, Tensor b_enc, Tensor threshold, OptionalTensor b_dec,
                OptionalTensor decoder_norm, OptionalTensor magnitude_scale, OptionalTensor magnitude_bias,
                Word activation, int64_t k, Word normalization, Tensor W_dec, OptionalTensor decoder_rows,
                Tensor latents, Tensor signs, Tensor counts, double alpha, OptionalTensor alpha_of_row,
                OptionalTensor enabled, OptionalTensor seen, OptionalTensor edited, OptionalTensor nonfinite,
                OptionalTensor maximum, OptionalTensor maximum_sum, OptionalTensor maximum_known,
                OptionalTensor latent_edits, OptionalTensor recent_argmax, OptionalTensor codes,
                OptionalTensor code_factors, OptionalTensor work, Word step_mode) {
  cpu::TokenStep step;
  step.hidden = strided_matrix(hidden, "hidden");
  step.sae = encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias, activation, k,
                     normalization);
  step.sae.W_dec = matrix(W_dec, "W_dec");
  const int64_t batch = step.hidden.rows, d_sae = step.sae.d_sae();
  STD_TORCH_CHECK(step.hidden.columns == step.sae.d_model() && step.sae.W_dec.columns == step.sae.d_model(),
                  "hidden, W_enc and W_dec must have as many columns");
  step.sae.decoder_rows = elements<int32_t>(decoder_rows, d_sae, "decoder_rows");
  step.edits = edits_of(latents, signs, counts, batch);
  step.alpha = static_cast<float>(alpha);
  step.alpha_of_row = elements<float>(alpha_of_row, batch, "alpha");
  step.enabled = elements<bool>(enabled, batch, "enabled");
  step.stats = stats_of(seen, edited, nonfinite, maximum, maximum_sum, maximum_known, latent_edits, batch, d_sae);
  if (recent_argmax.has_value()) {
    const int64_t capacity = recent_argmax->numel();
    step.recent_argmax = {elements<int32_t>(recent_argmax, capacity, "recent_argmax"), capacity};
  }
  if (codes.has_value()) step.codes = quantized_encoder_of(*codes, code_factors, step.sae.W_enc);
  if (int64_t* counters = elements<int64_t>(work, work_counters, "work"))
    step.work = {counters, counters + 1, counters + 2, counters + 3, counters + 4, counters + 5, counters + 6};
  step.mode = mode_of(step_mode);
  cpu::token_step(step, torch_threads());
}

constexpr int64_t adapter_work_counters = 6;

void adapter_step(Tensor hidden, Tensor W_enc, Tensor b_enc, Tensor threshold, OptionalTensor b_dec,
                  OptionalTensor decoder_norm, OptionalTensor magnitude_scale, OptionalTensor magnitude_bias,
                  Word activation, int64_t k, Word normalization, Tensor W_dec,
                  OptionalTensor decoder_rows, Tensor weight, Tensor bias, Tensor adapter_threshold,
                  Word adapter_activation, bool clip, OptionalTensor enabled, OptionalTensor seen,
                  OptionalTensor edited, OptionalTensor nonfinite, OptionalTensor latent_edits, OptionalTensor codes,
                  OptionalTensor code_factors, OptionalTensor work) {
  cpu::AdapterStep step;
  step.hidden = strided_matrix(hidden, "hidden");
  step.sae = encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias, activation, k,
                     normalization);
  step.sae.W_dec = matrix(W_dec, "W_dec");
  const int64_t batch = step.hidden.rows, d_sae = step.sae.d_sae();
  STD_TORCH_CHECK(step.hidden.columns == step.sae.d_model() && step.sae.W_dec.columns == step.sae.d_model(),
                  "hidden, W_enc and W_dec must have as many columns");
  step.sae.decoder_rows = elements<int32_t>(decoder_rows, d_sae, "decoder_rows");
  STD_TORCH_CHECK(decoder_rows.has_value() || step.sae.W_dec.rows == d_sae,
                  "W_dec must have a row for each latent, or decoder_rows");
  step.adapter = adapter_of(weight, bias, adapter_threshold, adapter_activation, clip, step.sae);
  step.enabled = elements<bool>(enabled, batch, "enabled");
  step.stats = adapter_stats_of(seen, edited, nonfinite, latent_edits, batch, d_sae);
  if (codes.has_value()) step.codes = quantized_encoder_of(*codes, code_factors, step.adapter.weight);
  if (int64_t* counters = elements<int64_t>(work, adapter_work_counters, "work"))
    step.work = {counters, counters + 1, counters + 2, counters + 3, counters + 4, counters + 5};
  cpu::adapter_step(step, torch_threads());
}

void encode_density(Tensor hidden, Tensor offsets, Tensor W_enc, Tensor b_enc, Tensor threshold, OptionalTensor b_dec,
                    OptionalTensor decoder_norm, OptionalTensor magnitude_scale, OptionalTensor magnitude_bias,
                    Word activation, int64_t k, Word normalization, Tensor counts) {
  const dspa::Sae sae = encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias,
                               activation, k, normalization);
  const dspa::StridedMatrix rows = strided_matrix(hidden, "hidden");
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
               int64_t d_sae_out, const dspa::LookupOptions& options, const dspa::EditLists& lists) {
  const int64_t batch = density.size(0), nonzeros = values.numel();
  dspa::CsrMap<Value> map;
  map.rows = density.size(1);
  map.columns_count = d_sae_out;
  map.row_offsets = elements<int64_t>(row_offsets, map.rows + 1, "row_offsets");
  map.columns = elements<int32_t>(columns, nonzeros, "columns");
  map.values = elements<Value>(values, nonzeros, "values");
  cpu::lookup(elements<Density>(density, batch * map.rows, "density"), batch, map, options, lists, torch_threads());
}

void lookup(Tensor density, Tensor row_offsets, Tensor columns, Tensor values, int64_t d_sae_out, int64_t k_prompt,
            int64_t k_diff, Word edit, bool sign_guard, Tensor latents, Tensor signs, Tensor counts) {
  STD_TORCH_CHECK(density.dim() == 2, "density must be [B, d_sae_in]");
  const dspa::LookupOptions options{k_prompt, k_diff, edit_kind_of(edit), sign_guard};
  STD_TORCH_CHECK(k_prompt >= 0 && k_prompt <= density.size(1) && k_diff >= 0 && k_diff <= d_sae_out,
                  "k_prompt or k_diff is out of range");
  const int64_t batch = density.size(0);
  const int64_t capacity = options.edit == dspa::EditKind::both ? 2 * k_diff : k_diff;
  const dspa::EditLists lists{elements<int32_t>(latents, batch * capacity, "latents"),
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dspa, library) {
  library.def(DSPA_TOKEN_STEP_SCHEMA);
  library.def(DSPA_ADAPTER_STEP_SCHEMA);
  library.def(DSPA_ENCODE_DENSITY_SCHEMA);
  library.def(DSPA_LOOKUP_SCHEMA);
  library.def("quantize_rows(Tensor W, Tensor(a!) codes, Tensor(b!) code_factors) -> ()");
  library.def("stream_read(Tensor tensor) -> int");
  library.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dspa, CPU, library) {
  library.impl("token_step", TORCH_BOX(&token_step));
  library.impl("adapter_step", TORCH_BOX(&adapter_step));
  library.impl("encode_density", TORCH_BOX(&encode_density));
  library.impl("lookup", TORCH_BOX(&lookup));
  library.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  library.impl("stream_read", TORCH_BOX(&stream_read));
}

STABLE_TORCH_LIBRARY_IMPL(dspa, CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(dspa, Meta, library) {
  library.impl("token_step", TORCH_BOX(&decltype(fake_of(&token_step))::call));
  library.impl("adapter_step", TORCH_BOX(&decltype(fake_of(&adapter_step))::call));
  library.impl("encode_density", TORCH_BOX(&decltype(fake_of(&encode_density))::call));
  library.impl("lookup", TORCH_BOX(&decltype(fake_of(&lookup))::call));
  library.impl("quantize_rows", TORCH_BOX(&decltype(fake_of(&quantize_rows))::call));
}
