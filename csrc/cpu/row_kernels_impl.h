// The inner loops over 16 float32 lanes in `parts` registers, included once per instruction set with DSPA_ISA naming its namespace.
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
  DSPA_INLINE void widen(const char* from, int part, Part& first, Part& second) {
    first = load_part(reinterpret_cast<const float*>(from), part);
    second = load_part(reinterpret_cast<const float*>(from) + chunk / 2, part);
  }
};

struct BFloat16 {
  static constexpr int64_t bytes = 2;
  DSPA_INLINE void widen(const char* from, int part, Part& first, Part& second) {
    widen_bfloat16(from, part, first, second);
  }
};

struct Float16 {
  static constexpr int64_t bytes = 2;
  DSPA_INLINE void widen(const char* from, int part, Part& first, Part& second) {
    widen_float16(from, part, first, second);
  }
};

// What a tile fetches into the cache while it computes: its R rows from `first` on, bytes `at` to `end` of each,
// `bytes_fetched` at a time and `pause` times as slowly as it reads its own. Null: nothing.
struct Ahead {
  const char* first = nullptr;
  int64_t row_bytes = 0;
  int64_t at = 0, end = 0;
  int64_t pause = 1 << 20;
};

constexpr int64_t bytes_fetched = 128;

// What token tile `index` of `count` fetches of the rows from `first` on: each an equal part.
DSPA_INLINE Ahead ahead_of(const char* first, int64_t row_bytes, int64_t index, int64_t count) {
  if (first == nullptr) return {};
  const int64_t share = (row_bytes / count + bytes_fetched - 1) / bytes_fetched * bytes_fetched;
  const int64_t at = index * share;
  return {first, row_bytes, at, at + share < row_bytes ? at + share : row_bytes, count};
}

template <int R>
DSPA_INLINE void fetch(Ahead& ahead) {
  if (ahead.at >= ahead.end) return;
  const char* from = ahead.first + ahead.at;
  for (int r = 0; r < R; ++r)
    for (int64_t line = 0; line < bytes_fetched; line += 64) __builtin_prefetch(from + r * ahead.row_bytes + line);
  ahead.at += bytes_fetched;
}

// `body(column)` for each `step` columns of `columns`, a multiple of it, with what is fetched meanwhile. The inner loop
// knows nothing of the latter, which keeps its registers free.
template <int R, int64_t step, class Body>
DSPA_INLINE void for_each_column(int64_t columns, int64_t element_bytes, Ahead ahead, const Body& body) {
  const int64_t stride = bytes_fetched / element_bytes * ahead.pause;
  for (int64_t column = 0; column < columns;) {
    fetch<R>(ahead);
    const int64_t until = column + stride < columns ? column + stride : columns;
    for (; column < until; column += step) body(column);
  }
}

// One chunk of R rows for T tokens.
template <class Element, int R, int T>
DSPA_INLINE void add_products(const char* const (&chunks)[R], const float* const (&tokens)[T], int64_t column,
                              Part (&sums)[parts][R][T]) {
  unrolled<parts>(DSPA_EACH(p) {
    Part first[R], second[R];
    unrolled<R>(DSPA_EACH(r) { Element::widen(chunks[r], p, first[r], second[r]); });
    unrolled<T>(DSPA_EACH(t) {
      Part token = load_part(tokens[t] + column, p);
      keep(token);
      unrolled<R>(DSPA_EACH(r) {
        sums[p][r][t] = multiply_add(first[r], token, sums[p][r][t]);
        keep(sums[p][r][t]);
      });
    });
    unrolled<T>(DSPA_EACH(t) {
      Part token = load_part(tokens[t] + column + chunk / 2, p);
      keep(token);
      unrolled<R>(DSPA_EACH(r) {
        sums[p][r][t] = multiply_add(second[r], token, sums[p][r][t]);
        keep(sums[p][r][t]);
      });
    });
  });
}

// out[t * out_stride + r] = rows[r] . tokens[t]
template <class Element, int R, int T>
void product_tile(const char* const* rows, const Ahead& ahead, const float* const* tokens, int64_t columns, float* out,
                  int64_t out_stride) {
  Part sums[parts][R][T];
  const float* token[T];
  const char* chunks[R];
  unrolled<T>(DSPA_EACH(t) {
    token[t] = tokens[t];
    unrolled<R>(DSPA_EACH(r) { unrolled<parts>(DSPA_EACH(p) { sums[p][r][t] = no_part(); }); });
  });

  const int64_t column = columns / chunk * chunk;
  for_each_column<R, chunk>(column, Element::bytes, ahead, DSPA_EACH(at) {
    unrolled<R>(DSPA_EACH(r) { chunks[r] = rows[r] + at * Element::bytes; });
    add_products<Element, R, T>(chunks, token, at, sums);
  });
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
    unrolled<T>(DSPA_EACH(t) {
      Part all[parts];
      unrolled<parts>(DSPA_EACH(p) { all[p] = sums[p][r][t]; });
      out[t * out_stride + r] = total(all);
    });
  });
}

// The tile of R rows for `tokens` tokens, at most T.
template <class Element, int R, int T>
void product_tile_of(const char* const* rows, const Ahead& ahead, const float* const* tokens, int64_t token_count,
                     int64_t columns, float* out, int64_t out_stride) {
  if constexpr (T > 1)
    if (token_count < T)
      return product_tile_of<Element, R, T - 1>(rows, ahead, tokens, token_count, columns, out, out_stride);
  product_tile<Element, R, T>(rows, ahead, tokens, columns, out, out_stride);
}

// Calls `tile(first_row, rows, first_token, tokens, ahead)`, R rows and at most T tokens at a time. The tokens of a tile
// stay in the nearest cache while some tens of rows go by; these stay in the next one, which meanwhile receives the rows
// that follow, so that memory is read evenly all the time.
template <int R, int T, class Tile>
DSPA_INLINE void for_each_tile(const char* rows, int64_t row_bytes, int64_t count, const char* upcoming,
                               int64_t token_count, const Tile& tile) {
  const int64_t fitting = bytes_at_once / row_bytes / R * R;
  const int64_t rows_at_once = token_count <= T || fitting < R ? R : fitting;
  const int64_t token_tiles = (token_count + T - 1) / T;
  const int64_t least = token_count / token_tiles, larger = token_count % token_tiles;
  for (int64_t r = 0; r < count; r += rows_at_once) {
    const int64_t end = r + rows_at_once < count ? r + rows_at_once : count;
    int64_t t = 0;
    for (int64_t index = 0; index < token_tiles; ++index) {
      const int64_t tokens = least + (index < larger ? 1 : 0);
      int64_t row = r;
      for (; row + R <= end; row += R) {
        const char* next = row + rows_at_once + R <= count ? rows + (row + rows_at_once) * row_bytes
                           : upcoming != nullptr           ? upcoming + (row - r) * row_bytes
                                                           : nullptr;
        tile(std::integral_constant<int, R>{}, row, t, tokens, ahead_of(next, row_bytes, index, token_tiles));
      }
      for (; row < end; ++row) tile(std::integral_constant<int, 1>{}, row, t, tokens, Ahead{});
      t += tokens;
    }
  }
}

template <class Element, int R, int T>
void products_in_tiles(const Matrix& W, int64_t first, int64_t count, const char* upcoming, const float* const* tokens,
                       int64_t token_count, float* out, int64_t out_stride) {
  for_each_tile<R, T>(W.row(first), W.row_bytes(), count, upcoming, token_count,
                      [&](auto rows_of_tile, int64_t row, int64_t t, int64_t tile_tokens, const Ahead& ahead)
                          __attribute__((always_inline)) {
                            constexpr int tile_rows = rows_of_tile;
                            const char* rows[tile_rows];
                            for (int i = 0; i < tile_rows; ++i) rows[i] = W.row(first + row + i);
                            product_tile_of<Element, tile_rows, T>(rows, ahead, tokens + t, tile_tokens, W.columns,
                                                                      out + t * out_stride + row, out_stride);
                          });
}

template <class Element>
void products_of(const Matrix& W, int64_t first, int64_t count, const char* upcoming, const float* const* tokens,
                 int64_t token_count, float* out, int64_t out_stride) {
  if (token_count == 1)
    products_in_tiles<Element, rows_for_one, 1>(W, first, count, upcoming, tokens, 1, out, out_stride);
  else
    products_in_tiles<Element, rows_for_tokens, tokens_at_once>(W, first, count, upcoming, tokens, token_count, out,
                                                                out_stride);
}

// Products of the codes of R rows with those of T tokens.
template <int R, int T>
void code_tile(const int8_t* codes, int64_t row_size, const Ahead& ahead, const int16_t* const* tokens, float* out,
               int64_t out_stride) {
  Counts sums[R][T];
  const int16_t* token[T];
  unrolled<T>(DSPA_EACH(t) {
    token[t] = tokens[t];
    unrolled<R>(DSPA_EACH(r) { sums[r][t] = no_counts(); });
  });
  for_each_column<R, words_at_once>(row_size, 1, ahead, DSPA_EACH(column) {
    Words words[R];
    unrolled<R>(DSPA_EACH(r) { words[r] = widen_codes(codes + r * row_size + column); });
    unrolled<T>(DSPA_EACH(t) {
      Words factor = load_words(token[t] + column);
      keep(factor);
      unrolled<R>(DSPA_EACH(r) {
        sums[r][t] = add_products(words[r], factor, sums[r][t]);
        keep(sums[r][t]);
      });
    });
  });
  unrolled<R>(DSPA_EACH(r) {
    unrolled<T>(DSPA_EACH(t) { out[t * out_stride + r] = static_cast<float>(total(sums[r][t])); });
  });
}

template <int R, int T>
void code_tile_of(const int8_t* codes, int64_t row_size, const Ahead& ahead, const int16_t* const* tokens,
                  int64_t token_count, float* out, int64_t out_stride) {
  if constexpr (T > 1)
    if (token_count < T)
      return code_tile_of<R, T - 1>(codes, row_size, ahead, tokens, token_count, out, out_stride);
  code_tile<R, T>(codes, row_size, ahead, tokens, out, out_stride);
}

template <int R, int T>
void code_products_in_tiles(const int8_t* codes, int64_t row_size, int64_t count, const int8_t* upcoming,
                            const int16_t* const* tokens, int64_t token_count, float* out, int64_t out_stride) {
  for_each_tile<R, T>(reinterpret_cast<const char*>(codes), row_size, count, reinterpret_cast<const char*>(upcoming),
                      token_count,
                      [&](auto rows_of_tile, int64_t row, int64_t t, int64_t tile_tokens, const Ahead& ahead)
                          __attribute__((always_inline)) {
                            code_tile_of<rows_of_tile, T>(codes + row * row_size, row_size, ahead, tokens + t,
                                                          tile_tokens, out + t * out_stride + row, out_stride);
                          });
}

void code_products(const int8_t* codes, int64_t row_size, int64_t count, const int8_t* upcoming,
                   const int16_t* const* tokens, int64_t token_count, float* out, int64_t out_stride) {
  if (token_count == 1)
    code_products_in_tiles<rows_for_one, 1>(codes, row_size, count, upcoming, tokens, 1, out, out_stride);
  else if (token_count == 2)
    code_products_in_tiles<rows_for_one, 2>(codes, row_size, count, upcoming, tokens, 2, out, out_stride);
  else
    code_products_in_tiles<code_rows_for_tokens, code_tokens_at_once>(codes, row_size, count, upcoming, tokens,
                                                                      token_count, out, out_stride);
}

template <class Element>
void gathered_products_of(const Matrix& W, const int32_t* latents, int64_t count, const float* token, float* out) {
  constexpr int R = rows_for_one;
  int64_t r = 0;
  for (; r + R <= count; r += R) {
    const char* rows[R];
    for (int i = 0; i < R; ++i) rows[i] = W.row(latents[r + i]);
    product_tile<Element, R, 1>(rows, Ahead{}, &token, W.columns, out + r, 0);
  }
  for (; r < count; ++r) {
    const char* row = W.row(latents[r]);
    product_tile<Element, 1, 1>(&row, Ahead{}, &token, W.columns, out + r, 0);
  }
}

// One chunk of R rows, added one after the other.
template <class Element, int R>
DSPA_INLINE void add_chunk(const char* const (&from)[R], const Part (&factors)[R], float* sum) {
  unrolled<parts>(DSPA_EACH(p) {
    Part even = load_part(sum, p), odd = load_part(sum + chunk / 2, p);
    unrolled<R>(DSPA_EACH(r) {
      Part first, second;
      Element::widen(from[r], p, first, second);
      even = multiply_add(factors[r], first, even);
      odd = multiply_add(factors[r], second, odd);
    });
    store_part(sum, p, even);
    store_part(sum + chunk / 2, p, odd);
  });
}

// R rows from `column` on, fetching the same columns of the rows `ahead` into the cache if it is not null.
template <class Element, int R>
DSPA_INLINE void add_rows_tile(const Matrix& W, const int32_t* rows, const int32_t* ahead, const float* coefficients,
                               int64_t column, int64_t columns, float* sum) {
  Part factors[R];
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
