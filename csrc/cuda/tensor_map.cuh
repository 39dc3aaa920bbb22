// Matrices in memory as the copy engine of sm_90 sees them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dspa::cuda {

using TensorMap = CUtensorMap;

// Where copies of `box_rows` rows by `box_columns` columns of 16 bits come from. In shared memory a row of a box is 128
// bytes, whose pieces of 16 are permuted as `swizzled_rows` says. Past the last row or column there are zeros. The
// address and the stride, in numbers, must be multiples of 16 bytes.
inline cudaError_t map_rows(TensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t row_stride,
                            uint32_t box_rows) {
  constexpr uint32_t box_columns = 64;
  void* encode = nullptr;  // of the driver, which is not linked against; nullptr if it is too old
  cudaDriverEntryPointQueryResult result;
  static_cast<void>(
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &result));
  if (encode == nullptr) return cudaErrorUnknown;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[2] = {box_columns, box_rows}, steps[2] = {1, 1};
  const CUresult error = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? cudaSuccess : cudaErrorUnknown;
}

}  // namespace dspa::cuda
