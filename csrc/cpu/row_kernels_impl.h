// The inner loops over `Lanes`, included once per instruction set with DSPA_ISA naming its namespace.
// Nothing here may call a function template of the standard library: the linker would keep one copy of it, possibly
// this one, for processors that cannot run it.

namespace dspa::cpu::DSPA_ISA {

template <class Body, int... I>
DSPA_INLINE void unrolled(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

// `body(i)` for i = 0 .. N - 1, each i a constant: arrays indexed by constants alone live in registers.
template <int N, class Body>
DSPA_INLINE void unrolled(const Body& body) {
  unrolled(body, std::make_integer_sequence<int, N>{});
}

#define DSPA_EACH(index) [&](auto index) __attribute__((always_inline))

struct Float32 {
  static constexpr int64_t bytes = 4;
  DSPA_INLINE void widen(const char* from, Lanes& first, Lanes& second) {
    first = load(reinterpret_cast<const float*>(from));
    second = load(reinterpret_cast<const float*>(from) + 16);
  }
};

struct BFloat16 {
  static constexpr int64_t bytes = 2;
  DSPA_INLINE void widen(const char* from, Lanes& first, Lanes& second) { widen_bfloat16(from, first, second); }
};

struct Float16 {
  static constexpr int64_t bytes = 2;
  DSPA_INLINE void widen(const char* from, Lanes& first, Lanes& second) { widen_float16(from, first, second); }
};

// One chunk of R rows for T tokens.
template <class Element, int R, int T>
DSPA_INLINE void add_products(const char* const (&chunks)[R], const float* const (&tokens)[T], int64_t column,
                              Lanes (&sums)[R][T]) {
  unrolled<R>(DSPA_EACH(r) {
    Lanes first, second;
    Element::widen(chunks[r], first, second);
    unrolled<T>(DSPA_EACH(t) {
      sums[r][t] = multiply_add(first, load(tokens[t] + column), sums[r][t]);
      sums[r][t] = multiply_add(second, load(tokens[t] + column + chunk / 2), sums[r][t]);
    });
  });
}

// out[t * out_stride + r] = rows[r] . tokens[t]. Fetches the rows `ahead` into the cache meanwhile, if it is not null.
template <class Element, int R, int T>
void product_tile(const char* const* rows, const char* const* ahead, const float* const* tokens, int64_t columns,
                  float* out, int64_t out_stride) {
  Lanes sums[R][T];
  const float* token[T];
  const char* chunks[R];
  unrolled<T>(DSPA_EACH(t) {
    token[t] = tokens[t];
    unrolled<R>(DSPA_EACH(r) { sums[r][t] = zero(); });
  });

  int64_t column = 0;
  for (; column + chunk <= columns; column += chunk) {
    unrolled<R>(DSPA_EACH(r) { chunks[r] = rows[r] + column * Element::bytes; });
    if (ahead != nullptr)
      for (int r = 0; r < R; ++r)
        for (int64_t line = 0; line < chunk * Element::bytes; line += 64)
          __builtin_prefetch(ahead[r] + column * Element::bytes + line);
    add_products<Element, R, T>(chunks, token, column, sums);
  }
  if (column < columns) {
    alignas(64) char tails[R][chunk * Element::bytes] = {};
    unrolled<R>(DSPA_EACH(r) {
      const int64_t rest = (columns - column) * Element::bytes;
      std::memcpy(tails[r], rows[r] + column * Element::bytes, static_cast<size_t>(rest));
      chunks[r] = tails[r];
    });
    add_products<Element, R, T>(chunks, token, column, sums);
  }
  unrolled<R>(DSPA_EACH(r) {
    unrolled<T>(DSPA_EACH(t) { out[t * out_stride + r] = total(sums[r][t]); });
  });
}

// R rows, T tokens at a time, the last few with fewer at a time. Reads ahead while the first tokens go by.
template <class Element, int R, int T>
void products_of_rows(const char* const* rows, const char* const* ahead, const float* const* tokens,
                      int64_t token_count, int64_t columns, float* out, int64_t out_stride) {
  int64_t t = 0;
  for (; t + T <= token_count; t += T) {
    product_tile<Element, R, T>(rows, ahead, tokens + t, columns, out + t * out_stride, out_stride);
    ahead = nullptr;
  }
  if constexpr (T > 1)
    if (t < token_count)
      products_of_rows<Element, R, T - 1>(rows, ahead, tokens + t, token_count - t, columns, out + t * out_stride,
                                          out_stride);
}

// Each row is read from memory once: for later tokens it is still in the nearest cache.
template <class Element, int R, int T>
void products_in_tiles(const Matrix& W, int64_t first, int64_t count, const char* upcoming, const float* const* tokens,
                       int64_t token_count, float* out, int64_t out_stride) {
  const int64_t row_bytes = W.row_bytes();
  int64_t r = 0;
  for (; r + R <= count; r += R) {
    const char* next = r + 2 * R <= count ? W.row(first + r + R) : upcoming;
    const char* rows[R];
    const char* ahead[R];
    for (int i = 0; i < R; ++i) {
      rows[i] = W.row(first + r + i);
      ahead[i] = next != nullptr ? next + i * row_bytes : nullptr;
    }
    products_of_rows<Element, R, T>(rows, next != nullptr ? ahead : nullptr, tokens, token_count, W.columns, out + r,
                                    out_stride);
  }
  for (; r < count; ++r) {
    const char* row = W.row(first + r);
    products_of_rows<Element, 1, T>(&row, nullptr, tokens, token_count, W.columns, out + r, out_stride);
  }
}

template <class Element>
void products_of(const Matrix& W, int64_t first, int64_t count, const char* upcoming, const float* const* tokens,
                 int64_t token_count, float* out, int64_t out_stride) {
  if (token_count == 1)
    products_in_tiles<Element, rows_for(1), 1>(W, first, count, upcoming, tokens, 1, out, out_stride);
  else if (token_count == 2)
    products_in_tiles<Element, rows_for(2), 2>(W, first, count, upcoming, tokens, 2, out, out_stride);
  else
    products_in_tiles<Element, rows_for(tokens_at_once), tokens_at_once>(W, first, count, upcoming, tokens, token_count,
                                                                         out, out_stride);
}

// Products of the codes of R rows with those of T tokens.
template <int R, int T>
void code_tile(const int8_t* codes, int64_t row_size, const int8_t* ahead, const int16_t* const* tokens, float* out,
               int64_t out_stride) {
  Counts sums[R][T];
  const int16_t* token[T];
  unrolled<T>(DSPA_EACH(t) {
    token[t] = tokens[t];
    unrolled<R>(DSPA_EACH(r) { sums[r][t] = no_counts(); });
  });
  for (int64_t column = 0; column < row_size; column += chunk) {
    if (ahead != nullptr && column % 64 == 0)
      for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * row_size + column);
    unrolled<R>(DSPA_EACH(r) {
      const Words words = widen_codes(codes + r * row_size + column);
      unrolled<T>(DSPA_EACH(t) { sums[r][t] = add_products(words, token[t] + column, sums[r][t]); });
    });
  }
  unrolled<R>(DSPA_EACH(r) {
    unrolled<T>(DSPA_EACH(t) { out[t * out_stride + r] = static_cast<float>(total(sums[r][t])); });
  });
}

template <int R, int T>
void code_products_of_rows(const int8_t* codes, int64_t row_size, const int8_t* ahead, const int16_t* const* tokens,
                           int64_t token_count, float* out, int64_t out_stride) {
  int64_t t = 0;
  for (; t + T <= token_count; t += T) {
    code_tile<R, T>(codes, row_size, ahead, tokens + t, out + t * out_stride, out_stride);
    ahead = nullptr;
  }
  if constexpr (T > 1)
    if (t < token_count)
      code_products_of_rows<R, T - 1>(codes, row_size, ahead, tokens + t, token_count - t, out + t * out_stride,
                                      out_stride);
}

template <int R, int T>
void code_products_in_tiles(const int8_t* codes, int64_t row_size, int64_t count, const int8_t* upcoming,
                            const int16_t* const* tokens, int64_t token_count, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + R <= count; r += R) {
    const int8_t* next = r + 2 * R <= count ? codes + (r + R) * row_size : upcoming;
    code_products_of_rows<R, T>(codes + r * row_size, row_size, next, tokens, token_count, out + r, out_stride);
  }
  for (; r < count; ++r)
    code_products_of_rows<1, T>(codes + r * row_size, row_size, nullptr, tokens, token_count, out + r, out_stride);
}

void code_products(const int8_t* codes, int64_t row_size, int64_t count, const int8_t* upcoming,
                   const int16_t* const* tokens, int64_t token_count, float* out, int64_t out_stride) {
  if (token_count == 1)
    code_products_in_tiles<rows_for(1), 1>(codes, row_size, count, upcoming, tokens, 1, out, out_stride);
  else
    code_products_in_tiles<rows_for(tokens_at_once), tokens_at_once>(codes, row_size, count, upcoming, tokens,
                                                                     token_count, out, out_stride);
}

template <class Element>
void gathered_products_of(const Matrix& W, const int32_t* latents, int64_t count, const float* token, float* out) {
  constexpr int R = rows_for(1);
  int64_t r = 0;
  for (; r + R <= count; r += R) {
    const char* rows[R];
    for (int i = 0; i < R; ++i) rows[i] = W.row(latents[r + i]);
    product_tile<Element, R, 1>(rows, nullptr, &token, W.columns, out + r, 0);
  }
  for (; r < count; ++r) {
    const char* row = W.row(latents[r]);
    product_tile<Element, 1, 1>(&row, nullptr, &token, W.columns, out + r, 0);
  }
}

// One chunk of R rows, added one after the other.
template <class Element, int R>
DSPA_INLINE void add_chunk(const char* const (&from)[R], const Lanes (&factors)[R], float* sum) {
  Lanes even = load(sum), odd = load(sum + chunk / 2);
  unrolled<R>(DSPA_EACH(r) {
    Lanes first, second;
    Element::widen(from[r], first, second);
    even = multiply_add(factors[r], first, even);
    odd = multiply_add(factors[r], second, odd);
  });
  store(sum, even);
  store(sum + chunk / 2, odd);
}

// R rows from `column` on, fetching the same columns of the rows `ahead` into the cache if it is not null.
template <class Element, int R>
DSPA_INLINE void add_rows_tile(const Matrix& W, const int32_t* rows, const int32_t* ahead, const float* coefficients,
                               int64_t column, int64_t columns, float* sum) {
  Lanes factors[R];
  const char* from[R];
  const char* next[R];
  const char* chunks[R];
  for (int r = 0; r < R; ++r) {
    factors[r] = broadcast(coefficients[r]);
    from[r] = W.row(rows[r]) + column * Element::bytes;
    next[r] = ahead == nullptr ? nullptr : W.row(ahead[r]) + column * Element::bytes;
  }
  int64_t at = 0;
  for (; at + chunk <= columns; at += chunk) {
    unrolled<R>(DSPA_EACH(r) { chunks[r] = from[r] + at * Element::bytes; });
    if (ahead != nullptr)
      for (int r = 0; r < R; ++r)
        for (int64_t line = 0; line < chunk * Element::bytes; line += 64)
          __builtin_prefetch(next[r] + at * Element::bytes + line);
    add_chunk<Element, R>(chunks, factors, sum + at);
  }
  if (at < columns) {
    alignas(64) char tails[R][chunk * Element::bytes] = {};
    unrolled<R>(DSPA_EACH(r) {
      std::memcpy(tails[r], from[r] + at * Element::bytes, static_cast<size_t>((columns - at) * Element::bytes));
      chunks[r] = tails[r];
    });
    add_chunk<Element, R>(chunks, factors, sum + at);
  }
}

template <class Element>
void add_rows_of(const Matrix& W, const int32_t* rows, const float* coefficients, int64_t count, int64_t first_column,
                 int64_t columns, float* sum) {
  constexpr int R = 4;
  int64_t i = 0;
  for (; i + R <= count; i += R) {
    const int32_t* ahead = i + 2 * R <= count ? rows + i + R : nullptr;
    add_rows_tile<Element, R>(W, rows + i, ahead, coefficients + i, first_column, columns, sum);
  }
  for (; i < count; ++i) add_rows_tile<Element, 1>(W, rows + i, nullptr, coefficients + i, first_column, columns, sum);
}

void products(const Matrix& W, int64_t first, int64_t count, const char* upcoming, const float* const* tokens,
              int64_t token_count, float* out, int64_t out_stride) {
  switch (W.dtype) {
    case Dtype::float32: return products_of<Float32>(W, first, count, upcoming, tokens, token_count, out, out_stride);
    case Dtype::bfloat16: return products_of<BFloat16>(W, first, count, upcoming, tokens, token_count, out, out_stride);
    case Dtype::float16: return products_of<Float16>(W, first, count, upcoming, tokens, token_count, out, out_stride);
  }
}

void gathered_products(const Matrix& W, const int32_t* latents, int64_t count, const float* token, float* out) {
  switch (W.dtype) {
    case Dtype::float32: return gathered_products_of<Float32>(W, latents, count, token, out);
    case Dtype::bfloat16: return gathered_products_of<BFloat16>(W, latents, count, token, out);
    case Dtype::float16: return gathered_products_of<Float16>(W, latents, count, token, out);
  }
}

void add_rows(const Matrix& W, const int32_t* rows, const float* coefficients, int64_t count, int64_t first_column,
              int64_t columns, float* sum) {
  switch (W.dtype) {
    case Dtype::float32: return add_rows_of<Float32>(W, rows, coefficients, count, first_column, columns, sum);
    case Dtype::bfloat16: return add_rows_of<BFloat16>(W, rows, coefficients, count, first_column, columns, sum);
    case Dtype::float16: return add_rows_of<Float16>(W, rows, coefficients, count, first_column, columns, sum);
  }
}

void scores(const Sae& sae, int64_t first, int64_t count, float* products) {
  const float* b_enc = sae.b_enc + first;
  const float* norm = sae.decoder_norm == nullptr ? nullptr : sae.decoder_norm + first;
  if (sae.activation == Activation::gated) {
    const float* scale = sae.magnitude_scale + first;
    const float* bias = sae.magnitude_bias + first;
    for (int64_t i = 0; i < count; ++i) {
      float gate = products[i] + b_enc[i];
      if (norm != nullptr) gate *= norm[i];
      const float magnitude = products[i] * scale[i] + bias[i];
      products[i] = gate > 0.0f && magnitude > 0.0f ? magnitude : 0.0f;
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) products[i] += b_enc[i];
  if (norm != nullptr)
    for (int64_t i = 0; i < count; ++i) products[i] *= norm[i];
  if (sae.activation == Activation::threshold) {
    const float* threshold = sae.threshold + first;
    for (int64_t i = 0; i < count; ++i)
      products[i] = ((products[i] > threshold[i]) & (products[i] > 0.0f)) ? products[i] : 0.0f;
  }
}

float maximum(const float* scores, int64_t count) {
  float best[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int l = 0; l < 16; ++l) best[l] = scores[i + l] > best[l] ? scores[i + l] : best[l];
  for (; i < count; ++i) best[0] = scores[i] > best[0] ? scores[i] : best[0];
  for (int l = 1; l < 16; ++l) best[0] = best[l] > best[0] ? best[l] : best[0];
  return best[0];
}

int64_t count_above(const float* scores, int64_t count, float bound) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += scores[i] > bound ? 1 : 0;
  return found;
}

int64_t count_at_least(const float* scores, int64_t count, float bound) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += scores[i] >= bound ? 1 : 0;
  return found;
}

void count_positive(const float* scores, int64_t count, int32_t* counts) {
  for (int64_t i = 0; i < count; ++i) counts[i] += scores[i] > 0.0f ? 1 : 0;
}

// Exclusive or of `bytes`, a multiple of 256, read as fast as this processor reads.
uint64_t fold(const char* data, int64_t bytes) {
  constexpr int words = 32;
  uint64_t sums[words] = {};
  for (int64_t offset = 0; offset < bytes; offset += 8 * words) {
    for (int64_t line = 0; line < 8 * words; line += 64) __builtin_prefetch(data + offset + 16 * 1024 + line);
    uint64_t values[words];
    std::memcpy(values, data + offset, sizeof values);
    for (int i = 0; i < words; ++i) sums[i] ^= values[i];
  }
  for (int i = 1; i < words; ++i) sums[0] ^= sums[i];
  return sums[0];
}

}  // namespace dspa::cpu::DSPA_ISA

#define DSPA_STRING_OF(name) #name
#define DSPA_NAME_OF(name) DSPA_STRING_OF(name)

namespace dspa::cpu {

extern const RowKernels DSPA_KERNELS;
const RowKernels DSPA_KERNELS{
    DSPA_NAME_OF(DSPA_ISA),
    DSPA_ISA::products,
    DSPA_ISA::gathered_products,
    DSPA_ISA::code_products,
    DSPA_ISA::add_rows,
    DSPA_ISA::scores,
    DSPA_ISA::maximum,
    DSPA_ISA::count_above,
    DSPA_ISA::count_at_least,
    DSPA_ISA::count_positive,
    DSPA_ISA::fold,
};

}  // namespace dspa::cpu
