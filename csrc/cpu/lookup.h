// From prompt features to edit lists (docs/method.md, section 3): the densest prompt latents select rows of the map,
// and the sum of these rows ranks the output latents.
#pragma once

#include <cstdint>

#include "../common/csr_map.h"
#include "../common/edit_lists.h"
#include "parallel.h"

namespace dspa::cpu {

// `density` is `[batch, map.rows]`, float32 or float64.
template <class Density, class Value>
void lookup(const Density* density, int64_t batch, const CsrMap<Value>& map, const LookupOptions& options,
            const EditLists& lists, const ThreadPool& pool);

}  // namespace dspa::cpu
