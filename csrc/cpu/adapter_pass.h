// One pass over the rows of the adapter's weight for some tokens: which latents fire, and by how much each changes.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "adapter_step.h"
#include "aligned_buffer.h"

namespace dspa::cpu {

struct AdapterToken {
  const float* input = nullptr;          // packed for rows of the adapter's weight
  const float* encoder_input = nullptr;  // packed for rows of W_enc; null without the clip
  const int16_t* code = nullptr;         // for screening
  QuantizedToken code_factors;
  std::atomic<bool> finite{true};
  int64_t fell = 0;

  // The changes that are not 0, by ascending latent.
  int64_t changes = 0;
  int32_t* latents = nullptr;  // [d_sae]
  float* deltas = nullptr;     // [d_sae]
};

struct AdapterPassWork {
  int64_t rows = 0;       // of the adapter's weight
  int64_t code_rows = 0;
  int64_t screened = 0;   // pairs of token and latent
  int64_t rescored = 0;   // of those, computed exactly after all
  int64_t fired = 0;
};

// Fills in the changes of `tokens`. Screens if there are codes and every token is usable with them, as long as that
// rules out more latents than it lets through.
AdapterPassWork adapter_pass(const AdapterStep& step, const std::vector<AdapterToken*>& tokens, const ThreadPool& pool);

}  // namespace dspa::cpu
