// The launches of an adapter step: which kernels, for the dtypes and the alignment of the weights.
#pragma once

#include "adapter_step.cuh"
#include "launch.cuh"

namespace dspa::cuda {

// Puts one of the kernels on the stream, with room in shared memory for so many inputs.
inline cudaError_t launch_adapter(void (*kernel)(AdapterStep), const AdapterStep& step, int64_t blocks, int64_t floats,
                                  cudaStream_t stream) {
  const int64_t shared = adapter_shared_bytes + floats * 4;
  Room room;
  const cudaError_t error = room_for(reinterpret_cast<const void*>(kernel), tuning().threads, shared, room);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), tuning().threads, shared, 1, stream, step);
}

template <class Weights, int kInputs, bool kAligned>
cudaError_t launch_fire(const AdapterStep& step, cudaStream_t stream) {
  const int64_t groups = (step.hidden.rows + kInputs - 1) / kInputs;
  return launch_adapter(&adapter_fire_kernel<Weights, kInputs, kAligned>, step, adapter_tiles(step.sae.d_sae()) * groups,
                        kInputs * input_size<Weights>(step.sae.d_model()), stream);
}

template <class Weights>
cudaError_t launch_fire(const AdapterStep& step, cudaStream_t stream) {
  if (!is_aligned(step.adapter.weight)) return launch_fire<Weights, unaligned_adapter_inputs, false>(step, stream);
  int device = 0;
  int64_t limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = shared_limit_of(device, limit);
  if (error != cudaSuccess) return error;
  const bool fits = adapter_shared_bytes + adapter_inputs * input_size<Weights>(step.sae.d_model()) * 4 <= limit;
  return fits && step.hidden.rows > 1 ? launch_fire<Weights, adapter_inputs, true>(step, stream)
                                      : launch_fire<Weights, 1, true>(step, stream);
}

template <class Weights, bool kAligned>
cudaError_t launch_rest(const AdapterStep& step, cudaStream_t stream) {
  constexpr int64_t columns_per_slice = 32 * Weights::per_load;
  const int64_t d_model = step.sae.d_model(), slices = (d_model + columns_per_slice - 1) / columns_per_slice;
  const cudaError_t error = launch_adapter(&adapter_change_kernel<Weights, kAligned>, step,
                                           step.hidden.rows * adapter_tiles(step.sae.d_sae()), input_size<Weights>(d_model), stream);
  if (error != cudaSuccess) return error;
  return launch_adapter(&adapter_decode_kernel<Weights, kAligned>, step, step.hidden.rows * slices,
                        decode_parts * columns_per_slice, stream);
}

template <class Weights>
cudaError_t launch_rest(const AdapterStep& step, cudaStream_t stream) {
  return is_aligned(step.sae.W_enc) && is_aligned(step.sae.W_dec) ? launch_rest<Weights, true>(step, stream)
                                                                  : launch_rest<Weights, false>(step, stream);
}

// `call(weights)` with the type of a dtype.
template <class Call>
cudaError_t for_dtype(Dtype dtype, const Call& call) {
  if (dtype == Dtype::bfloat16) return call(Bfloat16{});
  if (dtype == Dtype::float16) return call(Float16{});
  return call(Float32{});
}

// Three launches on the stream, for at least one row.
inline cudaError_t adapter_step(const AdapterStep& step, cudaStream_t stream) {
  const cudaError_t error = for_dtype(step.adapter.weight.dtype, [&](auto weights) {
    return launch_fire<decltype(weights)>(step, stream);
  });
  if (error != cudaSuccess) return error;
  return for_dtype(step.sae.W_enc.dtype,
                   [&](auto weights) { return launch_rest<decltype(weights)>(step, stream); });
}

}  // namespace dspa::cuda
