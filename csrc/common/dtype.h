// Storage dtypes and their conversion from and to float32, one value at a time, on any processor.
#pragma once

#include <cstdint>
#include <cstring>

// Code that is compiled for several instruction sets must emit no symbol that the linker could pick for another set.
#define DSPA_INLINE static inline __attribute__((always_inline))
#define DSPA_INLINE_MEMBER inline __attribute__((always_inline))

namespace dspa {

enum class Dtype { float32, bfloat16, float16 };

DSPA_INLINE int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

DSPA_INLINE float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DSPA_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

DSPA_INLINE bool is_finite(float value) { return (bits_of_float(value) & 0x7f800000u) != 0x7f800000u; }

DSPA_INLINE float float_of_bfloat16(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

DSPA_INLINE float float_of_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in float32
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 0x1fu ? 0xffu : exponent + (127 - 15);
  return float_of_bits(sign | (wide_exponent << 23) | (fraction << 13));
}

// Round to nearest, ties to even; a NaN stays a NaN.
DSPA_INLINE uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Round to nearest, ties to even; a NaN stays a NaN.
DSPA_INLINE uint16_t float16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to Inf
  if (magnitude >= 0x38800000u) {                                             // normal in float16
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
  // Subnormal: adding 0.5 aligns the last kept bit with the last bit of the sum, which rounds as it should.
  const float shifted = float_of_bits(magnitude) + 0.5f;
  return static_cast<uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u));
}

DSPA_INLINE float load_element(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::float32) {
    return static_cast<const float*>(data)[index];
  }
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == Dtype::bfloat16 ? float_of_bfloat16(bits) : float_of_float16(bits);
}

DSPA_INLINE void store_element(void* data, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::float32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] = dtype == Dtype::bfloat16 ? bfloat16_of_float(value) : float16_of_float(value);
  }
}

}  // namespace dspa
