// A stand-in for the header of CUDA's driver: the matrices that the copy engine sees.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
  const uint16_t* data = nullptr;
  int64_t rows = 0, columns = 0, row_stride = 0;
  uint32_t box_rows = 0;
};

// What is not as the kernels have it is an error.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0;
  if (rank != 2 || !aligned || sizes[0] == 0 || sizes[1] == 0 || box[0] != 64 || box[1] == 0 || box[1] > 256 ||
      steps[0] != 1 || steps[1] != 1 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B)
    return CUDA_ERROR_INVALID_VALUE;
  if (cuda_shim_call() != cudaSuccess) return CUDA_ERROR_INVALID_VALUE;
  map->data = static_cast<const uint16_t*>(data);
  map->columns = static_cast<int64_t>(sizes[0]);
  map->rows = static_cast<int64_t>(sizes[1]);
  map->row_stride = static_cast<int64_t>(strides[0] / 2);
  map->box_rows = box[1];
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool known = cuda_shim_call() == cudaSuccess;  // a driver that is too old is no failure
  *found = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
