// The inner loops, compiled once per instruction set; `row_kernels()` returns those for this processor.
//
// A product is always summed in one order: 16 partial sums, each of two elements of every chunk of 32, then a fixed
// tree. It does not depend on the other rows or tokens of a call, so every mode and batch sees the same bits.
#pragma once

#include <cstdint>
#include <utility>

#include "../common/sae.h"

namespace dspa::cpu {

inline constexpr int64_t chunk = 32;  // elements

DSPA_INLINE int64_t packed_size(int64_t columns) { return (columns + chunk - 1) / chunk * chunk; }

// Position of an element in a packed vector. Packed vectors are zero-padded to whole chunks; for bfloat16 rows the even
// elements of a chunk come before the odd ones, because that is how a register of pairs widens fastest.
DSPA_INLINE int64_t packed_position(Dtype row_dtype, int64_t index) {
  if (row_dtype != Dtype::bfloat16) return index;
  const int64_t within = index % chunk;
  return index - within + (within & 1) * (chunk / 2) + within / 2;
}

struct RowKernels {
  const char* name;

  // out[t * out_stride + r] = W[first + r] . tokens[t]   for r < count, t < token_count; tokens packed.
  // Prefetches `upcoming`, the rows that this thread reads next, if it is not null.
  void (*products)(const Matrix& W, int64_t first, int64_t count, const char* upcoming, const float* const* tokens,
                   int64_t token_count, float* out, int64_t out_stride);

  // out[r] = W[latents[r]] . token
  void (*gathered_products)(const Matrix& W, const int32_t* latents, int64_t count, const float* token, float* out);

  // out[t * out_stride + r] = codes[r] . tokens[t], exact but for the last rounding to float32. A row of codes takes
  // `row_size` bytes, a multiple of 32; tokens are as long.
  void (*code_products)(const int8_t* codes, int64_t row_size, int64_t count, const int8_t* upcoming,
                        const int16_t* const* tokens, int64_t token_count, float* out, int64_t out_stride);

  // sum[c] += coefficients[i] * W[rows[i]][first_column + c] for c < columns, i = 0 .. count - 1 in this order; sum
  // packed. `first_column` is a multiple of a chunk. Every element is a chain of its own: it does not matter to it
  // which columns, or how many rows, a call adds.
  void (*add_rows)(const Matrix& W, const int32_t* rows, const float* coefficients, int64_t count, int64_t first_column,
                   int64_t columns, float* sum);

  // Products to scores, in place: the activation f, or z for topk, where f depends on the ranks.
  void (*scores)(const Sae& sae, int64_t first, int64_t count, float* products);

  // Largest of `count` scores and 0; NaNs are passed over.
  float (*maximum)(const float* scores, int64_t count);

  // How many scores are above `bound`, or at least `bound`.
  int64_t (*count_above)(const float* scores, int64_t count, float bound);
  int64_t (*count_at_least)(const float* scores, int64_t count, float bound);

  // counts[i] += 1 where scores[i] is positive.
  void (*count_positive)(const float* scores, int64_t count, int32_t* counts);

  // Exclusive or of `bytes`, a multiple of 256: reading and nothing else.
  uint64_t (*fold)(const char* data, int64_t bytes);
};

const RowKernels& row_kernels();

}  // namespace dspa::cpu
