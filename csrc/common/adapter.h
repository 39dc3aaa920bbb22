// An FSRL adapter as a plain structure (docs/method.md, section 6), and the counters of its edits.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace dspa {

// relu is one-sided as well, with a threshold of 0. An infinite threshold masks a latent.
enum class AdapterActivation { soft_threshold, one_sided };

struct Adapter {
  Matrix weight;                     // [d_sae, d_model]
  const float* bias = nullptr;       // [d_sae]
  const float* threshold = nullptr;  // [d_sae]
  AdapterActivation activation = AdapterActivation::soft_threshold;
  bool clip = true;
};

// Counters of `TokenStats` that an adapter step adds to; all null where nothing is counted.
struct AdapterStats {
  int64_t* seen = nullptr;
  int64_t* edited = nullptr;
  int64_t* nonfinite = nullptr;
  int64_t* latent_edits = nullptr;
};

}  // namespace dspa
