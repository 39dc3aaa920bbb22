// The k largest of n numbers, by one block, without sorting: those above a pivot, and the first few that equal it.
#pragma once

#include "block.cuh"

namespace dspa::cuda {

// Unsigned keys that order as the numbers do: 0 and -0 alike, NaN above all.
__device__ __forceinline__ uint32_t ordered_key(float value) {
  if (value != value) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ uint64_t ordered_key(double value) {
  if (value != value) return ~uint64_t{0};
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
  return (bits >> 63) != 0 ? ~bits : bits | uint64_t{1} << 63;
}

template <class Key>
struct Selection {
  Key pivot;      // the k-th largest key
  uint32_t ties;  // how many of the keys that equal it belong to the k largest: the first ones
};

// Shared memory of a selection.
struct SelectionBuffer {
  uint32_t histogram[256];
  uint32_t digit;
  uint32_t wanted;
  uint32_t counts[2][most_warps];
};

// `key_of(i)` for i below n; 1 <= k <= n. By the whole block; the result is the same in every thread.
template <class Key, class KeyOf>
__device__ Selection<Key> select_largest(int64_t n, uint32_t k, const KeyOf& key_of, SelectionBuffer& buffer) {
  constexpr int bits = 8 * static_cast<int>(sizeof(Key));
  Key known = 0;  // the leading digits of the pivot
  uint32_t wanted = k;
  for (int shift = bits - 8; shift >= 0; shift -= 8) {
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x)) buffer.histogram[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const Key key = key_of(i);
      if (shift == bits - 8 || (key >> shift) >> 8 == (known >> shift) >> 8)
        atomicAdd(&buffer.histogram[static_cast<uint32_t>(key >> shift) & 255u], 1u);
    }
    __syncthreads();
    if (warp() == 0) {  // each lane adds up 8 digits, the largest digits first
      const int top = 255 - 8 * lane();
      uint32_t own = 0;
      for (int i = 0; i < 8; ++i) own += buffer.histogram[top - i];
      uint32_t upto = own;
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(all_lanes, upto, static_cast<unsigned>(offset));
        if (lane() >= offset) upto += other;
      }
      uint32_t before = upto - own;
      if (before < wanted && wanted <= upto) {
        int digit = top;
        while (before + buffer.histogram[digit] < wanted) before += buffer.histogram[digit--];
        buffer.digit = static_cast<uint32_t>(digit);
        buffer.wanted = wanted - before;
      }
    }
    __syncthreads();
    known |= static_cast<Key>(buffer.digit) << shift;
    wanted = buffer.wanted;
    __syncthreads();
  }
  return {known, wanted};
}

// How many threads of the block before this one have the flag, and how many have it in all.
struct Position {
  uint32_t before;
  uint32_t total;
};

__device__ inline Position position_in_block(bool flag, uint32_t* counts) {
  const uint32_t voters = __ballot_sync(all_lanes, flag);
  if (lane() == 0) counts[warp()] = static_cast<uint32_t>(__popc(voters));
  __syncthreads();
  Position position{static_cast<uint32_t>(__popc(voters & ((1u << lane()) - 1u))), 0};
  for (int w = 0; w < warps(); ++w) {
    if (w < warp()) position.before += counts[w];
    position.total += counts[w];
  }
  __syncthreads();
  return position;
}

// `visit(index, position)` for each selected index, position counting them in ascending order of the index.
template <class Key, class KeyOf, class Visit>
__device__ void for_each_selected(int64_t n, const Selection<Key>& selection, const KeyOf& key_of, const Visit& visit,
                                  SelectionBuffer& buffer) {
  uint32_t ties = 0, found = 0;
  for (int64_t first = 0; first < n; first += blockDim.x) {
    const int64_t index = first + threadIdx.x;
    const Key key = index < n ? key_of(index) : Key{0};
    const bool tie = index < n && key == selection.pivot;
    const bool above = index < n && key > selection.pivot;
    if (__syncthreads_or(tie || above) == 0) continue;
    const Position among_ties = position_in_block(tie, buffer.counts[0]);
    const bool chosen = above || (tie && ties + among_ties.before < selection.ties);
    const Position among_chosen = position_in_block(chosen, buffer.counts[1]);
    if (chosen) visit(index, found + among_chosen.before);
    ties += among_ties.total;
    found += among_chosen.total;
  }
}

}  // namespace dspa::cuda
