// Counting active latents with the matrix unit of the processor (AMX), for bfloat16 weights and threshold or gated
// SAEs. Products are accumulated in float32 in one fixed order, another one than that of `RowKernels`.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/sae.h"
#include "parallel.h"

namespace dspa::cpu {

bool amx_available();

// Adds to counts[segment * d_sae + latent] for tokens whose inputs are packed as for `RowKernels`.
// `parts` bfloat16 terms must add up to each input exactly: 1 if the inputs are bfloat16 themselves, else 3.
void count_gates_amx(const std::vector<const float*>& inputs, const std::vector<int64_t>& segments, const Sae& sae,
                     int parts, int32_t* counts, const ThreadPool& pool);

}  // namespace dspa::cpu
