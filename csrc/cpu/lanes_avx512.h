// 16 float32 lanes in one 512-bit register.
#pragma once

#include <immintrin.h>

#include "../common/dtype.h"

namespace dspa::cpu::avx512 {

struct Lanes {
  __m512 all;
};

DSPA_INLINE Lanes zero() { return {_mm512_setzero_ps()}; }

DSPA_INLINE Lanes broadcast(float value) { return {_mm512_set1_ps(value)}; }

DSPA_INLINE Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }

DSPA_INLINE void store(float* to, const Lanes& value) { _mm512_storeu_ps(to, value.all); }

DSPA_INLINE Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& sum) {
  return {_mm512_fmadd_ps(a.all, b.all, sum.all)};
}

DSPA_INLINE float total(const Lanes& value) {
  const __m256 upper = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(value.all), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(value.all), upper);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

DSPA_INLINE void widen_bfloat16(const char* from, Lanes& even, Lanes& odd) {
  const __m512i pairs = _mm512_loadu_si512(from);
  even.all = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd.all = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

DSPA_INLINE __m512 widen_sixteen(const char* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

DSPA_INLINE void widen_float16(const char* from, Lanes& low, Lanes& high) {
  low.all = widen_sixteen(from);
  high.all = widen_sixteen(from + 32);
}

// 32 codes as 16-bit words, and sums of their products.
struct Words {
  __m512i all;
};
struct Counts {
  __m512i all;
};

DSPA_INLINE Counts no_counts() { return {_mm512_setzero_si512()}; }

DSPA_INLINE Words widen_codes(const int8_t* from) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}

DSPA_INLINE Counts add_products(const Words& codes, const int16_t* token, const Counts& sum) {
  return {_mm512_add_epi32(sum.all, _mm512_madd_epi16(codes.all, _mm512_loadu_si512(token)))};
}

DSPA_INLINE int64_t total(const Counts& counts) {
  const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(counts.all));
  const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(counts.all, 1));
  return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
}

// Rows by tokens that are multiplied at a time: 8 sums or more hide the latency of a multiply-add, 32 registers hold
// 16 of them and all operands.
constexpr int rows_for(int tokens) { return tokens <= 2 ? 8 : 4; }
constexpr int tokens_at_once = 4;

}  // namespace dspa::cpu::avx512
