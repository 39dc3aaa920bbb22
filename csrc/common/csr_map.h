// The conditional-difference map by compressed rows (docs/method.md, section 2).
#pragma once

#include <cstdint>

namespace dspa {

// Values are float32 or float64.
template <class Value>
struct CsrMap {
  const int64_t* row_offsets = nullptr;
  const int32_t* columns = nullptr;
  const Value* values = nullptr;
  int64_t rows = 0;
  int64_t columns_count = 0;
};

}  // namespace dspa
