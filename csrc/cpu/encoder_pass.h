// One pass over the rows of W_enc for all tokens that need it: the largest score of each, and ranks for topk.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "quantized_encoder.h"
#include "../common/sae.h"
#include "parallel.h"

namespace dspa::cpu {

// A listed latent that may be active.
struct Candidate {
  int32_t latent = 0;
  int32_t sign = 0;
  float score = 0.0f;  // above 0
  int64_t rank = 0;    // topk: number of latents that come before it
};

// The largest score so far and the lowest latent that has it; only rises, from any thread.
class Maximum {
 public:
  float score() const { return float_of_bits(static_cast<uint32_t>(packed_.load(std::memory_order_relaxed) >> 32)); }
  // -1 until a score above 0 was raised.
  int32_t latent() const { return static_cast<int32_t>(~static_cast<uint32_t>(packed_.load())); }

  void raise(float score, int32_t latent) {
    // Scores are not negative, so they order as their bits do.
    const uint64_t offered = static_cast<uint64_t>(bits_of_float(score)) << 32 | ~static_cast<uint32_t>(latent);
    uint64_t current = packed_.load();
    while (offered > current && !packed_.compare_exchange_weak(current, offered)) {
    }
  }

 private:
  std::atomic<uint64_t> packed_{0};
};

struct Token {
  const float* input = nullptr;  // packed
  const int16_t* code = nullptr;
  QuantizedToken code_factors;
  float alpha = 0.0f;
  std::vector<Candidate> candidates;
  Maximum floor;         // of lower bounds of the maximum, by which latent
  Maximum maximum;       // of exact scores
  bool certain = false;  // all candidates vanish, whatever the maximum is above its floor

  // Whether all candidates are ablated to 0 if the maximum is at least `bound`: rounding is monotonic, so what holds
  // for a lower bound of the maximum holds for the maximum.
  bool vanishes(float bound) const {
    for (const Candidate& candidate : candidates)
      if (candidate.sign > 0 || !(candidate.score <= alpha * bound)) return false;
    return true;
  }
};

// What a pass read.
struct PassWork {
  int64_t rows = 0;      // of W_enc
  int64_t code_rows = 0;
  int64_t screened = 0;  // pairs of token and latent
  int64_t rescored = 0;  // of those, computed exactly after all
};

// Fills in the maxima and ranks of `tokens`. With `may_stop`, a token drops out as soon as its edit is certain.
PassWork encoder_pass(const Sae& sae, const std::vector<Token*>& tokens, bool may_stop, const ThreadPool& pool);

// The same with the codes, which rule out most rows; the others are computed exactly.
PassWork screened_pass(const Sae& sae, const QuantizedEncoder& codes, const std::vector<Token*>& tokens,
                       const ThreadPool& pool);

}  // namespace dspa::cpu
