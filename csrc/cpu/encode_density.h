// How many tokens of each segment activate each latent, without ever holding the activations.
#pragma once

#include "../common/sae.h"
#include "parallel.h"

namespace dspa::cpu {

// Adds to counts[segment * d_sae + latent]; segment s is the rows `offsets[s]` to `offsets[s + 1]` of `hidden`.
void encode_density(const StridedMatrix& hidden, const int64_t* offsets, int64_t segments, const Sae& sae,
                    int32_t* counts, const ThreadPool& pool);

}  // namespace dspa::cpu
