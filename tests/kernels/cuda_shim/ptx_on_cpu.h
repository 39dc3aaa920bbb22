// csrc/cuda/ptx.cuh in plain C++, function by function.
#pragma once

#include "cpu/dtype.h"

namespace dspa::cuda::ptx {

inline char* dynamic_shared() { return cuda_shim::self().block->shared; }

inline uint64_t evict_first_policy() { return 0; }

inline uint4 load_16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) std::abort();  // a GPU would stop as well
  uint4 value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

inline uint4 load_streaming(const void* address, uint64_t) { return load_16(address); }

inline uint32_t add_acquire_release(uint32_t* address, uint32_t value) {
  return cuda_shim::machine().order_is_missing ? __atomic_fetch_add(address, value, __ATOMIC_RELAXED)
                                               : __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

inline uint32_t load_acquire(const uint32_t* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }

inline uint32_t load_relaxed(const uint32_t* address) { return __atomic_load_n(address, __ATOMIC_RELAXED); }

inline void wait_a_moment() { cuda_shim::pause(); }

inline float float_of_float16(uint16_t bits) { return cpu::float_of_float16(bits); }
inline uint16_t float16_of_float(float value) { return cpu::float16_of_float(value); }
inline uint16_t bfloat16_of_float(float value) { return cpu::bfloat16_of_float(value); }

inline uint32_t cluster_rank() { return cuda_shim::self().block->index.x % cuda_shim::self().block->launch->cluster; }
inline uint32_t cluster_size() { return cuda_shim::self().block->launch->cluster; }
inline void cluster_barrier() { cuda_shim::self().block->cluster->barrier.wait(); }

inline void store_in_cluster(uint32_t* pointer, uint32_t rank, uint32_t value) {
  const cuda_shim::Block& block = *cuda_shim::self().block;
  const ptrdiff_t offset = reinterpret_cast<char*>(pointer) - block.shared;
  std::memcpy(block.cluster->blocks[rank]->shared + offset, &value, sizeof value);
}

// A barrier as one word: the parity of its phase, how many arrive in a phase, how many are still to come, and bytes.
constexpr bool has_bulk_copies = true;

template <class Change>
void change_barrier(uint64_t* barrier, const Change& change) {
  uint64_t before = __atomic_load_n(barrier, __ATOMIC_RELAXED), after = 0;
  do {
    uint64_t parity = before >> 63, count = before >> 48 & 0x7fff;
    int64_t coming = before >> 32 & 0xffff, bytes = static_cast<int32_t>(before);
    change(coming, bytes);
    if (coming == 0 && bytes == 0) {
      parity ^= 1;
      coming = static_cast<int64_t>(count);
    }
    after = parity << 63 | count << 48 | static_cast<uint64_t>(coming) << 32 | static_cast<uint32_t>(bytes);
  } while (!__atomic_compare_exchange_n(barrier, &before, after, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
}

inline void barrier_begin(uint64_t* barrier, uint32_t count) {
  __atomic_store_n(barrier, static_cast<uint64_t>(count) << 48 | static_cast<uint64_t>(count) << 32, __ATOMIC_RELEASE);
}

inline void barriers_have_begun() {}

inline void barrier_arrive(uint64_t* barrier) {
  change_barrier(barrier, [](int64_t& coming, int64_t&) { --coming; });
}

inline void barrier_expect(uint64_t* barrier, uint32_t expected) {
  change_barrier(barrier, [&](int64_t& coming, int64_t& bytes) {
    --coming;
    bytes += expected;
  });
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (__atomic_load_n(barrier, __ATOMIC_ACQUIRE) >> 63 == parity) cuda_shim::pause();
}

inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, uint64_t) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0)
    std::abort();
  std::memcpy(shared, global, bytes);
  change_barrier(barrier, [&](int64_t&, int64_t& left) { left -= bytes; });
}

// Copies are done when they have to be, and not before.
inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0))
    std::abort();
  cuda_shim::self().copies.back().push_back({shared, global, valid});
}

inline void commit_copies() { cuda_shim::self().copies.emplace_back(); }

template <int kPending>
void wait_for_copies() {
  auto& groups = cuda_shim::self().copies;
  while (groups.size() > kPending + 1) {  // the last group is open
    for (const cuda_shim::Copy& copy : groups.front()) {
      if (copy.valid)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  const uint64_t* rows = cuda_shim::exchange(0xffffffffu, row);
  const unsigned lane = cuda_shim::self().lane();
  for (unsigned m = 0; m < 4; ++m) {
    const auto* from = cuda_shim::value_of<const char*>(rows[8 * m + lane / 4]);
    std::memcpy(&matrices[m], from + 4 * (lane % 4), 4);
  }
}

struct Bfloat16Pairs {
  static float number(uint32_t bits) { return cpu::float_of_bfloat16(static_cast<uint16_t>(bits)); }
};
struct Float16Pairs {
  static float number(uint32_t bits) { return cpu::float_of_float16(static_cast<uint16_t>(bits)); }
};

template <class Pairs>
void multiply_add(Pairs, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Fragments own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const uint64_t* all = cuda_shim::exchange(0xffffffffu, &own);
  const auto of_lane = [&](unsigned lane) -> const Fragments& {
    return *cuda_shim::value_of<const Fragments*>(all[lane]);
  };
  const unsigned group = cuda_shim::self().lane() / 4, within = cuda_shim::self().lane() % 4;
  for (unsigned c = 0; c < 4; ++c) {
    const unsigned row = group + 8 * (c / 2), column = 2 * within + c % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned place = k / 2 % 4, half = k % 2, upper = k / 8;
      const uint32_t of_a = of_lane(row % 8 * 4 + place).a[row / 8 + 2 * upper] >> (16 * half);
      const uint32_t of_b = of_lane(column * 4 + place).b[upper] >> (16 * half);
      sums[c] = fmaf(Pairs::number(of_a), Pairs::number(of_b), sums[c]);
    }
  }
  cuda_shim::exchange(0xffffffffu, 0);  // nobody reads the fragments any more
}

}  // namespace dspa::cuda::ptx
