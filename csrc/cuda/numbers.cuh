// Storage dtypes on the device: single values of hidden states, and 16 bytes of weights at a time.
#pragma once

#include "../common/dtype.h"
#include "ptx.cuh"

namespace dspa::cuda {


__device__ __forceinline__ bool finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

__device__ __forceinline__ float float_of_bfloat16(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float load_number(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::float32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == Dtype::bfloat16 ? float_of_bfloat16(bits) : ptx::float_of_float16(bits);
}

__device__ __forceinline__ void store_number(void* data, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::float32)
    static_cast<float*>(data)[index] = value;
  else
    static_cast<uint16_t*>(data)[index] =
        dtype == Dtype::bfloat16 ? ptx::bfloat16_of_float(value) : ptx::float16_of_float(value);
}

// How weights are stored: `per_load` of them in 16 bytes.

struct Float32 {
  using Storage = float;
  static constexpr int per_load = 4;
  static __device__ __forceinline__ float number(float stored) { return stored; }
  static __device__ __forceinline__ void unpack(const uint4& bits, float (&numbers)[4]) {
    numbers[0] = __uint_as_float(bits.x);
    numbers[1] = __uint_as_float(bits.y);
    numbers[2] = __uint_as_float(bits.z);
    numbers[3] = __uint_as_float(bits.w);
  }
};

struct Bfloat16 {
  using Storage = uint16_t;
  static constexpr int per_load = 8;
  static __device__ __forceinline__ float number(uint16_t stored) { return float_of_bfloat16(stored); }
  static __device__ __forceinline__ void unpack(const uint4& bits, float (&numbers)[8]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      numbers[2 * i] = __uint_as_float(words[i] << 16);
      numbers[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr int per_load = 8;
  static __device__ __forceinline__ float number(uint16_t stored) { return ptx::float_of_float16(stored); }
  static __device__ __forceinline__ void unpack(const uint4& bits, float (&numbers)[8]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      numbers[2 * i] = ptx::float_of_float16(static_cast<uint16_t>(words[i]));
      numbers[2 * i + 1] = ptx::float_of_float16(static_cast<uint16_t>(words[i] >> 16));
    }
  }
};

}  // namespace dspa::cuda
