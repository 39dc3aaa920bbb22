#include "adapter_step_launch.cuh"

namespace dspa::cuda {

int run_adapter_step(const AdapterStep& step, void* stream) {
  return static_cast<int>(cleared(adapter_step(step, static_cast<cudaStream_t>(stream))));
}

}  // namespace dspa::cuda
