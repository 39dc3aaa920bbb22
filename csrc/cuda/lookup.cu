#include "lookup.cuh"

namespace dspa::cuda {

int run_lookup(const Lookup<float, float>& lookup, int64_t batch, void* stream) {
  return static_cast<int>(cleared(launch_lookup(lookup, batch, static_cast<cudaStream_t>(stream))));
}

int run_lookup(const Lookup<float, double>& lookup, int64_t batch, void* stream) {
  return static_cast<int>(cleared(launch_lookup(lookup, batch, static_cast<cudaStream_t>(stream))));
}

int run_lookup(const Lookup<double, float>& lookup, int64_t batch, void* stream) {
  return static_cast<int>(cleared(launch_lookup(lookup, batch, static_cast<cudaStream_t>(stream))));
}

int run_lookup(const Lookup<double, double>& lookup, int64_t batch, void* stream) {
  return static_cast<int>(cleared(launch_lookup(lookup, batch, static_cast<cudaStream_t>(stream))));
}

}  // namespace dspa::cuda
