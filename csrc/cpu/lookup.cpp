#include "lookup.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace dspa::cpu {
namespace {

// Indices of the k largest or smallest values, best first, ties to the lower index. NaN counts as the largest value.
template <class Value>
std::vector<int32_t> top(const Value* values, int64_t size, int64_t k, bool largest) {
  std::vector<int32_t> indices(static_cast<size_t>(size));
  std::iota(indices.begin(), indices.end(), 0);
  const auto exceeds = [](Value a, Value b) { return a > b || (std::isnan(a) && !std::isnan(b)); };
  std::partial_sort(indices.begin(), indices.begin() + k, indices.end(), [&](int32_t a, int32_t b) {
    const Value first = values[largest ? a : b], second = values[largest ? b : a];
    if (exceeds(first, second)) return true;
    return !exceeds(second, first) && a < b;
  });
  indices.resize(static_cast<size_t>(k));
  return indices;
}

// Added in ascending order of the rows, so that the bits depend on the set of them alone.
template <class Value>
std::vector<Value> row_sum(const CsrMap<Value>& map, std::vector<int32_t> rows) {
  std::sort(rows.begin(), rows.end());
  std::vector<Value> sum(static_cast<size_t>(map.columns_count), Value{0});
  for (int32_t row : rows)
    for (int64_t entry = map.row_offsets[row]; entry < map.row_offsets[row + 1]; ++entry)
      sum[static_cast<size_t>(map.columns[entry])] += map.values[entry];
  return sum;
}

bool contains(const std::vector<int32_t>& latents, int32_t latent) {
  return std::find(latents.begin(), latents.end(), latent) != latents.end();
}

template <class Density, class Value>
void lookup_row(const Density* density, const CsrMap<Value>& map, const LookupOptions& options, int32_t* latents,
                int8_t* signs, int32_t& count, int64_t capacity) {
  const std::vector<Value> score = row_sum(map, top(density, map.rows, options.k_prompt, true));
  std::vector<int32_t> augmented, ablated;
  if (options.edit != EditKind::ablate) augmented = top(score.data(), map.columns_count, options.k_diff, true);
  if (options.edit != EditKind::augment) ablated = top(score.data(), map.columns_count, options.k_diff, false);
  if (options.sign_guard) {
    const auto drop = [&](std::vector<int32_t>& list, auto keeps) {
      list.erase(std::remove_if(list.begin(), list.end(),
                                [&](int32_t latent) { return !keeps(score[static_cast<size_t>(latent)]); }),
                 list.end());
    };
    drop(augmented, [](Value value) { return value > 0; });
    drop(ablated, [](Value value) { return value < 0; });
  }
  count = 0;
  const auto append = [&](const std::vector<int32_t>& list, const std::vector<int32_t>& other, int8_t sign) {
    for (int32_t latent : list) {
      if (contains(other, latent)) continue;  // both edits would cancel
      latents[count] = latent;
      signs[count++] = sign;
    }
  };
  append(augmented, ablated, 1);
  append(ablated, augmented, -1);
  std::fill(latents + count, latents + capacity, 0);
  std::fill(signs + count, signs + capacity, static_cast<int8_t>(0));
}

}  // namespace

template <class Density, class Value>
void lookup(const Density* density, int64_t batch, const CsrMap<Value>& map, const LookupOptions& options,
            const EditLists& lists, const ThreadPool& pool) {
  pool.for_each(batch, [&](int64_t row) {
    lookup_row(density + row * map.rows, map, options, lists.latents + row * lists.capacity,
               lists.signs + row * lists.capacity, lists.counts[row], lists.capacity);
  });
}

template void lookup(const float*, int64_t, const CsrMap<float>&, const LookupOptions&, const EditLists&,
                     const ThreadPool&);
template void lookup(const float*, int64_t, const CsrMap<double>&, const LookupOptions&, const EditLists&,
                     const ThreadPool&);
template void lookup(const double*, int64_t, const CsrMap<float>&, const LookupOptions&, const EditLists&,
                     const ThreadPool&);
template void lookup(const double*, int64_t, const CsrMap<double>&, const LookupOptions&, const EditLists&,
                     const ThreadPool&);

}  // namespace dspa::cpu
