// Matrices as plain structures, without torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace dspa {

// `[rows, columns]`, each row contiguous.
struct Matrix {
  const char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t rows = 0;
  int64_t columns = 0;

  DSPA_INLINE_MEMBER int64_t row_bytes() const { return columns * size_of(dtype); }
  DSPA_INLINE_MEMBER const char* row(int64_t index) const { return data + index * row_bytes(); }
};

// `[rows, columns]` with any strides, counted in elements.
struct StridedMatrix {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 1;

  char* row(int64_t index) const { return data + index * row_stride * size_of(dtype); }
};

}  // namespace dspa
