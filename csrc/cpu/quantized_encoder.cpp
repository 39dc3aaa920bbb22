#include "quantized_encoder.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "row_kernels.h"

namespace dspa::cpu {
namespace {

constexpr double largest_row_code = 127.0;
constexpr double largest_token_code = 8000.0;
constexpr double largest_norm = 1e30;     // far from where a float32 product could overflow
constexpr double slack = 1.0 + 0x1p-20;   // more than the few float32 roundings between a norm and a bound
constexpr float relative_slack = 0x1p-20f;
constexpr float absolute_slack = 1e-30f;  // more than all that underflow can take away

float rounded_up(double norm) { return static_cast<float>(norm * slack + 0x1p-126); }

// How far a float32 product may be from the true one, by the norms of its factors: one rounding for each multiplication
// and each addition along the longest chain of `RowKernels::products`.
double product_error(int64_t columns) {
  const double roundings = static_cast<double>(packed_size(columns)) / 16.0 * 2.0 + 5.0;
  const double unit = 0x1p-24;
  return roundings * unit / (1.0 - roundings * unit);
}

}  // namespace

void quantize_rows(const Matrix& W, int8_t* values, int64_t row_size, float* factors, const ThreadPool& pool) {
  const double inexact = product_error(W.columns);
  constexpr int64_t rows_per_task = 64;
  pool.for_each((W.rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    for (int64_t r = task * rows_per_task; r < std::min(W.rows, (task + 1) * rows_per_task); ++r) {
      float largest = 0.0f;
      for (int64_t i = 0; i < W.columns; ++i)
        largest = std::max(largest, std::fabs(load_element(W.row(r), W.dtype, i)));
      const float scale = static_cast<float>(largest / largest_row_code);
      double error = 0.0, size = 0.0, norm = 0.0;
      int8_t* row = values + r * row_size;
      for (int64_t i = 0; i < W.columns; ++i) {
        const double weight = load_element(W.row(r), W.dtype, i);
        const double wanted = scale > 0.0f ? std::nearbyint(weight / scale) : 0.0;
        const double code = std::clamp(wanted, -largest_row_code, largest_row_code);
        const double coded = code * scale;
        row[i] = static_cast<int8_t>(code);
        error += (weight - coded) * (weight - coded);
        size += coded * coded;
        norm += weight * weight;
      }
      std::fill(row + W.columns, row + row_size, static_cast<int8_t>(0));
      factors[r] = scale;
      factors[W.rows + r] = rounded_up(std::sqrt(error) + inexact * std::sqrt(norm));
      factors[2 * W.rows + r] = rounded_up(std::sqrt(size));
    }
  });
}

QuantizedToken quantize_token(const float* input, Dtype row_dtype, int64_t columns, int16_t* values, int64_t row_size) {
  float largest = 0.0f;
  for (int64_t i = 0; i < packed_size(columns); ++i) largest = std::max(largest, std::fabs(input[i]));
  QuantizedToken token;
  token.step = static_cast<float>(largest / largest_token_code);
  const double inverse = token.step > 0.0f ? 1.0 / token.step : 0.0;
  double norm = 0.0, error = 0.0;
  for (int64_t i = 0; i < columns; ++i) {
    const double value = input[packed_position(row_dtype, i)];
    const double code = std::clamp(std::nearbyint(value * inverse), -largest_token_code, largest_token_code);
    const double missed = value - code * token.step;
    values[i] = static_cast<int16_t>(code);
    norm += value * value;
    error += missed * missed;
  }
  std::fill(values + columns, values + row_size, static_cast<int16_t>(0));
  token.norm = rounded_up(std::sqrt(norm));
  token.error = rounded_up(std::sqrt(error));
  token.usable = norm < largest_norm * largest_norm;
  return token;
}

void bound_products(const QuantizedEncoder& codes, const QuantizedToken& token, int64_t first, int64_t count,
                    const float* code_products, float* lower, float* upper) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const float* scale = codes.scale + first;
  const float* error = codes.error + first;
  const float* size = codes.size + first;
  for (int64_t i = 0; i < count; ++i) {
    const float middle = code_products[i] * token.step * scale[i];
    const float reach = error[i] * token.norm + size[i] * token.error;
    const float width = reach + (std::fabs(middle) + reach) * relative_slack + absolute_slack;
    const float low = middle - width, high = middle + width;
    lower[i] = low >= -infinity ? low : -infinity;  // NaN proves nothing
    upper[i] = high <= infinity ? high : infinity;
  }
}

}  // namespace dspa::cpu
