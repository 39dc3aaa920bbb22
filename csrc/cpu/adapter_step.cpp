#include "adapter_step.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "adapter_pass.h"
#include "aligned_buffer.h"
#include "encoder_input.h"
#include "hidden_row.h"
#include "row_kernels.h"

namespace dspa::cpu {
namespace {

constexpr int64_t tokens_per_chunk = 64;      // share a pass over the weight; bounds the memory for what fires
constexpr int64_t columns_per_slice = 256;    // of the residual stream, decoded by one task
constexpr int64_t latents_at_once = 128;      // whose decoder rows stay in the cache for all tokens of a chunk
constexpr int64_t changes_worth_a_thread = 32;

struct Row {
  int64_t index = 0;  // in `hidden`
  EncoderInput input;
  AdapterToken token;
};

// The memory of the tokens of one chunk.
class ChunkBuffers {
 public:
  ChunkBuffers(const AdapterStep& step, int64_t tokens)
      : inputs_(tokens * packed_size(step.sae.d_model())),
        encoder_inputs_(packs_twice(step) ? tokens * packed_size(step.sae.d_model()) : 0),
        codes_(step.codes.values != nullptr ? tokens * step.codes.row_size : 0),
        latents_(tokens * step.sae.d_sae()),
        deltas_(tokens * step.sae.d_sae()) {}

  // Packs row `index` of `hidden`; a row that is not finite is not usable.
  void prepare(const AdapterStep& step, int64_t slot, Row& row) const {
    const int64_t size = packed_size(step.sae.d_model());
    Sae as_weight = step.sae;
    as_weight.W_enc = step.adapter.weight;  // rows are packed by their dtype
    float* input = inputs_.data() + slot * size;
    row.input = encoder_input(step.hidden, row.index, as_weight, input);
    row.token.finite = row.input.finite && is_finite(row.input.scale);
    if (!row.token.finite) return;
    row.token.input = row.token.encoder_input = input;
    if (packs_twice(step)) {
      float* packed = encoder_inputs_.data() + slot * size;
      encoder_input(step.hidden, row.index, step.sae, packed);
      row.token.encoder_input = packed;
    }
    if (step.codes.values != nullptr) {
      int16_t* code = codes_.data() + slot * step.codes.row_size;
      row.token.code_factors =
          quantize_token(input, step.adapter.weight.dtype, step.sae.d_model(), code, step.codes.row_size);
      row.token.code = code;
    }
    row.token.latents = latents_.data() + slot * step.sae.d_sae();
    row.token.deltas = deltas_.data() + slot * step.sae.d_sae();
  }

 private:
  static bool packs_twice(const AdapterStep& step) {
    return step.adapter.clip && step.adapter.weight.dtype != step.sae.W_enc.dtype;
  }

  AlignedBuffer<float> inputs_, encoder_inputs_;
  AlignedBuffer<int16_t> codes_;
  AlignedBuffer<int32_t> latents_;
  AlignedBuffer<float> deltas_;
};

// Latents to rows of W_dec and deltas to their coefficients, in place, once they are counted.
void to_decoder(const AdapterStep& step, Row& row) {
  const Sae& sae = step.sae;
  AdapterToken& token = row.token;
  for (int64_t i = 0; i < token.changes; ++i) {
    const int32_t latent = token.latents[i];
    if (sae.decoder_norm != nullptr) token.deltas[i] /= sae.decoder_norm[latent];
    if (sae.normalization != Normalization::none) token.deltas[i] *= row.input.scale;
    if (step.stats.latent_edits != nullptr) step.stats.latent_edits[latent] += 1;
    if (sae.decoder_rows == nullptr) continue;
    token.latents[i] = sae.decoder_rows[latent];
    if (token.latents[i] < 0 || token.latents[i] >= sae.W_dec.rows)
      throw std::invalid_argument("latent " + std::to_string(latent) + " fires, but has no row in W_dec");
  }
}

// Adds the decoded changes of some rows, one slice of the residual stream after the other. Each element is summed by
// ascending latent, however slices and latents are distributed.
void decode(const AdapterStep& step, const std::vector<Row*>& rows, const ThreadPool& pool) {
  const Matrix& W = step.sae.W_dec;
  const int64_t tokens = static_cast<int64_t>(rows.size());
  int64_t changes = 0;
  for (const Row* row : rows) changes += row->token.changes;
  // A compact decoder is not in the order of the latents.
  const bool tiled = tokens > 1 && changes > tokens * latents_at_once && step.sae.decoder_rows == nullptr;
  const int64_t slices = (W.columns + columns_per_slice - 1) / columns_per_slice;
  (changes < changes_worth_a_thread ? calling_thread : pool).for_each(slices, [&](int64_t slice) {
    const int64_t first = slice * columns_per_slice;
    const int64_t columns = std::min(columns_per_slice, W.columns - first);
    AlignedBuffer<float> sums(tokens * columns_per_slice);
    std::fill_n(sums.data(), tokens * columns_per_slice, 0.0f);
    std::vector<int64_t> done(static_cast<size_t>(tokens), 0);
    for (int64_t end = tiled ? latents_at_once : W.rows;; end += latents_at_once) {
      for (int64_t t = 0; t < tokens; ++t) {
        const AdapterToken& token = rows[static_cast<size_t>(t)]->token;
        int64_t& begin = done[static_cast<size_t>(t)];
        int64_t stop = token.changes;
        if (tiled) {
          stop = begin;
          while (stop < token.changes && token.latents[stop] < end) ++stop;
        }
        row_kernels().add_rows(W, token.latents + begin, token.deltas + begin, stop - begin, first, columns,
                               sums.data() + t * columns_per_slice);
        begin = stop;
      }
      if (end >= W.rows) break;
    }
    for (int64_t t = 0; t < tokens; ++t)
      add_to_row(step.hidden, rows[static_cast<size_t>(t)]->index, W.dtype, first, columns,
                 sums.data() + t * columns_per_slice);
  });
}

void count_work(const AdapterStep& step, const std::vector<AdapterToken*>& tokens, const AdapterPassWork& pass) {
  const AdapterWork& work = step.work;
  if (work.tokens == nullptr) return;
  *work.tokens += static_cast<int64_t>(tokens.size());
  *work.fired += pass.fired;
  for (const AdapterToken* token : tokens) *work.fell += token->fell;
  *work.weight_bytes += pass.rows * step.adapter.weight.row_bytes() + pass.code_rows * step.codes.row_size;
  *work.screened_pairs += pass.screened;
  *work.rescored_pairs += pass.rescored;
}

}  // namespace

void adapter_step(const AdapterStep& step, const ThreadPool& pool) {
  std::vector<int64_t> enabled;
  for (int64_t index = 0; index < step.hidden.rows; ++index)
    if (step.enabled == nullptr || step.enabled[index]) enabled.push_back(index);
  if (enabled.empty()) return;
  const int64_t count = static_cast<int64_t>(enabled.size());
  const ChunkBuffers buffers(step, std::min(count, tokens_per_chunk));

  for (int64_t first = 0; first < count; first += tokens_per_chunk) {
    const int64_t size = std::min(tokens_per_chunk, count - first);
    std::vector<Row> rows(static_cast<size_t>(size));
    pool.for_each(size, [&](int64_t slot) {
      Row& row = rows[static_cast<size_t>(slot)];
      row.index = enabled[static_cast<size_t>(first + slot)];
      buffers.prepare(step, slot, row);
    });
    std::vector<AdapterToken*> tokens;
    for (Row& row : rows)
      if (row.token.finite) tokens.push_back(&row.token);
    if (!tokens.empty()) count_work(step, tokens, adapter_pass(step, tokens, pool));

    std::vector<Row*> edited;
    for (Row& row : rows) {
      const bool changes = row.token.finite && row.token.changes > 0;
      if (changes) {
        to_decoder(step, row);
        edited.push_back(&row);
      }
      if (step.stats.seen == nullptr) continue;
      step.stats.seen[row.index] += 1;
      step.stats.edited[row.index] += changes;
      step.stats.nonfinite[row.index] += !row.token.finite;
    }
    if (!edited.empty()) decode(step, edited, pool);
  }
}

}  // namespace dspa::cpu
