// The edit of one token per row: encode, select, and write the decoded difference back.
#pragma once

#include "../common/edit_lists.h"
#include "../common/sae.h"
#include "parallel.h"
#include "quantized_encoder.h"

namespace dspa::cpu {

// dense: always one pass over W_enc. lazy: none where the result does not depend on it. screened: as lazy, and the pass
// reads a quantized copy instead of W_enc. The edits are the same bit for bit.
enum class Mode { dense, lazy, screened };

// Latents that were the argmax of earlier tokens, the most recent first; -1 for an empty entry. They change the speed
// of `lazy` and `screened`, never a result.
struct RecentArgmax {
  int32_t* latents = nullptr;
  int64_t capacity = 0;
};

// Counters of the cost of a step, for benchmarks; all null where nothing is counted.
struct Work {
  int64_t* tokens = nullptr;          // enabled and finite
  int64_t* active = nullptr;          // of those, with an active latent in their list
  int64_t* passes = nullptr;          // of those, for which a pass was begun
  int64_t* maximum_needed = nullptr;  // of those, whose edit depends on M_t
  int64_t* encoder_bytes = nullptr;   // bytes of W_enc, and of the codes, that were read
  int64_t* screened_pairs = nullptr;   // pairs of token and latent that were screened
  int64_t* rescored_pairs = nullptr;   // of those, computed exactly after all
};

struct TokenStep {
  StridedMatrix hidden;
  Sae sae;
  Edits edits;
  float alpha = 0.0f;
  const float* alpha_of_row = nullptr;  // instead of alpha
  const bool* enabled = nullptr;        // null for all
  Stats stats;
  RecentArgmax recent_argmax;
  QuantizedEncoder codes;  // for screened; without them the step is lazy
  Work work;
  Mode mode = Mode::dense;
};

// Throws std::invalid_argument if a list is out of bounds.
void token_step(const TokenStep& step, const ThreadPool& pool);

}  // namespace dspa::cpu
