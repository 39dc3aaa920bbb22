// Launching kernels: how many blocks a device holds at a time, shared memory above 48 KB, clusters.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "operations.h"

namespace dspa::cuda {

// Whether every row can be loaded 16 bytes at a time.
inline bool is_aligned(const Matrix& matrix) {
  const int64_t row_bytes = matrix.columns * (matrix.dtype == Dtype::float32 ? 4 : 2);
  return row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
}

// Limits of a device for one kernel: shared memory of a block, and how many blocks, or clusters of them, run at a time.
struct Room {
  int64_t shared_limit = 0;
  int64_t blocks = 0;
  int64_t clusters = 0;
  bool is_for_sm_90 = false;  // compiled for sm_90 or later: has clusters, and early launches
};

struct LaunchOptions {
  int cluster = 1;     // blocks of a cluster
  bool early = false;  // begins while the kernel before it on the stream ends

  LaunchOptions(int cluster_of, bool begins_early = false) : cluster(cluster_of), early(begins_early) {}
};

inline cudaLaunchConfig_t launch_config(dim3 blocks, int threads, int64_t shared, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  return config;
}

inline cudaLaunchAttribute clusters_of(int blocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

inline cudaError_t shared_limit_of(int device, int64_t& limit) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limit = value;
  return error;
}

// The same error, cleared in the CUDA runtime: torch would otherwise report it at its own next launch.
inline cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// Whether a kernel takes blocks of this many threads on the current device. A kernel for some GPUs only is compiled as
// an empty kernel with smaller blocks for the others.
inline bool takes_blocks_of(const void* kernel, int threads) {
  cudaFuncAttributes attributes = {};
  return cleared(cudaFuncGetAttributes(&attributes, kernel)) == cudaSuccess && attributes.maxThreadsPerBlock >= threads;
}

// Queried once for every kernel, device and size, then cached. Clusters are of `cluster` blocks, or of one where there
// are none.
inline cudaError_t room_for(const void* kernel, int threads, int64_t shared, Room& room, int cluster = 1) {
  struct Entry {
    const void* kernel;
    int threads;
    int64_t shared;
    int cluster;
    int device;
    Room room;
  };
  static std::mutex mutex;
  static std::vector<Entry> entries;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry& entry : entries) {
    if (entry.kernel == kernel && entry.threads == threads && entry.shared == shared && entry.cluster == cluster &&
        entry.device == device) {
      room = entry.room;
      return cudaSuccess;
    }
  }
  if (const cudaError_t error = shared_limit_of(device, room.shared_limit); error != cudaSuccess) return error;
  if (shared > room.shared_limit) return cudaErrorInvalidConfiguration;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(room.shared_limit));
  if (error != cudaSuccess) return error;
  int processors = 0, of_processor = 0;
  cudaFuncAttributes attributes = {};
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_processor, kernel, threads, static_cast<size_t>(shared));
  if (error != cudaSuccess) return error;
  room.blocks = room.clusters = static_cast<int64_t>(processors) * of_processor;
  room.is_for_sm_90 = attributes.ptxVersion >= 90;
  if (cluster > 1 && room.is_for_sm_90) {
    cudaLaunchAttribute attribute = clusters_of(cluster);
    cudaLaunchConfig_t config = launch_config(dim3(static_cast<unsigned>(cluster)), threads, shared, nullptr);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return error;
    room.clusters = clusters;
  }
  entries.push_back({kernel, threads, shared, cluster, device, room});
  return cudaSuccess;
}

// Puts a kernel on the stream. The error returned is that of the launch; later ones are reported by the next call.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int64_t shared, LaunchOptions options,
                   cudaStream_t stream, Parameters... parameters) {
  cudaLaunchConfig_t config = launch_config(blocks, threads, shared, stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (options.cluster > 1) attributes[config.numAttrs++] = clusters_of(options.cluster);
  if (options.early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

}  // namespace dspa::cuda
