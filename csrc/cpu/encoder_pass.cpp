#include "encoder_pass.h"

#include <algorithm>
#include <mutex>

#include "aligned_buffer.h"
#include "blocks.h"
#include "row_kernels.h"

namespace dspa::cpu {
namespace {

// The ranks of each token's candidates counted so far; they only rise, from any thread.
class Ranks {
 public:
  Ranks(const Sae& sae, const std::vector<Token*>& tokens) : k_(sae.k) {
    for (const Token* token : tokens)
      ranks_.emplace_back(sae.activation == Activation::topk ? token->candidates.size() : 0);
  }

  bool is_out(size_t token, size_t candidate) const { return ranks_[token][candidate].load() >= k_; }

  bool all_out(size_t token) const {
    for (size_t c = 0; c < ranks_[token].size(); ++c)
      if (!is_out(token, c)) return false;
    return true;
  }

  // Counts the latents of a block that come before each candidate: larger z, or the same and a lower index.
  void count(size_t index, const Token& token, int64_t first, int64_t count, const float* z) {
    const RowKernels& kernels = row_kernels();
    const float largest = kernels.maximum(z, count);
    for (size_t c = 0; c < ranks_[index].size(); ++c) {
      const Candidate& candidate = token.candidates[c];
      if (largest < candidate.score || is_out(index, c)) continue;
      const int64_t before = std::clamp<int64_t>(candidate.latent - first, 0, count);
      ranks_[index][c] += kernels.count_at_least(z, before, candidate.score) +
                          kernels.count_above(z + before, count - before, candidate.score);
    }
  }

  void store(const std::vector<Token*>& tokens) const {
    for (size_t t = 0; t < tokens.size(); ++t)
      for (size_t c = 0; c < ranks_[t].size(); ++c) tokens[t]->candidates[c].rank = ranks_[t][c];
  }

 private:
  int64_t k_;
  std::vector<std::vector<std::atomic<int64_t>>> ranks_;
};

bool is_settled(const Sae& sae, size_t index, const Token& token, const Ranks& ranks) {
  if (sae.activation == Activation::topk) return ranks.all_out(index);
  return token.vanishes(std::max(token.maximum.score(), token.floor.score()));
}

std::vector<size_t> all_of(const std::vector<Token*>& tokens) {
  std::vector<size_t> indices(tokens.size());
  for (size_t t = 0; t < tokens.size(); ++t) indices[t] = t;
  return indices;
}

void drop_settled(const Sae& sae, const std::vector<Token*>& tokens, const Ranks& ranks, std::vector<size_t>& open) {
  open.erase(std::remove_if(open.begin(), open.end(),
                            [&](size_t t) { return is_settled(sae, t, *tokens[t], ranks); }),
             open.end());
}

// Raises the maximum to the largest of some scores.
void raise(Maximum& maximum, int64_t first, int64_t count, const float* scores) {
  const float largest = row_kernels().maximum(scores, count);
  if (largest > 0.0f && largest >= maximum.score())
    maximum.raise(largest, static_cast<int32_t>(first + (std::find(scores, scores + count, largest) - scores)));
}

// A latent that may be the maximum.
struct Suspect {
  int32_t latent;
  float upper;
};

float exact_score(const Sae& sae, int32_t latent, const Token& token) {
  float score = 0.0f;
  row_kernels().gathered_products(sae.W_enc, &latent, 1, token.input, &score);
  row_kernels().scores(sae, latent, 1, &score);
  return score;
}

// The exact maximum among the suspects, the likeliest first.
int64_t rescore(const Sae& sae, std::vector<Suspect>& suspects, Token& token) {
  const float floor = token.floor.score();
  suspects.erase(std::remove_if(suspects.begin(), suspects.end(),
                                [&](const Suspect& suspect) { return suspect.upper < floor; }),
                 suspects.end());
  std::sort(suspects.begin(), suspects.end(), [](const Suspect& a, const Suspect& b) { return a.upper > b.upper; });
  int64_t rescored = 0;
  for (const Suspect& suspect : suspects) {
    if (suspect.upper <= token.maximum.score()) break;
    const float score = exact_score(sae, suspect.latent, token);
    if (score > 0.0f) token.maximum.raise(score, suspect.latent);
    ++rescored;
  }
  return rescored;
}

// Makes the bounds exact where they do not decide whether a latent comes before a candidate.
int64_t resolve_ranks(const Sae& sae, size_t index, const Token& token, const Ranks& ranks, int64_t first,
                      int64_t count, float* lower, float* upper) {
  int64_t rescored = 0;
  for (size_t c = 0; c < token.candidates.size(); ++c) {
    if (ranks.is_out(index, c)) continue;
    const float score = token.candidates[c].score;
    for (int64_t i = 0; i < count; ++i) {
      if (lower[i] > score || upper[i] < score || lower[i] == upper[i]) continue;
      lower[i] = upper[i] = exact_score(sae, static_cast<int32_t>(first + i), token);
      ++rescored;
    }
  }
  return rescored;
}

}  // namespace

PassWork encoder_pass(const Sae& sae, const std::vector<Token*>& tokens, bool may_stop, const ThreadPool& pool) {
  const RowKernels& kernels = row_kernels();
  const Matrix& W = sae.W_enc;
  Ranks ranks(sae, tokens);
  Blocks blocks(W.rows, W.row_bytes());
  std::atomic<int64_t> rows_read{0};

  blocks.on_threads(pool, [&] {
    AlignedBuffer<float> products(blocks.block_rows() * static_cast<int64_t>(tokens.size()));
    std::vector<size_t> open = all_of(tokens);
    std::vector<const float*> inputs;
    blocks.for_each([&](int64_t first, int64_t count, int64_t upcoming) {
      if (may_stop) drop_settled(sae, tokens, ranks, open);
      if (open.empty()) return false;
      inputs.clear();
      for (size_t t : open) inputs.push_back(tokens[t]->input);
      kernels.products(W, first, count, upcoming < 0 ? nullptr : W.row(upcoming), inputs.data(),
                       static_cast<int64_t>(inputs.size()), products.data(), blocks.block_rows());
      rows_read += count;
      for (size_t i = 0; i < open.size(); ++i) {
        float* scores = products.data() + static_cast<int64_t>(i) * blocks.block_rows();
        kernels.scores(sae, first, count, scores);
        raise(tokens[open[i]]->maximum, first, count, scores);
        ranks.count(open[i], *tokens[open[i]], first, count, scores);
      }
      return true;
    });
  });
  ranks.store(tokens);
  PassWork work;
  work.rows = rows_read;
  return work;
}

PassWork screened_pass(const Sae& sae, const QuantizedEncoder& codes, const std::vector<Token*>& tokens,
                       const ThreadPool& pool) {
  const RowKernels& kernels = row_kernels();
  Ranks ranks(sae, tokens);
  Blocks blocks(sae.d_sae(), codes.row_size);
  std::vector<std::vector<Suspect>> suspects(tokens.size());
  std::mutex suspects_mutex;
  std::atomic<int64_t> code_rows{0}, screened{0}, rescored{0};

  blocks.on_threads(pool, [&] {
    const int64_t block_rows = blocks.block_rows();
    AlignedBuffer<float> products(block_rows * static_cast<int64_t>(tokens.size()));
    AlignedBuffer<float> lower(block_rows), upper(block_rows);
    std::vector<std::vector<Suspect>> found(tokens.size());
    std::vector<size_t> open = all_of(tokens);
    std::vector<const int16_t*> inputs;
    blocks.for_each([&](int64_t first, int64_t count, int64_t upcoming) {
      drop_settled(sae, tokens, ranks, open);
      if (open.empty()) return false;
      inputs.clear();
      for (size_t t : open) inputs.push_back(tokens[t]->code);
      kernels.code_products(codes.row(first), codes.row_size, count, upcoming < 0 ? nullptr : codes.row(upcoming),
                            inputs.data(), static_cast<int64_t>(inputs.size()), products.data(), block_rows);
      code_rows += count;
      screened += count * static_cast<int64_t>(open.size());
      for (size_t i = 0; i < open.size(); ++i) {
        Token& token = *tokens[open[i]];
        bound_products(codes, token.code_factors, first, count, products.data() + static_cast<int64_t>(i) * block_rows,
                       lower.data(), upper.data());
        // Scores never fall where products rise, so bounds of products become bounds of scores.
        kernels.scores(sae, first, count, lower.data());
        kernels.scores(sae, first, count, upper.data());
        if (sae.activation == Activation::topk) {
          rescored += resolve_ranks(sae, open[i], token, ranks, first, count, lower.data(), upper.data());
          ranks.count(open[i], token, first, count, lower.data());
        }
        raise(token.floor, first, count, lower.data());
        const float floor = token.floor.score();
        if (kernels.count_at_least(upper.data(), count, floor) > 0)
          for (int64_t r = 0; r < count; ++r)
            if (upper[r] >= floor && upper[r] > 0.0f)
              found[open[i]].push_back({static_cast<int32_t>(first + r), upper[r]});
      }
      return true;
    });
    const std::lock_guard<std::mutex> lock(suspects_mutex);
    for (size_t t = 0; t < tokens.size(); ++t) suspects[t].insert(suspects[t].end(), found[t].begin(), found[t].end());
  });

  ranks.store(tokens);
  (tokens.size() > 1 ? pool : calling_thread).for_each(static_cast<int64_t>(tokens.size()), [&](int64_t index) {
    const size_t t = static_cast<size_t>(index);
    Token& token = *tokens[t];
    token.certain = is_settled(sae, t, token, ranks);
    if (!token.certain) rescored += rescore(sae, suspects[t], token);
  });
  PassWork work;
  work.rows = rescored;
  work.code_rows = code_rows;
  work.screened = screened;
  work.rescored = rescored;
  return work;
}

}  // namespace dspa::cpu
