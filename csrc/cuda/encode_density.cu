#include "encode_density_launch.cuh"

namespace dspa::cuda {

int run_encode_density(const EncodeDensity& task, const DensityPlan& plan, char* memory, void* stream) {
  return static_cast<int>(cleared(encode_density(task, plan, memory, static_cast<cudaStream_t>(stream))));
}

}  // namespace dspa::cuda
