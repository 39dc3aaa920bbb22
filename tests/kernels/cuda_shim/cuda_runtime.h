// A stand-in for CUDA's header of this name: the kernels of csrc/cuda compiled by a C++ compiler and run on the CPU.
//
// Only what the kernels use is here. `__shared__` is not: shared memory whose size the launch gives is all they have.
// A block's threads are fibers of one thread, taken in a random order from one barrier to the next, or threads of the
// operating system (see engine.h). Any number of blocks runs at a time; the others start when one of these has ended.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "engine.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)

// threadIdx.x and the like: what they say depends on who asks.
template <class Ask>
struct CudaShimIndex {
  struct {
    operator unsigned() const { return Ask{}(); }
  } x;
};

struct CudaShimThread {
  unsigned operator()() const { return cuda_shim::self().thread_index.x; }
};
struct CudaShimBlock {
  unsigned operator()() const { return cuda_shim::self().block->index.x; }
};
struct CudaShimBlockSize {
  unsigned operator()() const { return cuda_shim::self().block->launch->threads.x; }
};

inline constexpr CudaShimIndex<CudaShimThread> threadIdx{};
inline constexpr CudaShimIndex<CudaShimBlock> blockIdx{};
inline constexpr CudaShimIndex<CudaShimBlockSize> blockDim{};

using dim3 = cuda_shim::Index3;

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

// ---- numbers --------------------------------------------------------------------------------------------------------

template <class To, class From>
To cuda_shim_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline uint32_t __float_as_uint(float value) { return cuda_shim_bits<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return cuda_shim_bits<float>(bits); }
inline long long __double_as_longlong(double value) { return cuda_shim_bits<long long>(value); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __popcll(uint64_t bits) { return __builtin_popcountll(bits); }

// ---- threads together -----------------------------------------------------------------------------------------------

inline void __syncthreads() { cuda_shim::self().block->barrier.wait(); }
inline void __syncwarp() { cuda_shim::self().warp->barrier.wait(); }
inline int __syncthreads_and(int flag) { return cuda_shim::vote_in_block(flag == 0) == 0; }
inline int __syncthreads_or(int flag) { return cuda_shim::vote_in_block(flag != 0) != 0; }

template <class Value>
Value __shfl_xor_sync(uint32_t lanes, Value value, int offset) {
  return cuda_shim::read_lane(lanes, value, cuda_shim::self().lane() ^ static_cast<unsigned>(offset));
}

template <class Value>
Value __shfl_up_sync(uint32_t lanes, Value value, unsigned offset) {
  const unsigned lane = cuda_shim::self().lane();
  return cuda_shim::read_lane(lanes, value, lane < offset ? lane : lane - offset);
}

inline uint32_t __ballot_sync(uint32_t lanes, int flag) {
  return cuda_shim::fold_lanes(lanes, static_cast<uint32_t>(flag != 0) << cuda_shim::self().lane(),
                               [](uint32_t a, uint32_t b) { return a | b; });
}

inline int __all_sync(uint32_t lanes, int flag) { return __ballot_sync(lanes, flag) == 0xffffffffu; }
inline int __any_sync(uint32_t lanes, int flag) { return __ballot_sync(lanes, flag) != 0; }

inline uint32_t __reduce_max_sync(uint32_t lanes, uint32_t value) {
  return cuda_shim::fold_lanes(lanes, value, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}

// ---- atomics, which order nothing -----------------------------------------------------------------------------------

template <class Integer>
Integer atomicAdd(Integer* address, Integer value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline uint32_t atomicMax(uint32_t* address, uint32_t value) {
  uint32_t before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (before < value &&
         !__atomic_compare_exchange_n(address, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}

// ---- launches -------------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorUnknown = 999
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
using cudaStream_t = void*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid value"
         : error == cudaErrorUnknown      ? "unknown error"
                                          : "invalid configuration";
}

// Each of the calls below fails if the machine is told so.
inline cudaError_t cuda_shim_call() {
  cuda_shim::Machine& machine = cuda_shim::machine();
  if (machine.calls_to_failure == 0 || --machine.calls_to_failure != 0) return cudaSuccess;
  machine.last_error = cudaErrorUnknown;
  return cudaErrorUnknown;
}

// What a call answered stays until somebody asks.
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = static_cast<cudaError_t>(cuda_shim::machine().last_error);
  cuda_shim::machine().last_error = cudaSuccess;
  return error;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_shim::machine().device;
  return cuda_shim_call();
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_shim::Machine& machine = cuda_shim::machine();
  *value = attribute == cudaDevAttrMultiProcessorCount ? machine.processors : machine.shared_limit;
  return cuda_shim_call();
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cuda_shim::machine().shared_limit) return cudaErrorInvalidValue;
  cuda_shim::allow_shared(kernel, bytes);
  return cuda_shim_call();
}

struct cudaFuncAttributes {
  int maxThreadsPerBlock;
  int ptxVersion;
};

// Of a kernel for sm_90a, or sm_90: what is played is one, or a GPU before it, for which the kernel is empty.
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->maxThreadsPerBlock = cuda_shim::machine().compute_capability == 9 ? 1024 : 32;
  attributes->ptxVersion = 10 * cuda_shim::machine().compute_capability;
  return cuda_shim_call();
}

inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = cuda_shim::machine().blocks_per_processor;
  return cuda_shim_call();
}

inline unsigned cuda_shim_cluster(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  return 1;
}

inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const cuda_shim::Machine& machine = cuda_shim::machine();
  *clusters = machine.processors * machine.blocks_per_processor / static_cast<int>(cuda_shim_cluster(*config));
  return cuda_shim_call();
}

// Runs the kernel to its end. One that begins early finds the launches before it ended all the same.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  if (const cudaError_t error = cuda_shim_call(); error != cudaSuccess) return error;
  const unsigned cluster = cuda_shim_cluster(*config);
  const bool allowed = static_cast<int>(config->dynamicSmemBytes) <=
                       cuda_shim::shared_allowed(reinterpret_cast<const void*>(kernel));
  if (!allowed || config->blockDim.x % 32 != 0 || config->gridDim.x % cluster != 0 || config->gridDim.x == 0)
    return cudaErrorInvalidConfiguration;
  cuda_shim::Launch launch;
  launch.blocks = config->gridDim;
  launch.threads = config->blockDim;
  launch.cluster = cluster;
  launch.shared_bytes = config->dynamicSmemBytes;
  launch.body = [&] { kernel(arguments...); };
  cuda_shim::run(launch);
  return cudaSuccess;
}
