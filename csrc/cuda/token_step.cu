#include "token_step_launch.cuh"

namespace dspa::cuda {

int run_token_step(const TokenStep& step, void* stream) {
  return static_cast<int>(cleared(token_step(step, static_cast<cudaStream_t>(stream))));
}

Tuning& tuning() {
  static Tuning instance;
  return instance;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace dspa::cuda
