// The edit of one token per row: encode, select, and write the decoded difference back.
#pragma once

#include "codes.h"
#include "operands.h"
#include "parallel.h"

namespace dspa::cpu {

// dense: always one pass over W_enc. lazy: none where the result is known without. screened: as lazy, and the pass
// reads the codes instead of W_enc. The edits are the same bit for bit.
enum class Mode { dense, lazy, screened };

// Latents that were often the largest, the latest first; -1 where there is none yet. They only make `lazy` faster.
struct Leaders {
  int32_t* latents = nullptr;
  int64_t capacity = 0;
};

// What a step adds to, for whoever wants to know what it cost; all null where nobody does.
struct Work {
  int64_t* tokens = nullptr;          // edited or not, but enabled and finite
  int64_t* active = nullptr;          // of those, with an active latent in their list
  int64_t* passes = nullptr;          // of those, for which a pass was begun
  int64_t* maximum_needed = nullptr;  // of those, whose edit depends on M_t
  int64_t* encoder_bytes = nullptr;   // bytes of W_enc, and of the codes, that were read
  int64_t* screened_rows = nullptr;   // pairs of token and latent that were screened
  int64_t* rescored_rows = nullptr;   // of those, computed exactly after all
};

struct TokenStep {
  StridedMatrix hidden;
  Sae sae;
  Edits edits;
  float alpha = 0.0f;
  const float* alpha_of_row = nullptr;  // instead of alpha
  const bool* enabled = nullptr;        // null for all
  Stats stats;
  Leaders leaders;
  Codes codes;  // for screened; without them it is lazy
  Work work;
  Mode mode = Mode::dense;
};

// Throws std::invalid_argument if a list is out of bounds.
void token_step(const TokenStep& step, const ThreadPool& pool);

}  // namespace dspa::cpu
