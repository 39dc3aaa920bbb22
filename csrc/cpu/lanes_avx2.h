// 16 float32 lanes in two 256-bit registers.
#pragma once

#include <immintrin.h>

#include "../common/dtype.h"

namespace dspa::cpu::avx2 {

struct Lanes {
  __m256 low, high;
};

DSPA_INLINE Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

DSPA_INLINE Lanes broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

DSPA_INLINE Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

DSPA_INLINE void store(float* to, const Lanes& value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}

DSPA_INLINE Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& sum) {
  return {_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
}

DSPA_INLINE float total(const Lanes& value) {
  const __m256 eight = _mm256_add_ps(value.low, value.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

DSPA_INLINE __m256i load_bits(const char* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

DSPA_INLINE void widen_bfloat16(const char* from, Lanes& even, Lanes& odd) {
  const __m256i low = load_bits(from), high = load_bits(from + 32);
  const __m256i upper_half = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(low, upper_half)),
         _mm256_castsi256_ps(_mm256_and_si256(high, upper_half))};
}

DSPA_INLINE __m256 widen_eight(const char* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

DSPA_INLINE void widen_float16(const char* from, Lanes& low, Lanes& high) {
  low = {widen_eight(from), widen_eight(from + 16)};
  high = {widen_eight(from + 32), widen_eight(from + 48)};
}

// 32 codes as 16-bit words, and sums of their products.
struct Words {
  __m256i low, high;
};
struct Counts {
  __m256i all;
};

DSPA_INLINE Counts no_counts() { return {_mm256_setzero_si256()}; }

DSPA_INLINE __m256i widen_sixteen(const int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

DSPA_INLINE Words widen_codes(const int8_t* from) { return {widen_sixteen(from), widen_sixteen(from + 16)}; }

DSPA_INLINE Counts add_products(const Words& codes, const int16_t* token, const Counts& sum) {
  const char* from = reinterpret_cast<const char*>(token);
  const __m256i low = _mm256_madd_epi16(codes.low, load_bits(from));
  const __m256i high = _mm256_madd_epi16(codes.high, load_bits(from + 32));
  return {_mm256_add_epi32(sum.all, _mm256_add_epi32(low, high))};
}

DSPA_INLINE int64_t total(const Counts& counts) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), counts.all);
  int64_t sum = 0;
  for (int32_t lane : lanes) sum += lane;
  return sum;
}

// Rows by tokens that are multiplied at a time: sums, two widened registers and a token must fit 16 registers.
constexpr int rows_for(int tokens) { return tokens == 1 ? 4 : 2; }
constexpr int tokens_at_once = 2;

}  // namespace dspa::cpu::avx2
