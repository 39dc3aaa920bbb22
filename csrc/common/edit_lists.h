// Edit lists as plain structures, the options by which they are looked up, and the counters of edits.
#pragma once

#include <cstdint>

namespace dspa {

enum class EditKind { ablate, augment, both };

// Options of the lookup (docs/method.md, section 3).
struct LookupOptions {
  int64_t k_prompt = 0;
  int64_t k_diff = 0;
  EditKind edit = EditKind::ablate;
  bool sign_guard = false;
};

// Row b edits `latents[b * capacity + i]` for i below `counts[b]`.
struct Edits {
  const int32_t* latents = nullptr;
  const int8_t* signs = nullptr;
  const int32_t* counts = nullptr;
  int64_t capacity = 0;
};

// The lists that a lookup writes: `k_diff` entries a row, twice as many for both directions.
struct EditLists {
  int32_t* latents = nullptr;
  int8_t* signs = nullptr;
  int32_t* counts = nullptr;
  int64_t capacity = 0;
};

// The counters of `TokenStats`; all null where nothing is counted.
struct Stats {
  int64_t* seen = nullptr;
  int64_t* edited = nullptr;
  int64_t* nonfinite = nullptr;
  double* maximum = nullptr;
  double* maximum_sum = nullptr;
  int64_t* maximum_known = nullptr;
  int64_t* latent_edits = nullptr;
};

}  // namespace dspa
