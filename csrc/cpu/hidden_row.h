// The write-back of a decoded difference to a hidden state.
#pragma once

#include "row_kernels.h"

namespace dspa::cpu {

// hidden[row][first + c] += decoded[c] for c < columns, rounded once; `decoded` is packed as rows of `row_dtype` are,
// `first` a multiple of a chunk.
inline void add_to_row(const StridedMatrix& hidden, int64_t row, Dtype row_dtype, int64_t first, int64_t columns,
                       const float* decoded) {
  char* to = hidden.row(row);
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t position = (first + i) * hidden.column_stride;
    const float value = load_element(to, hidden.dtype, position) + decoded[packed_position(row_dtype, i)];
    store_element(to, hidden.dtype, position, value);
  }
}

}  // namespace dspa::cpu
