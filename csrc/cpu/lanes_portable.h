// 16 float32 lanes for any processor; the compiler maps the loops to what it has (NEON on aarch64).
#pragma once

#include <cmath>

#include "../common/dtype.h"

namespace dspa::cpu::portable {

struct Lanes {
  float lane[16];
};

DSPA_INLINE Lanes zero() { return {}; }

DSPA_INLINE Lanes broadcast(float value) {
  Lanes out;
  for (float& lane : out.lane) lane = value;
  return out;
}

DSPA_INLINE Lanes load(const float* from) {
  Lanes out;
  std::memcpy(out.lane, from, sizeof out.lane);
  return out;
}

DSPA_INLINE void store(float* to, const Lanes& value) { std::memcpy(to, value.lane, sizeof value.lane); }

DSPA_INLINE Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& sum) {
  Lanes out;
  for (int l = 0; l < 16; ++l) {
#if defined(__FMA__) || defined(__aarch64__)
    out.lane[l] = __builtin_fmaf(a.lane[l], b.lane[l], sum.lane[l]);
#else
    out.lane[l] = sum.lane[l] + a.lane[l] * b.lane[l];  // the product of two bfloat16 is exact even so
#endif
  }
  return out;
}

DSPA_INLINE float total(const Lanes& value) {
  float sum[8];
  for (int l = 0; l < 8; ++l) sum[l] = value.lane[l] + value.lane[l + 8];
  for (int l = 0; l < 4; ++l) sum[l] += sum[l + 4];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

DSPA_INLINE void widen_bfloat16(const char* from, Lanes& even, Lanes& odd) {
  uint16_t bits[32];
  std::memcpy(bits, from, sizeof bits);
  for (int l = 0; l < 16; ++l) {
    even.lane[l] = float_of_bfloat16(bits[2 * l]);
    odd.lane[l] = float_of_bfloat16(bits[2 * l + 1]);
  }
}

DSPA_INLINE void widen_float16(const char* from, Lanes& low, Lanes& high) {
  uint16_t bits[32];
  std::memcpy(bits, from, sizeof bits);
  for (int l = 0; l < 16; ++l) {
    low.lane[l] = float_of_float16(bits[l]);
    high.lane[l] = float_of_float16(bits[16 + l]);
  }
}

// 32 codes as 16-bit words, and sums of their products.
struct Words {
  int16_t word[32];
};
struct Counts {
  int32_t lane[8];
};

DSPA_INLINE Counts no_counts() { return {}; }

DSPA_INLINE Words widen_codes(const int8_t* from) {
  Words out;
  for (int i = 0; i < 32; ++i) out.word[i] = from[i];
  return out;
}

DSPA_INLINE Counts add_products(const Words& codes, const int16_t* token, const Counts& sum) {
  Counts out = sum;
  for (int i = 0; i < 32; ++i) out.lane[i % 8] += static_cast<int32_t>(codes.word[i]) * token[i];
  return out;
}

DSPA_INLINE int64_t total(const Counts& counts) {
  int64_t sum = 0;
  for (int32_t lane : counts.lane) sum += lane;
  return sum;
}

// Rows by tokens that are multiplied at a time.
constexpr int rows_for(int tokens) { return tokens == 1 ? 2 : 1; }
constexpr int tokens_at_once = 2;

}  // namespace dspa::cpu::portable
