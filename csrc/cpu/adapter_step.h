// FSRL's edit of one token per row: the adapter's steering vector in latent space, decoded and added.
#pragma once

#include "../common/adapter.h"
#include "../common/sae.h"
#include "parallel.h"
#include "quantized_encoder.h"

namespace dspa::cpu {

// Counters of the cost of a step, for benchmarks; all null where nothing is counted.
struct AdapterWork {
  int64_t* tokens = nullptr;          // enabled and finite
  int64_t* fired = nullptr;           // latents that fired, over those tokens
  int64_t* fell = nullptr;            // of those, whose activation the clip needs
  int64_t* weight_bytes = nullptr;    // bytes of the adapter's weight, and of its codes, that were read
  int64_t* screened_pairs = nullptr;  // pairs of token and latent that were screened
  int64_t* rescored_pairs = nullptr;  // of those, computed exactly after all
};

struct AdapterStep {
  StridedMatrix hidden;
  Sae sae;  // not topk, if the adapter clips
  Adapter adapter;
  const bool* enabled = nullptr;  // null for all
  AdapterStats stats;
  QuantizedEncoder codes;  // of the adapter's weight; without them the step is dense. The edits are the same bit for bit.
  AdapterWork work;
};

// Throws std::invalid_argument if a latent fires that has no decoder row.
void adapter_step(const AdapterStep& step, const ThreadPool& pool);

}  // namespace dspa::cpu
