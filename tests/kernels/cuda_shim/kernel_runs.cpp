// The kernels on threads of the operating system, several blocks at a time, for ThreadSanitizer and AddressSanitizer to
// watch. What they compute is checked elsewhere; here the same must come out of every mode, cluster size and number of
// blocks that run at a time, and the scratch must be zero afterwards. Ends with 0 if it does.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels_on_cpu.cpp"

namespace {

namespace cuda = dspa::cuda;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

// An SAE with rows and lists for it, in bfloat16.
struct Case {
  int64_t batch, d_model, d_sae = 20, capacity = 4, d_in = 40;
  std::vector<uint16_t> W_enc, W_dec, hidden;
  std::vector<float> bias, threshold, density, values;
  std::vector<int32_t> latents, counts, columns;
  std::vector<int8_t> signs;
  std::vector<int64_t> row_offsets, segments;
  std::vector<int64_t> counters, latent_edits;
  std::vector<double> maxima;
  std::unique_ptr<bool[]> enabled;
  dspa::Activation activation;

  Case(int64_t rows, int64_t width, dspa::Activation kind, uint32_t seed)
      : batch(rows), d_model(width), activation(kind) {
    enabled.reset(new bool[static_cast<size_t>(batch)]);
    segments = {0, 2, 2, batch};
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto halves = [&](int64_t count, float size) {
      std::vector<uint16_t> made(static_cast<size_t>(count));
      for (uint16_t& number : made) number = dspa::bfloat16_of_float(size * normal(random));
      return made;
    };
    const auto floats = [&](int64_t count) {
      std::vector<float> made(static_cast<size_t>(count));
      for (float& number : made) number = 0.2f * normal(random);
      return made;
    };
    W_enc = halves(d_sae * d_model, 0.2f);
    W_dec = halves(d_sae * d_model, 0.2f);
    hidden = halves(batch * d_model, 2.0f);
    bias = floats(d_sae);
    threshold = floats(d_sae);
    density = floats(batch * d_in);
    for (int64_t row = 0; row <= d_in; ++row) row_offsets.push_back(4 * row);
    values = floats(4 * d_in);
    for (int64_t i = 0; i < 4 * d_in; ++i) columns.push_back(static_cast<int32_t>(i % 4 * 5 + i / 4 % 5));
    for (int64_t row = 0; row < batch; ++row) {
      for (int64_t i = 0; i < capacity; ++i) {
        latents.push_back(static_cast<int32_t>((row * 7 + i * 11) % d_sae));
        signs.push_back(row % 3 == 0 && i == 0 ? 1 : -1);
      }
      counts.push_back(static_cast<int32_t>((row + 2) % (capacity + 1)));
      enabled[static_cast<size_t>(row)] = row != 4;
    }
  }

  dspa::Sae sae() const {
    dspa::Sae made;
    made.W_enc = {reinterpret_cast<const char*>(W_enc.data()), dspa::Dtype::bfloat16, d_sae, d_model};
    made.W_dec = {reinterpret_cast<const char*>(W_dec.data()), dspa::Dtype::bfloat16, d_sae, d_model};
    made.b_enc = bias.data();
    made.threshold = threshold.data();
    made.activation = activation;
    made.k = 5;
    made.normalization = dspa::Normalization::layer_norm;
    return made;
  }

  dspa::StridedMatrix rows(std::vector<uint16_t>& of) const {
    return {reinterpret_cast<char*>(of.data()), dspa::Dtype::bfloat16, batch, d_model, d_model, 1};
  }

  // The rows after a step, or two.
  std::vector<uint16_t> step(bool lazy, bool looks_up, int cluster, int at_a_time) {
    cuda::tuning().threads = 64;
    cuda::tuning().cluster = cluster;
    cuda_shim::machine().clusters_at_a_time = at_a_time;
    std::vector<uint16_t> written = hidden;
    std::vector<uint32_t> words(static_cast<size_t>(cuda::scratch_words(batch, capacity)));
    counters.assign(static_cast<size_t>(4 * batch), 0);
    maxima.assign(static_cast<size_t>(2 * batch), 0.0);
    latent_edits.assign(static_cast<size_t>(d_sae), 0);
    std::vector<float> scores(static_cast<size_t>(batch * d_sae));
    std::vector<int32_t> places(static_cast<size_t>(batch * 64));
    cuda::TokenStep step;
    step.hidden = rows(written);
    step.sae = sae();
    step.edits = {latents.data(), signs.data(), counts.data(), capacity};
    step.alpha = 0.4f;
    step.enabled = enabled.get();
    step.stats = {counters.data(), counters.data() + batch,   counters.data() + 2 * batch, maxima.data(),
                  maxima.data() + batch, counters.data() + 3 * batch, latent_edits.data()};
    step.lazy = lazy;
    if (looks_up) {
      step.looks_up = true;
      step.lookup.density = density.data();
      step.lookup.map = {row_offsets.data(), columns.data(), values.data(), d_in, d_sae};
      step.lookup.options = {5, 2, dspa::EditKind::both, false};
      step.lookup.lists = {latents.data(), signs.data(), counts.data(), capacity};
      step.lookup.scores = scores.data();
      step.lookup.latents = places.data();
    }
    step.scratch = cuda::scratch_in(words.data(), batch, capacity);
    for (int turn = 0; turn < 2; ++turn) expect(cuda::run_token_step(step, nullptr) == 0, "launch");
    const size_t scores_begin = words.size() - static_cast<size_t>(batch * capacity);
    for (size_t i = 0; i < scores_begin; ++i) expect(words[i] == 0, "scratch is zero again");
    return written;
  }

  // The rows after the step of an adapter whose weight is the encoder's.
  std::vector<uint16_t> adapted(int at_a_time) {
    cuda_shim::machine().clusters_at_a_time = at_a_time;
    std::vector<uint16_t> written = hidden;
    std::vector<uint32_t> words(static_cast<size_t>(cuda::adapter_words(batch, d_sae)));
    counters.assign(static_cast<size_t>(3 * batch), 0);
    latent_edits.assign(static_cast<size_t>(d_sae), 0);
    cuda::AdapterStep step;
    step.hidden = rows(written);
    step.sae = sae();
    step.adapter.weight = step.sae.W_enc;
    step.adapter.bias = bias.data();
    step.adapter.threshold = threshold.data();
    step.enabled = enabled.get();
    step.stats = {counters.data(), counters.data() + batch, counters.data() + 2 * batch, latent_edits.data()};
    step.lists = cuda::adapter_lists_in(words.data(), batch, d_sae);
    expect(cuda::run_adapter_step(step, nullptr) == 0, "launch");
    return written;
  }

  std::vector<int32_t> counted(int at_a_time) {
    cuda_shim::machine().clusters_at_a_time = at_a_time;
    std::vector<int32_t> found(static_cast<size_t>(3 * d_sae));
    cuda::EncodeDensity task;
    task.hidden = rows(hidden);
    task.sae = sae();
    task.offsets = segments.data();
    task.segments = 3;
    task.counts = found.data();
    const cuda::DensityPlan plan = cuda::plan_density(task.hidden, task.sae);
    std::unique_ptr<uint4[]> memory(new uint4[static_cast<size_t>(plan.bytes / 16 + 1)]);
    expect(cuda::run_encode_density(task, plan, reinterpret_cast<char*>(memory.get()), nullptr) == 0, "launch");
    return found;
  }
};

}  // namespace

// The arguments: threshold or topk, rows of the batch, d_model, and what to do: step, adapt, count, either as only sm_90 and
// sm_90a can ("step in bulk", "count by warpgroups"), or the step on a machine whose atomics order nothing, which
// ThreadSanitizer has to find.
int main(int, char** arguments) {
  cuda_shim::machine().real_threads = true;
  const std::string what = arguments[4];
  cuda_shim::machine().order_is_missing = what == "unordered";
  cuda::tuning().bulk_copies = what == "step in bulk";
  cuda::tuning().warpgroup_products = what == "count by warpgroups";
  const bool topk = std::string(arguments[1]) == "topk";
  const dspa::Activation activation = topk ? dspa::Activation::topk : dspa::Activation::threshold;
  Case given(std::stoi(arguments[2]), std::stoi(arguments[3]), activation, 7);
  if (what == "adapt") {
    const std::vector<uint16_t> adapted = given.adapted(1);
    expect(adapted != given.hidden, "something is changed");
    expect(given.adapted(3) == adapted, "blocks side by side");
    return failures == 0 ? 0 : 1;
  }
  if (what == "count" || what == "count by warpgroups") {
    given.counted(2);
    return failures == 0 ? 0 : 1;
  }
  const std::vector<uint16_t> expected = given.step(false, false, 1, 1);
  expect(expected != given.hidden, "something is edited");
  expect(given.step(false, false, 2, 2) == expected, "dense, clusters of two");
  expect(given.step(true, false, 1, 3) == expected, "lazy");
  expect(given.step(true, false, 2, 1) == expected, "lazy, clusters of two");
  const std::vector<uint16_t> looked_up = given.step(false, true, 1, 2);
  expect(given.step(true, true, 2, 2) == looked_up, "looked up");
  return failures == 0 ? 0 : 1;
}
