// 16 float32 lanes in two 256-bit registers.
#pragma once

#include <immintrin.h>

#include "../common/dtype.h"

namespace dspa::cpu::avx2 {

constexpr int parts = 2;
using Part = __m256;

// Keeps a value in a register of its own: GCC would load a token again for every row, and copy sums about.
DSPA_INLINE void keep(Part& value) { asm("" : "+x"(value)); }

DSPA_INLINE Part no_part() { return _mm256_setzero_ps(); }

DSPA_INLINE Part broadcast(float value) { return _mm256_set1_ps(value); }

DSPA_INLINE Part load_part(const float* from, int part) { return _mm256_loadu_ps(from + 8 * part); }

DSPA_INLINE void store_part(float* to, int part, Part value) { _mm256_storeu_ps(to + 8 * part, value); }

DSPA_INLINE Part multiply_add(Part a, Part b, Part sum) { return _mm256_fmadd_ps(a, b, sum); }

DSPA_INLINE float total(const Part (&sums)[parts]) {
  const __m256 eight = _mm256_add_ps(sums[0], sums[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

DSPA_INLINE __m256i load_bits(const char* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

DSPA_INLINE void widen_bfloat16(const char* from, int part, Part& even, Part& odd) {
  const __m256i pairs = load_bits(from + 32 * part);
  even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

DSPA_INLINE __m256 widen_eight(const char* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

DSPA_INLINE void widen_float16(const char* from, int part, Part& low, Part& high) {
  low = widen_eight(from + 16 * part);
  high = widen_eight(from + 32 + 16 * part);
}

// 16 codes as 16-bit words, and sums of their products.
constexpr int64_t words_at_once = 16;
struct Words {
  __m256i all;
};
struct Counts {
  __m256i all;
};

DSPA_INLINE void keep(Words& value) { asm("" : "+x"(value.all)); }
DSPA_INLINE void keep(Counts& value) { asm("" : "+x"(value.all)); }

DSPA_INLINE Counts no_counts() { return {_mm256_setzero_si256()}; }

DSPA_INLINE Words widen_codes(const int8_t* from) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}

DSPA_INLINE Words load_words(const int16_t* from) { return {load_bits(reinterpret_cast<const char*>(from))}; }

DSPA_INLINE Counts add_products(const Words& codes, const Words& token, const Counts& sum) {
  return {_mm256_add_epi32(sum.all, _mm256_madd_epi16(codes.all, token.all))};
}

DSPA_INLINE int64_t total(const Counts& counts) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), counts.all);
  int64_t sum = 0;
  for (int32_t lane : lanes) sum += lane;
  return sum;
}

// Rows by tokens that are multiplied at a time: sums, widened rows and a token must fit 16 registers.
constexpr int rows_for_one = 4;
constexpr int rows_for_tokens = 2, tokens_at_once = 2;
constexpr int code_rows_for_tokens = 2, code_tokens_at_once = 6;
constexpr int64_t bytes_at_once = 128 * 1024;  // of rows, a quarter of the smallest second-level cache

}  // namespace dspa::cpu::avx2
