// From the prompt features of one row to its edit list, by one block.
#pragma once

#include "operations.h"
#include "select.cuh"

namespace dspa::cuda {

template <class Value>
using KeyOfValue = decltype(ordered_key(Value{}));

// The k best by `key_of`, best first, in `sorted`; `unsorted` is of the same length.
template <class Key, class KeyOf>
__device__ void sort_largest(int64_t n, int64_t k, const KeyOf& key_of, int32_t* unsorted, int32_t* sorted,
                             SelectionBuffer& buffer) {
  if (k == 0) return;
  const Selection<Key> selection = select_largest<Key>(n, static_cast<uint32_t>(k), key_of, buffer);
  for_each_selected(
      n, selection, key_of,
      [&](int64_t index, uint32_t position) { unsorted[position] = static_cast<int32_t>(index); }, buffer);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < k; i += blockDim.x) {
    const Key key = key_of(unsorted[i]);
    int64_t rank = 0;
    for (int64_t other = 0; other < k; ++other) {
      const Key other_key = key_of(unsorted[other]);
      rank += other_key > key || (other_key == key && other < i);
    }
    sorted[rank] = unsorted[i];
  }
  __syncthreads();
}

__device__ inline bool contains(const int32_t* latents, int64_t size, int32_t latent) {
  for (int64_t i = 0; i < size; ++i)
    if (latents[i] == latent) return true;
  return false;
}

template <class Density, class Value>
__device__ void lookup_row(const Lookup<Density, Value>& lookup, int64_t row, SelectionBuffer& buffer) {
  using DensityKey = KeyOfValue<Density>;
  using Key = KeyOfValue<Value>;
  constexpr int32_t dropped = -1;
  const CsrMap<Value>& map = lookup.map;
  const int64_t k_prompt = lookup.options.k_prompt, k_diff = lookup.options.k_diff;
  const Density* density = lookup.density + row * map.rows;
  Value* score = lookup.scores + row * map.columns_count;
  int32_t* rows = lookup.latents + row * (k_prompt + 4 * k_diff);
  int32_t* augmented = rows + k_prompt;
  int32_t* ablated = augmented + k_diff;
  int32_t* unsorted = ablated + k_diff;  // 2 k_diff: `dropped` flags need as much

  for (int64_t i = threadIdx.x; i < map.columns_count; i += blockDim.x) score[i] = Value{0};
  if (k_prompt > 0) {
    const auto key_of = [&](int64_t i) { return ordered_key(density[i]); };
    const auto selection = select_largest<DensityKey>(map.rows, static_cast<uint32_t>(k_prompt), key_of, buffer);
    for_each_selected(
        map.rows, selection, key_of,
        [&](int64_t index, uint32_t position) { rows[position] = static_cast<int32_t>(index); }, buffer);
  }
  __syncthreads();
  // Row after row in ascending order, so that the bits depend on the set of them alone; a row has a column once.
  for (int64_t r = 0; r < k_prompt; ++r) {
    const int64_t end = map.row_offsets[rows[r] + 1];
    for (int64_t entry = map.row_offsets[rows[r]] + threadIdx.x; entry < end; entry += blockDim.x)
      score[map.columns[entry]] += map.values[entry];
    __syncthreads();
  }

  const bool augments = lookup.options.edit != EditKind::ablate;
  const bool ablates = lookup.options.edit != EditKind::augment;
  const int64_t up = augments ? k_diff : 0, down = ablates ? k_diff : 0;
  sort_largest<Key>(map.columns_count, up, [&](int64_t i) { return ordered_key(score[i]); }, unsorted, augmented,
                    buffer);
  sort_largest<Key>(map.columns_count, down, [&](int64_t i) { return static_cast<Key>(~ordered_key(score[i])); },
                    unsorted, ablated, buffer);
  if (lookup.options.sign_guard) {
    for (int64_t i = threadIdx.x; i < up; i += blockDim.x)
      if (!(score[augmented[i]] > Value{0})) augmented[i] = dropped;
    for (int64_t i = threadIdx.x; i < down; i += blockDim.x)
      if (!(score[ablated[i]] < Value{0})) ablated[i] = dropped;
    __syncthreads();
  }

  // One list: augmented, then ablated, without dropped latents and without those in both.
  int32_t* merged = unsorted;
  for (int64_t i = threadIdx.x; i < up; i += blockDim.x)
    merged[i] = contains(ablated, down, augmented[i]) ? dropped : augmented[i];
  for (int64_t i = threadIdx.x; i < down; i += blockDim.x)
    merged[up + i] = contains(augmented, up, ablated[i]) ? dropped : ablated[i];
  __syncthreads();
  int32_t* latents = lookup.lists.latents + row * lookup.lists.capacity;
  int8_t* signs = lookup.lists.signs + row * lookup.lists.capacity;
  int64_t count = 0;
  for (int64_t first = 0; first < up + down; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const bool kept = i < up + down && merged[i] != dropped;
    const Position position = position_in_block(kept, buffer.counts[0]);
    if (kept) {
      latents[count + position.before] = merged[i];
      signs[count + position.before] = i < up ? 1 : -1;
    }
    count += position.total;
  }
  for (int64_t i = count + threadIdx.x; i < lookup.lists.capacity; i += blockDim.x) {
    latents[i] = 0;
    signs[i] = 0;
  }
  if (threadIdx.x == 0) lookup.lists.counts[row] = static_cast<int32_t>(count);
  __syncthreads();
}

}  // namespace dspa::cuda
