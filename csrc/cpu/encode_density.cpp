#include "encode_density.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "aligned_buffer.h"
#include "amx_density.h"
#include "encoder_input.h"
#include "row_kernels.h"

namespace dspa::cpu {
namespace {

constexpr int64_t tokens_per_batch = 256;  // encoded with one pass over W_enc
constexpr int64_t tokens_per_tile = 16;
constexpr int64_t rows_per_block = 64;
constexpr int64_t topk_buffer_scores = 4 << 20;  // z of a few whole tokens

// Some tokens, ready to be multiplied, and the segments they count for.
struct Batch {
  std::vector<const float*> inputs;
  std::vector<int64_t> segments;

  int64_t size() const { return static_cast<int64_t>(inputs.size()); }
};

// A gate depends on one latent only: a block of rows is multiplied, compared and counted before the next.
void count_gates(const Batch& batch, const Sae& sae, int32_t* counts, const ThreadPool& pool) {
  const RowKernels& kernels = row_kernels();
  const int64_t d_sae = sae.d_sae();
  pool.for_each((d_sae + rows_per_block - 1) / rows_per_block, [&](int64_t block) {
    const int64_t first = block * rows_per_block;
    const int64_t rows = std::min(rows_per_block, d_sae - first);
    alignas(64) float products[tokens_per_tile * rows_per_block];
    for (int64_t token = 0; token < batch.size(); token += tokens_per_tile) {
      const int64_t tokens = std::min(tokens_per_tile, batch.size() - token);
      kernels.products(sae.W_enc, first, rows, nullptr, batch.inputs.data() + token, tokens, products, rows_per_block);
      for (int64_t t = 0; t < tokens; ++t) {
        float* scores = products + t * rows_per_block;
        kernels.scores(sae, first, rows, scores);
        kernels.count_positive(scores, rows, counts + batch.segments[static_cast<size_t>(token + t)] * d_sae + first);
      }
    }
  });
}

// The positive ones of the k largest z, ties to the lower index.
void count_largest(const float* z, int64_t size, int64_t k, int32_t* counts) {
  std::vector<float> positive;
  for (int64_t i = 0; i < size; ++i)
    if (z[i] > 0.0f) positive.push_back(z[i]);
  float bound = 0.0f;
  int64_t ties = 0;
  if (static_cast<int64_t>(positive.size()) > k) {
    std::nth_element(positive.begin(), positive.begin() + (k - 1), positive.end(), std::greater<float>());
    bound = positive[static_cast<size_t>(k - 1)];
    ties = k - std::count_if(positive.begin(), positive.end(), [&](float value) { return value > bound; });
  }
  for (int64_t i = 0; i < size; ++i) {
    if (z[i] > bound)
      ++counts[i];
    else if (ties > 0 && z[i] == bound) {
      ++counts[i];
      --ties;
    }
  }
}

// topk compares a token's latents with one another, so all z of a few tokens are held at a time.
void count_topk(const Batch& batch, const Sae& sae, int32_t* counts, const ThreadPool& pool) {
  const RowKernels& kernels = row_kernels();
  const int64_t d_sae = sae.d_sae();
  const int64_t tokens_at_once = std::clamp<int64_t>(topk_buffer_scores / d_sae, 4, 64);
  AlignedBuffer<float> z(tokens_at_once * d_sae);
  for (int64_t token = 0; token < batch.size(); token += tokens_at_once) {
    const int64_t tokens = std::min(tokens_at_once, batch.size() - token);
    pool.for_each((d_sae + rows_per_block - 1) / rows_per_block, [&](int64_t block) {
      const int64_t first = block * rows_per_block;
      const int64_t rows = std::min(rows_per_block, d_sae - first);
      kernels.products(sae.W_enc, first, rows, nullptr, batch.inputs.data() + token, tokens, z.data() + first, d_sae);
      for (int64_t t = 0; t < tokens; ++t) kernels.scores(sae, first, rows, z.data() + t * d_sae + first);
    });
    for (int64_t t = 0; t < tokens; ++t)
      count_largest(z.data() + t * d_sae, d_sae, sae.k,
                    counts + batch.segments[static_cast<size_t>(token + t)] * d_sae);
  }
}

}  // namespace

void encode_density(const StridedMatrix& hidden, const int64_t* offsets, int64_t segments, const Sae& sae,
                    int32_t* counts, const ThreadPool& pool) {
  const int64_t input_size = packed_size(sae.d_model());
  AlignedBuffer<float> inputs(tokens_per_batch * input_size);
  const bool exact_in_bfloat16 =
      hidden.dtype == Dtype::bfloat16 && sae.normalization == Normalization::none && sae.b_dec == nullptr;
  const bool on_matrix_unit = sae.W_enc.dtype == Dtype::bfloat16 && amx_available();
  int64_t segment = 0;
  int64_t token = segments > 0 ? offsets[0] : 0;
  const int64_t end = segments > 0 ? offsets[segments] : 0;
  while (token < end) {
    const int64_t tokens = std::min(tokens_per_batch, end - token);
    std::vector<uint8_t> finite(static_cast<size_t>(tokens));
    pool.for_each(tokens, [&](int64_t t) {
      finite[static_cast<size_t>(t)] = encoder_input(hidden, token + t, sae, inputs.data() + t * input_size).finite;
    });
    Batch batch;
    for (int64_t t = 0; t < tokens; ++t) {
      while (offsets[segment + 1] <= token + t) ++segment;
      if (finite[static_cast<size_t>(t)] == 0) continue;
      batch.inputs.push_back(inputs.data() + t * input_size);
      batch.segments.push_back(segment);
    }
    if (sae.activation == Activation::topk)
      count_topk(batch, sae, counts, pool);
    else if (on_matrix_unit)
      count_gates_amx(batch.inputs, batch.segments, sae, exact_in_bfloat16 ? 1 : 3, counts, pool);
    else
      count_gates(batch, sae, counts, pool);
    token += tokens;
  }
}

}  // namespace dspa::cpu
