// 16 float32 lanes for any processor; the compiler maps the loops to what it has (NEON on aarch64).
#pragma once

#include <cmath>

#include "../common/dtype.h"

namespace dspa::cpu::portable {

struct Lanes {
  float lane[16];
};

constexpr int parts = 1;
using Part = Lanes;

template <class Value>
DSPA_INLINE void keep(Value&) {}

DSPA_INLINE Part no_part() { return {}; }

DSPA_INLINE Part broadcast(float value) {
  Part out;
  for (float& lane : out.lane) lane = value;
  return out;
}

DSPA_INLINE Part load_part(const float* from, int) {
  Part out;
  std::memcpy(out.lane, from, sizeof out.lane);
  return out;
}

DSPA_INLINE void store_part(float* to, int, const Part& value) { std::memcpy(to, value.lane, sizeof value.lane); }

DSPA_INLINE Part multiply_add(const Part& a, const Part& b, const Part& sum) {
  Part out;
  for (int l = 0; l < 16; ++l) {
#if defined(__FMA__) || defined(__aarch64__)
    out.lane[l] = __builtin_fmaf(a.lane[l], b.lane[l], sum.lane[l]);
#else
    out.lane[l] = sum.lane[l] + a.lane[l] * b.lane[l];  // the product of two bfloat16 is exact even so
#endif
  }
  return out;
}

DSPA_INLINE float total(const Part (&sums)[parts]) {
  float sum[8];
  for (int l = 0; l < 8; ++l) sum[l] = sums[0].lane[l] + sums[0].lane[l + 8];
  for (int l = 0; l < 4; ++l) sum[l] += sum[l + 4];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

DSPA_INLINE void widen_bfloat16(const char* from, int, Part& even, Part& odd) {
  uint16_t bits[32];
  std::memcpy(bits, from, sizeof bits);
  for (int l = 0; l < 16; ++l) {
    even.lane[l] = float_of_bfloat16(bits[2 * l]);
    odd.lane[l] = float_of_bfloat16(bits[2 * l + 1]);
  }
}

DSPA_INLINE void widen_float16(const char* from, int, Part& low, Part& high) {
  uint16_t bits[32];
  std::memcpy(bits, from, sizeof bits);
  for (int l = 0; l < 16; ++l) {
    low.lane[l] = float_of_float16(bits[l]);
    high.lane[l] = float_of_float16(bits[16 + l]);
  }
}

// 32 codes as 16-bit words, and sums of their products.
constexpr int64_t words_at_once = 32;
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

DSPA_INLINE Words load_words(const int16_t* from) {
  Words out;
  std::memcpy(out.word, from, sizeof out.word);
  return out;
}

DSPA_INLINE Counts add_products(const Words& codes, const Words& token, const Counts& sum) {
  Counts out = sum;
  for (int i = 0; i < 32; ++i) out.lane[i % 8] += static_cast<int32_t>(codes.word[i]) * token.word[i];
  return out;
}

DSPA_INLINE int64_t total(const Counts& counts) {
  int64_t sum = 0;
  for (int32_t lane : counts.lane) sum += lane;
  return sum;
}

// Rows by tokens that are multiplied at a time.
constexpr int rows_for_one = 2;
constexpr int rows_for_tokens = 1, tokens_at_once = 2;
constexpr int code_rows_for_tokens = 1, code_tokens_at_once = 2;
constexpr int64_t bytes_at_once = 128 * 1024;  // of rows, a fraction of the second-level cache

}  // namespace dspa::cpu::portable
