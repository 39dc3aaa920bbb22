// How many tokens of each segment activate each latent: a matrix product whose tiles are gated and counted where they
// are, in registers.
//
// Three kernels: one encodes the inputs, one multiplies tiles (on the tensor cores where the numbers are exact in 16
// bits, or sums of such, by warps or on sm_90a by warpgroups, else with float32 additions), and for topk, whose latents
// compete with one another, one picks the k largest scores of each token. For topk the scores of some whole tokens are
// held, however many tokens there are.
#pragma once

#include "encode_density_count.cuh"
#include "encode_density_float32.cuh"
#include "encode_density_inputs.cuh"
#include "encode_density_matrix.cuh"
#include "encode_density_warpgroup.cuh"
#include "select.cuh"

namespace dspa::cuda {

// A block picks the k largest scores of one token; ties go to the lower index, and what is not positive does not count.
__global__ void __launch_bounds__(density_threads, 2) density_topk_kernel(const __grid_constant__ EncodeDensity task) {
  SelectionBuffer& buffer = *reinterpret_cast<SelectionBuffer*>(ptx::dynamic_shared());
  const int64_t d_sae = task.sae.W_enc.rows;
  const int64_t segment = task.segment_of[blockIdx.x];
  if (segment < 0) return;
  const float* scores = task.scores + static_cast<int64_t>(blockIdx.x) * d_sae;
  const auto key_of = [&](int64_t latent) { return __float_as_uint(scores[latent]); };
  const auto selection = select_largest<uint32_t>(d_sae, static_cast<uint32_t>(task.sae.k), key_of, buffer);
  for_each_selected(
      d_sae, selection, key_of,
      [&](int64_t latent, uint32_t) {
        if (scores[latent] > 0.0f) atomicAdd(reinterpret_cast<uint32_t*>(task.counts) + segment * d_sae + latent, 1u);
      },
      buffer);
}

}  // namespace dspa::cuda
