// From prompt features to edit lists: the densest prompt latents pick rows of the map, and the sum of these ranks the
// output latents.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace dspa::cpu {

enum class EditKind { ablate, augment, both };

// The map by compressed rows; values and densities are float32 or float64.
template <class Value>
struct CsrMap {
  const int64_t* row_offsets = nullptr;
  const int32_t* columns = nullptr;
  const Value* values = nullptr;
  int64_t rows = 0;
  int64_t columns_count = 0;
};

struct LookupOptions {
  int64_t k_prompt = 0;
  int64_t k_diff = 0;
  EditKind edit = EditKind::ablate;
  bool sign_guard = false;
};

// Room for `k_diff` entries a row, twice as many for both directions.
struct EditLists {
  int32_t* latents = nullptr;
  int8_t* signs = nullptr;
  int32_t* counts = nullptr;
  int64_t capacity = 0;
};

template <class Density, class Value>
void lookup(const Density* density, int64_t batch, const CsrMap<Value>& map, const LookupOptions& options,
            const EditLists& lists, const ThreadPool& pool);

}  // namespace dspa::cpu
