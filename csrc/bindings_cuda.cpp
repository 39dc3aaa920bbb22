// torch.ops.dspa.* on NVIDIA GPUs, on torch's current stream. No CUDA header is needed here.
//
// The tests compile this file with kernels that run on the CPU, as operations of another name.
#include <algorithm>

#include "cuda/operations.h"
#include "schemas.h"
#include "tensor_views.h"

#ifdef DSPA_CUDA_SHIM
#define DSPA_LIBRARY dspa_cuda_shim
#define DSPA_DISPATCH_KEY CPU
#else
#define DSPA_LIBRARY dspa
#define DSPA_DISPATCH_KEY CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace dspa::binding {

#ifdef DSPA_CUDA_SHIM
bool is_on_device(const Tensor& tensor) { return tensor.is_cpu(); }
const char* const device = "CPU";
#else
bool is_on_device(const Tensor& tensor) { return tensor.is_cuda(); }
const char* const device = "GPU";
#endif

}  // namespace dspa::binding

namespace {

using namespace dspa::binding;
namespace cuda = dspa::cuda;

#ifndef DSPA_CUDA_SHIM
// torch's stream on a device. A build of torch for the CPU lacks the function, so it is looked up at the first call:
// the library loads there as well, and `cuda_architectures` can be called.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(
        dlsym(library == nullptr ? RTLD_DEFAULT : library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}
#endif

// Makes the device of a tensor the current one; holds torch's stream on it.
class OnDevice {
 public:
#ifdef DSPA_CUDA_SHIM
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}
#endif
  void* stream() const { return stream_; }

 private:
#ifndef DSPA_CUDA_SHIM
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

void check(int error, const char* operation) {
  STD_TORCH_CHECK(error == 0, operation, " could not be launched: ", cuda::error_text(error));
}

// Stream-ordered scratch memory from torch's allocator.
Tensor workspace(const Tensor& beside, int64_t bytes) {
  return torch::stable::new_empty(beside, {bytes}, ScalarType::Byte);
}

template <class Density, class Value>
cuda::Lookup<Density, Value> lookup_of(const Tensor& density, const Tensor& row_offsets, const Tensor& columns,
                                             const Tensor& values, int64_t d_sae_out, int64_t k_prompt, int64_t k_diff,
                                             const std::string& edit, bool sign_guard, const Tensor& latents,
                                             const Tensor& signs, const Tensor& counts) {
  STD_TORCH_CHECK(density.dim() == 2, "density must be [B, d_sae_in]");
  const int64_t batch = density.size(0), rows = density.size(1);
  STD_TORCH_CHECK(k_prompt >= 0 && k_prompt <= rows && k_diff >= 0 && k_diff <= d_sae_out,
                  "k_prompt or k_diff is out of range");
  cuda::Lookup<Density, Value> lookup;
  lookup.options = {k_prompt, k_diff, edit_kind_of(edit), sign_guard};
  lookup.density = elements<Density>(density, batch * rows, "density");
  lookup.map.rows = rows;
  lookup.map.columns_count = d_sae_out;
  lookup.map.row_offsets = elements<int64_t>(row_offsets, rows + 1, "row_offsets");
  lookup.map.columns = elements<int32_t>(columns, values.numel(), "columns");
  lookup.map.values = elements<Value>(values, values.numel(), "values");
  lookup.lists.capacity = lookup.options.edit == dspa::EditKind::both ? 2 * k_diff : k_diff;
  lookup.lists.latents = elements<int32_t>(latents, batch * lookup.lists.capacity, "latents");
  lookup.lists.signs = elements<int8_t>(signs, batch * lookup.lists.capacity, "signs");
  lookup.lists.counts = elements<int32_t>(counts, batch, "counts");
  return lookup;
}

// The scratch memory of a lookup. It has to outlive the launch, not the kernel.
template <class Density, class Value>
Tensor allocate_workspace(cuda::Lookup<Density, Value>& lookup, const Tensor& density) {
  const int64_t batch = density.size(0), scores = batch * lookup.map.columns_count;
  const int64_t latents = batch * (lookup.options.k_prompt + 4 * lookup.options.k_diff);
  const Tensor memory = workspace(density, scores * static_cast<int64_t>(sizeof(Value)) + 4 * latents);
  lookup.scores = static_cast<Value*>(memory.data_ptr());
  lookup.latents = reinterpret_cast<int32_t*>(lookup.scores + scores);
  return memory;
}

template <class Density, class Value, class... Arguments>
void run_lookup(const Tensor& density, const Arguments&... arguments) {
  auto lookup = lookup_of<Density, Value>(density, arguments...);
  const OnDevice here(density);
  const Tensor memory = allocate_workspace(lookup, density);
  check(cuda::run_lookup(lookup, density.size(0), here.stream()), "lookup");
}

void lookup(Tensor density, Tensor row_offsets, Tensor columns, Tensor values, int64_t d_sae_out, int64_t k_prompt,
            int64_t k_diff, Word edit, bool sign_guard, Tensor latents, Tensor signs, Tensor counts) {
  const bool wide_density = density.scalar_type() == ScalarType::Double;
  const bool wide_values = values.scalar_type() == ScalarType::Double;
  const auto call = [&](auto run) {
    run(density, row_offsets, columns, values, d_sae_out, k_prompt, k_diff, edit, sign_guard, latents, signs, counts);
  };
  if (wide_density && wide_values)
    call([](const auto&... all) { run_lookup<double, double>(all...); });
  else if (wide_density)
    call([](const auto&... all) { run_lookup<double, float>(all...); });
  else if (wide_values)
    call([](const auto&... all) { run_lookup<float, double>(all...); });
  else
    call([](const auto&... all) { run_lookup<float, float>(all...); });
}

bool is_lazy(const std::string& mode) {
  STD_TORCH_CHECK(mode == "dense" || mode == "lazy" || mode == "screened", "mode ", mode, " is not known");
  return mode != "dense";  // there is no quantized encoder on the GPU
}

cuda::TokenStep token_step_of(const Tensor& hidden, const dspa::Sae& encoder, const Tensor& W_dec,
                              const OptionalTensor& decoder_rows, const Tensor& latents, const Tensor& signs,
                              const Tensor& counts, double alpha, const OptionalTensor& alpha_of_row,
                              const OptionalTensor& enabled, const dspa::Stats& stats, const OptionalTensor& work,
                              const std::string& mode) {
  cuda::TokenStep step;
  step.hidden = strided_matrix(hidden, "hidden");
  step.sae = encoder;
  step.sae.W_dec = matrix(W_dec, "W_dec");
  STD_TORCH_CHECK(step.hidden.columns == encoder.d_model() && step.sae.W_dec.columns == encoder.d_model() &&
                      step.sae.W_dec.dtype == encoder.W_enc.dtype,
                  "hidden, W_enc and W_dec must have as many columns, W_enc and W_dec one dtype");
  const int64_t batch = step.hidden.rows;
  step.sae.decoder_rows = elements<int32_t>(decoder_rows, encoder.d_sae(), "decoder_rows");
  step.edits = edits_of(latents, signs, counts, batch);
  step.alpha = static_cast<float>(alpha);
  step.alpha_of_row = elements<float>(alpha_of_row, batch, "alpha");
  step.enabled = elements<bool>(enabled, batch, "enabled");
  step.stats = stats;
  step.lazy = is_lazy(mode);
  STD_TORCH_CHECK(work.has_value(), "work is missing; expected a tensor, zeros at first, the same for all steps");
  const int64_t rows = cuda::scratch_rows(work->numel(), step.edits.capacity);
  STD_TORCH_CHECK(rows >= batch, "work must have room for every row of hidden");
  const int64_t words = cuda::scratch_words(rows, step.edits.capacity);
  step.scratch = cuda::scratch_in(reinterpret_cast<uint32_t*>(elements<int32_t>(*work, words, "work")), rows,
                                  step.edits.capacity);
  return step;
}

void token_step(Tensor hidden, Tensor W_enc, Tensor b_enc, Tensor threshold, OptionalTensor b_dec,
                OptionalTensor decoder_norm, OptionalTensor magnitude_scale, OptionalTensor magnitude_bias,
                Word activation, int64_t k, Word normalization, Tensor W_dec, OptionalTensor decoder_rows,
                Tensor latents, Tensor signs, Tensor counts, double alpha, OptionalTensor alpha_of_row,
                OptionalTensor enabled, OptionalTensor seen, OptionalTensor edited, OptionalTensor nonfinite,
                OptionalTensor maximum, OptionalTensor maximum_sum, OptionalTensor maximum_known,
                OptionalTensor latent_edits, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor work,
                Word step_mode) {
  const dspa::Sae sae = encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias,
                               activation, k, normalization);
  const dspa::Stats stats = stats_of(seen, edited, nonfinite, maximum, maximum_sum, maximum_known, latent_edits,
                                    hidden.size(0), sae.d_sae());
  const OnDevice here(hidden);
  check(cuda::run_token_step(token_step_of(hidden, sae, W_dec, decoder_rows, latents, signs, counts, alpha,
                                           alpha_of_row, enabled, stats, work, step_mode),
                             here.stream()),
        "token_step");
}

void token_step_with_lookup(Tensor hidden, Tensor W_enc, Tensor b_enc, Tensor threshold, OptionalTensor b_dec,
                            OptionalTensor decoder_norm, OptionalTensor magnitude_scale, OptionalTensor magnitude_bias,
                            Word activation, int64_t k, Word normalization, Tensor W_dec,
                            OptionalTensor decoder_rows, Tensor density, Tensor row_offsets, Tensor columns,
                            Tensor values, int64_t k_prompt, int64_t k_diff, Word edit, bool sign_guard,
                            Tensor latents, Tensor signs, Tensor counts, double alpha, OptionalTensor alpha_of_row,
                            OptionalTensor enabled, OptionalTensor seen, OptionalTensor edited,
                            OptionalTensor nonfinite, OptionalTensor maximum, OptionalTensor maximum_sum,
                            OptionalTensor maximum_known, OptionalTensor latent_edits, Tensor work,
                            Word step_mode) {
  const dspa::Sae sae = encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias,
                               activation, k, normalization);
  const dspa::Stats stats = stats_of(seen, edited, nonfinite, maximum, maximum_sum, maximum_known, latent_edits,
                                    hidden.size(0), sae.d_sae());
  const OnDevice here(hidden);
  cuda::TokenStep step = token_step_of(hidden, sae, W_dec, decoder_rows, latents, signs, counts, alpha, alpha_of_row,
                                       enabled, stats, work, step_mode);
  STD_TORCH_CHECK(density.dim() == 2 && density.size(0) == step.hidden.rows, "density must have the rows of hidden");
  step.lookup = lookup_of<float, float>(density, row_offsets, columns, values, sae.d_sae(), k_prompt, k_diff,
                                              edit, sign_guard, latents, signs, counts);
  step.looks_up = true;
  const Tensor memory = allocate_workspace(step.lookup, density);
  check(cuda::run_token_step(step, here.stream()), "token_step");
}

void encode_density(Tensor hidden, Tensor offsets, Tensor W_enc, Tensor b_enc, Tensor threshold, OptionalTensor b_dec,
                    OptionalTensor decoder_norm, OptionalTensor magnitude_scale, OptionalTensor magnitude_bias,
                    Word activation, int64_t k, Word normalization, Tensor counts) {
  cuda::EncodeDensity task;
  task.sae = encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias, activation, k,
                     normalization);
  task.hidden = strided_matrix(hidden, "hidden");
  STD_TORCH_CHECK(task.hidden.columns == task.sae.d_model(), "hidden and W_enc must have as many columns");
  STD_TORCH_CHECK(k <= task.sae.d_sae(), "a topk SAE cannot keep more latents than there are");
  task.segments = offsets.numel() - 1;
  STD_TORCH_CHECK(task.segments >= 0, "offsets must have at least one element");
  task.offsets = elements<int64_t>(offsets, task.segments + 1, "offsets");
  task.counts = elements<int32_t>(counts, task.segments * task.sae.d_sae(), "counts");
  const OnDevice here(hidden);
  const cuda::DensityPlan plan = cuda::plan_density(task.hidden, task.sae);
  const Tensor memory = workspace(hidden, plan.bytes);
  check(cuda::run_encode_density(task, plan, static_cast<char*>(memory.data_ptr()), here.stream()), "encode_density");
}

constexpr int64_t most_adapter_entries = int64_t{16} << 20;  // of all lists at a time: 256 MiB

void adapter_step(Tensor hidden, Tensor W_enc, Tensor b_enc, Tensor threshold, OptionalTensor b_dec,
                  OptionalTensor decoder_norm, OptionalTensor magnitude_scale, OptionalTensor magnitude_bias,
                  Word activation, int64_t k, Word normalization, Tensor W_dec,
                  OptionalTensor decoder_rows, Tensor weight, Tensor bias, Tensor adapter_threshold,
                  Word adapter_activation, bool clip, OptionalTensor enabled, OptionalTensor seen,
                  OptionalTensor edited, OptionalTensor nonfinite, OptionalTensor latent_edits, OptionalTensor,
                  OptionalTensor, OptionalTensor) {
  cuda::AdapterStep step;
  step.hidden = strided_matrix(hidden, "hidden");
  step.sae = encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias, activation, k,
                     normalization);
  step.sae.W_dec = matrix(W_dec, "W_dec");
  const int64_t batch = step.hidden.rows, d_sae = step.sae.d_sae();
  STD_TORCH_CHECK(step.hidden.columns == step.sae.d_model() && step.sae.W_dec.columns == step.sae.d_model(),
                  "hidden, W_enc and W_dec must have as many columns");
  STD_TORCH_CHECK(step.sae.W_dec.dtype == step.sae.W_enc.dtype, "W_dec must have the dtype of W_enc");
  step.sae.decoder_rows = elements<int32_t>(decoder_rows, d_sae, "decoder_rows");
  step.adapter = adapter_of(weight, bias, adapter_threshold, adapter_activation, clip, step.sae);
  const bool* on = elements<bool>(enabled, batch, "enabled");
  const dspa::AdapterStats stats = adapter_stats_of(seen, edited, nonfinite, latent_edits, batch, d_sae);
  const OnDevice here(hidden);
  const int64_t at_once = std::max<int64_t>(most_adapter_entries / d_sae, 1);
  for (int64_t first = 0; first < batch; first += at_once) {
    const int64_t rows = std::min(at_once, batch - first);
    cuda::AdapterStep part = step;
    part.hidden.data = step.hidden.row(first);
    part.hidden.rows = rows;
    if (on != nullptr) part.enabled = on + first;
    if (stats.seen != nullptr)
      part.stats = {stats.seen + first, stats.edited + first, stats.nonfinite + first, stats.latent_edits};
    const Tensor memory = workspace(hidden, 4 * cuda::adapter_words(rows, d_sae));
    part.lists = cuda::adapter_lists_in(static_cast<uint32_t*>(memory.data_ptr()), rows, d_sae);
    check(cuda::run_adapter_step(part, here.stream()), "adapter_step");
  }
}

void set_cuda_tuning(int64_t threads, int64_t cluster, int64_t density_bytes, bool warpgroup_products,
                     bool bulk_copies, bool early_launch) {
  STD_TORCH_CHECK(threads >= 32 && threads <= 256 && threads % 32 == 0, "threads must be a multiple of 32 up to 256");
  STD_TORCH_CHECK(cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8, "cluster must be 1, 2, 4 or 8");
  cuda::tuning().threads = static_cast<int>(threads);
  cuda::tuning().cluster = static_cast<int>(cluster);
  cuda::tuning().density_bytes = density_bytes;
  cuda::tuning().warpgroup_products = warpgroup_products;
  cuda::tuning().bulk_copies = bulk_copies;
  cuda::tuning().early_launch = early_launch;
}

bool has_warpgroup_products() { return cuda::has_warpgroup_products(); }
bool has_bulk_copies() { return cuda::has_bulk_copies(); }

#ifndef DSPA_CUDA_ARCHS
#define DSPA_CUDA_ARCHS "the CPU"
#endif
std::string cuda_architectures() { return DSPA_CUDA_ARCHS; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(DSPA_LIBRARY, library) {
#ifdef DSPA_CUDA_SHIM  // the library for the CPU defines these
  library.def(DSPA_ADAPTER_STEP_SCHEMA);
  library.def(DSPA_TOKEN_STEP_SCHEMA);
  library.def(DSPA_ENCODE_DENSITY_SCHEMA);
  library.def(DSPA_LOOKUP_SCHEMA);
#endif
  library.def("token_step_with_lookup(Tensor(a!) hidden, " DSPA_ENCODER_SCHEMA
              ", Tensor W_dec, Tensor? decoder_rows, Tensor density, Tensor row_offsets, Tensor columns, "
              "Tensor values, int k_prompt, int k_diff, str edit, bool sign_guard, Tensor(b!) latents, "
              "Tensor(c!) signs, Tensor(d!) counts, float alpha, Tensor? alpha_of_row, Tensor? enabled, "
              "Tensor(e!)? seen, Tensor(f!)? edited, Tensor(g!)? nonfinite, Tensor(h!)? maximum, "
              "Tensor(i!)? maximum_sum, Tensor(j!)? maximum_known, Tensor(k!)? latent_edits, Tensor(l!) work, "
              "str step_mode) -> ()");
  library.def(
      "set_cuda_tuning(int threads, int cluster, int density_bytes, bool warpgroup_products=True, "
      "bool bulk_copies=False, bool early_launch=False) -> ()");
  library.def("has_warpgroup_products() -> bool");
  library.def("has_bulk_copies() -> bool");
  library.def("cuda_architectures() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(DSPA_LIBRARY, DSPA_DISPATCH_KEY, library) {
  library.impl("adapter_step", TORCH_BOX(&adapter_step));
  library.impl("token_step", TORCH_BOX(&token_step));
  library.impl("token_step_with_lookup", TORCH_BOX(&token_step_with_lookup));
  library.impl("encode_density", TORCH_BOX(&encode_density));
  library.impl("lookup", TORCH_BOX(&lookup));
}

STABLE_TORCH_LIBRARY_IMPL(DSPA_LIBRARY, CompositeExplicitAutograd, library) {
  library.impl("set_cuda_tuning", TORCH_BOX(&set_cuda_tuning));
  library.impl("has_warpgroup_products", TORCH_BOX(&has_warpgroup_products));
  library.impl("has_bulk_copies", TORCH_BOX(&has_bulk_copies));
  library.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}

STABLE_TORCH_LIBRARY_IMPL(DSPA_LIBRARY, Meta, library) {
#ifdef DSPA_CUDA_SHIM
  library.impl("adapter_step", TORCH_BOX(&decltype(fake_of(&adapter_step))::call));
  library.impl("token_step", TORCH_BOX(&decltype(fake_of(&token_step))::call));
  library.impl("encode_density", TORCH_BOX(&decltype(fake_of(&encode_density))::call));
  library.impl("lookup", TORCH_BOX(&decltype(fake_of(&lookup))::call));
#endif
  library.impl("token_step_with_lookup", TORCH_BOX(&decltype(fake_of(&token_step_with_lookup))::call));
}
