// 16 float32 lanes in one 512-bit register.
#pragma once

#include <immintrin.h>

#include "../common/dtype.h"

namespace dspa::cpu::avx512 {

constexpr int parts = 1;
using Part = __m512;

// Keeps a value in a register of its own: GCC would load a token again for every row, and copy sums about.
DSPA_INLINE void keep(Part& value) { asm("" : "+v"(value)); }

DSPA_INLINE Part no_part() { return _mm512_setzero_ps(); }

DSPA_INLINE Part broadcast(float value) { return _mm512_set1_ps(value); }

DSPA_INLINE Part load_part(const float* from, int) { return _mm512_loadu_ps(from); }

DSPA_INLINE void store_part(float* to, int, Part value) { _mm512_storeu_ps(to, value); }

DSPA_INLINE Part multiply_add(Part a, Part b, Part sum) { return _mm512_fmadd_ps(a, b, sum); }

DSPA_INLINE float total(const Part (&sums)[parts]) {
  const __m256 upper = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(sums[0]), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sums[0]), upper);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

DSPA_INLINE void widen_bfloat16(const char* from, int, Part& even, Part& odd) {
  const __m512i pairs = _mm512_loadu_si512(from);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

DSPA_INLINE __m512 widen_sixteen(const char* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

DSPA_INLINE void widen_float16(const char* from, int, Part& low, Part& high) {
  low = widen_sixteen(from);
  high = widen_sixteen(from + 32);
}

// 32 codes as 16-bit words, and sums of their products.
constexpr int64_t words_at_once = 32;
struct Words {
  __m512i all;
};
struct Counts {
  __m512i all;
};

DSPA_INLINE void keep(Words& value) { asm("" : "+v"(value.all)); }
DSPA_INLINE void keep(Counts& value) { asm("" : "+v"(value.all)); }

DSPA_INLINE Counts no_counts() { return {_mm512_setzero_si512()}; }

DSPA_INLINE Words widen_codes(const int8_t* from) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}

DSPA_INLINE Words load_words(const int16_t* from) { return {_mm512_loadu_si512(from)}; }

DSPA_INLINE Counts add_products(const Words& codes, const Words& token, const Counts& sum) {
  return {_mm512_add_epi32(sum.all, _mm512_madd_epi16(codes.all, token.all))};
}

DSPA_INLINE int64_t total(const Counts& counts) {
  const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(counts.all));
  const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(counts.all, 1));
  return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
}

// Rows by tokens that are multiplied at a time: 8 sums or more hide the latency of a multiply-add, 32 registers hold
// them and all operands, and the tokens of a tile stay in the nearest cache.
constexpr int rows_for_one = 8;
constexpr int rows_for_tokens = 4, tokens_at_once = 3;
constexpr int code_rows_for_tokens = 4, code_tokens_at_once = 4;
constexpr int64_t bytes_at_once = 128 * 1024;  // of rows, a fraction of the second-level cache

}  // namespace dspa::cpu::avx512
