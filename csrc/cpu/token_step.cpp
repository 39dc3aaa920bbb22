#include "token_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "aligned_buffer.h"
#include "encoder_input.h"
#include "encoder_pass.h"
#include "hidden_row.h"
#include "row_kernels.h"

namespace dspa::cpu {
namespace {

// Below this many bytes of weights, waking other threads costs more than it saves.
constexpr int64_t bytes_worth_a_thread = 4 * 1024 * 1024;
constexpr int32_t no_latent = -1;

struct Row {
  Token token;
  EncoderInput input;
  bool enabled = false;
  bool finite = false;          // the input, the listed latents and, where it matters, the maximum
  bool maximum_needed = false;  // the edit depends on the value of M_t
  bool edited = false;
  int64_t rows_read = 0;
  std::vector<int32_t> latents_changed;

  bool is_processed() const { return enabled && finite; }
};

void check_lists(const TokenStep& step) {
  const Edits& edits = step.edits;
  for (int64_t row = 0; row < step.hidden.rows; ++row) {
    const int64_t count = edits.counts[row];
    if (count < 0 || count > edits.capacity)
      throw std::invalid_argument("edit list " + std::to_string(row) + " has " + std::to_string(count) +
                                  " entries; expected 0 to " + std::to_string(edits.capacity));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t latent = edits.latents[row * edits.capacity + i];
      if (latent < 0 || latent >= step.sae.d_sae())
        throw std::invalid_argument("edit list " + std::to_string(row) + " names latent " + std::to_string(latent) +
                                    "; expected 0 to " + std::to_string(step.sae.d_sae() - 1));
      const int64_t decoder_row = step.sae.decoder_rows == nullptr ? latent : step.sae.decoder_rows[latent];
      if (decoder_row < 0 || decoder_row >= step.sae.W_dec.rows)
        throw std::invalid_argument("edit list " + std::to_string(row) + " names latent " + std::to_string(latent) +
                                    ", which has no row in W_dec");
    }
  }
}

// Scores of some latents for one token, with the same bits as in a pass. False if one is not finite.
bool score_latents(const Sae& sae, const int32_t* latents, int64_t count, const float* input, float* scores) {
  const RowKernels& kernels = row_kernels();
  bool finite = true;
  kernels.gathered_products(sae.W_enc, latents, count, input, scores);
  for (int64_t i = 0; i < count; ++i) {
    finite &= is_finite(scores[i]);
    kernels.scores(sae, latents[i], 1, scores + i);
    finite &= is_finite(scores[i]);
  }
  return finite;
}

void find_candidates(const TokenStep& step, int64_t index, Row& row) {
  const Edits& edits = step.edits;
  const int64_t count = edits.counts[index];
  const int32_t* latents = edits.latents + index * edits.capacity;
  std::vector<float> scores(static_cast<size_t>(count));
  row.finite = score_latents(step.sae, latents, count, row.token.input, scores.data());
  row.rows_read += count;
  for (int64_t i = 0; i < count; ++i)
    if (scores[static_cast<size_t>(i)] > 0.0f)
      row.token.candidates.push_back(
          {latents[i], edits.signs[index * edits.capacity + i], scores[static_cast<size_t>(i)], 0});
}

// Tries to prove, from single latents, that the maximum is large enough for every candidate to vanish.
void try_without_pass(const TokenStep& step, Row& row) {
  Token& token = row.token;
  if (token.candidates.empty()) return;
  for (const Candidate& candidate : token.candidates) token.floor.raise(candidate.score, no_latent);
  if (step.sae.activation == Activation::topk) return;  // whether a candidate is active at all is a matter of its rank
  token.certain = token.vanishes(token.floor.score());
  if (!token.vanishes(std::numeric_limits<float>::infinity())) return;

  constexpr int64_t at_once = 8;
  for (int64_t first = 0; !token.certain && first < step.recent_argmax.capacity; first += at_once) {
    int32_t latents[at_once];
    int64_t count = 0;
    for (int64_t i = first; i < std::min(first + at_once, step.recent_argmax.capacity); ++i) {
      const int32_t latent = step.recent_argmax.latents[i];
      if (latent >= 0 && latent < step.sae.d_sae()) latents[count++] = latent;
    }
    float scores[at_once];
    score_latents(step.sae, latents, count, token.input, scores);
    row.rows_read += count;
    for (int64_t i = 0; i < count; ++i)
      if (scores[i] > 0.0f) token.floor.raise(scores[i], latents[i]);
    token.certain = token.vanishes(token.floor.score());
  }
}

// Brings a latent to the front; the least recent one is dropped.
void remember(const RecentArgmax& recent_argmax, int32_t latent) {
  if (recent_argmax.capacity == 0 || latent < 0) return;
  int32_t* end = std::find(recent_argmax.latents, recent_argmax.latents + recent_argmax.capacity - 1, latent);
  std::copy_backward(recent_argmax.latents, end, end + 1);
  recent_argmax.latents[0] = latent;
}

// Edits the active listed latents (docs/method.md, section 4) and adds the decoded difference to the row.
void edit(const TokenStep& step, int64_t index, Row& row) {
  const Sae& sae = step.sae;
  Token& token = row.token;
  if (sae.activation == Activation::topk)
    token.candidates.erase(std::remove_if(token.candidates.begin(), token.candidates.end(),
                                          [&](const Candidate& candidate) { return candidate.rank >= sae.k; }),
                           token.candidates.end());
  if (token.candidates.empty()) return;

  const float maximum = token.maximum.score();
  row.maximum_needed = !token.certain && !token.vanishes(maximum);
  if (row.maximum_needed && !is_finite(maximum)) {
    row.finite = false;
    return;
  }
  const float shift = token.alpha * maximum;
  std::vector<int32_t> decoder_rows;
  std::vector<float> coefficients;
  for (const Candidate& candidate : token.candidates) {
    float moved = 0.0f;
    if (row.maximum_needed) {
      moved = candidate.sign < 0 ? candidate.score - shift : candidate.score + shift;
      if (candidate.sign < 0 && !(moved > 0.0f)) moved = 0.0f;
    }
    float difference = moved - candidate.score;
    if (difference == 0.0f) continue;
    row.latents_changed.push_back(candidate.latent);
    if (sae.decoder_norm != nullptr) difference /= sae.decoder_norm[candidate.latent];
    if (sae.normalization != Normalization::none) difference *= row.input.scale;
    decoder_rows.push_back(sae.decoder_rows == nullptr ? candidate.latent : sae.decoder_rows[candidate.latent]);
    coefficients.push_back(difference);
  }
  row.edited = !row.latents_changed.empty();
  if (!row.edited) return;

  AlignedBuffer<float> decoded(packed_size(sae.d_model()));
  std::fill_n(decoded.data(), packed_size(sae.d_model()), 0.0f);
  row_kernels().add_rows(sae.W_dec, decoder_rows.data(), coefficients.data(),
                         static_cast<int64_t>(coefficients.size()), 0, sae.d_model(), decoded.data());
  add_to_row(step.hidden, index, sae.W_dec.dtype, 0, sae.d_model(), decoded.data());
}

void count(const TokenStep& step, const std::vector<Row>& rows) {
  const Stats& stats = step.stats;
  if (stats.seen == nullptr) return;
  for (size_t index = 0; index < rows.size(); ++index) {
    const Row& row = rows[index];
    if (!row.enabled) continue;
    const bool known = row.is_processed() && (step.mode == Mode::dense || row.maximum_needed);
    const double maximum = known ? row.token.maximum.score() : std::numeric_limits<double>::quiet_NaN();
    stats.seen[index] += 1;
    stats.edited[index] += row.edited;
    stats.nonfinite[index] += !row.finite;
    stats.maximum[index] = maximum;
    if (known) stats.maximum_sum[index] += maximum;
    stats.maximum_known[index] += known;
    for (int32_t latent : row.latents_changed) stats.latent_edits[latent] += 1;
  }
}

void count_work(const TokenStep& step, const std::vector<Row>& rows, int64_t passes, const PassWork& pass) {
  const Work& work = step.work;
  if (work.tokens == nullptr) return;
  for (const Row& row : rows) {
    *work.tokens += row.is_processed();
    *work.active += !row.token.candidates.empty();
    *work.maximum_needed += row.maximum_needed;
  }
  *work.passes += passes;
  *work.encoder_bytes += pass.rows * step.sae.W_enc.row_bytes() + pass.code_rows * step.codes.row_size;
  *work.screened_pairs += pass.screened;
  *work.rescored_pairs += pass.rescored;
}

// The pass over the encoder, in the way of the mode.
PassWork find_maxima(const TokenStep& step, const std::vector<Token*>& tokens, const ThreadPool& pool) {
  if (step.mode == Mode::screened && step.codes.values != nullptr) {
    const int64_t row_size = step.codes.row_size;
    AlignedBuffer<int16_t> codes(static_cast<int64_t>(tokens.size()) * row_size);
    pool.for_each(static_cast<int64_t>(tokens.size()), [&](int64_t t) {
      Token& token = *tokens[static_cast<size_t>(t)];
      int16_t* code = codes.data() + t * row_size;
      token.code = code;
      token.code_factors = quantize_token(token.input, step.sae.W_enc.dtype, step.sae.d_model(), code, row_size);
    });
    if (std::all_of(tokens.begin(), tokens.end(), [](const Token* token) { return token->code_factors.usable; })) return screened_pass(step.sae, step.codes, tokens, pool);
  }
  return encoder_pass(step.sae, tokens, step.mode != Mode::dense, pool);
}

}  // namespace

void token_step(const TokenStep& step, const ThreadPool& pool) {
  if (step.hidden.rows == 0) return;
  check_lists(step);
  const Sae& sae = step.sae;
  const int64_t batch = step.hidden.rows;
  const int64_t input_size = packed_size(sae.d_model());
  AlignedBuffer<float> inputs(batch * input_size);
  std::vector<Row> rows(static_cast<size_t>(batch));

  const int64_t listed_bytes = batch * step.edits.capacity * sae.W_enc.row_bytes();
  const ThreadPool& row_pool = listed_bytes < bytes_worth_a_thread ? calling_thread : pool;
  const auto row_at = [&](int64_t index) -> Row& { return rows[static_cast<size_t>(index)]; };

  row_pool.for_each(batch, [&](int64_t index) {
    Row& row = row_at(index);
    row.enabled = step.enabled == nullptr || step.enabled[index];
    if (!row.enabled) return;
    float* input = inputs.data() + index * input_size;
    row.input = encoder_input(step.hidden, index, sae, input);
    if (!row.input.finite) return;
    row.token.input = input;
    row.token.alpha = step.alpha_of_row == nullptr ? step.alpha : step.alpha_of_row[index];
    find_candidates(step, index, row);
    if (row.finite && step.mode != Mode::dense) try_without_pass(step, row);
  });

  std::vector<Token*> uncertain;
  for (Row& row : rows)
    if (row.is_processed() && (step.mode == Mode::dense || !(row.token.certain || row.token.candidates.empty())))
      uncertain.push_back(&row.token);
  PassWork pass;
  if (!uncertain.empty()) pass = find_maxima(step, uncertain, pool);

  row_pool.for_each(batch, [&](int64_t index) {
    if (row_at(index).is_processed()) edit(step, index, row_at(index));
  });

  for (const Row& row : rows) {
    remember(step.recent_argmax, (row.token.certain ? row.token.floor : row.token.maximum).latent());
    pass.rows += row.rows_read;
  }
  count(step, rows);
  count_work(step, rows, static_cast<int64_t>(uncertain.size()), pass);
}

}  // namespace dspa::cpu
