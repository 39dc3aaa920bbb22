// csrc/cuda/ptx.cuh in plain C++, function by function.
#pragma once

#include "common/dtype.h"
#include "cuda.h"

namespace dspa::cuda::ptx {

inline char* dynamic_shared() { return cuda_shim::self().block->shared; }

inline uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - dynamic_shared();
  return cuda_shim::self().block->shared_begin() + static_cast<uint32_t>(offset);
}

inline uint64_t evict_first_policy() { return 0; }

inline uint2 load_8(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0) std::abort();
  uint2 value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

inline uint4 load_16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) std::abort();  // a GPU would stop as well
  uint4 value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

inline uint4 load_streaming(const void* address, uint64_t) { return load_16(address); }

// Changes nothing, but must be allowed to read.
inline void prefetch(const void* address, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0 || bytes % 16 != 0) std::abort();
  const volatile char* first = static_cast<const volatile char*>(address);
  static_cast<void>(first[0] + first[bytes - 1]);
}

inline void wait_for_launches_before() {}
inline void let_next_launch_begin() {}

inline uint32_t add_acquire_release(uint32_t* address, uint32_t value) {
  return cuda_shim::machine().order_is_missing ? __atomic_fetch_add(address, value, __ATOMIC_RELAXED)
                                               : __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

inline uint32_t load_acquire(const uint32_t* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }

inline uint32_t load_relaxed(const uint32_t* address) { return __atomic_load_n(address, __ATOMIC_RELAXED); }

inline void wait_a_moment() { cuda_shim::pause(); }

inline float float_of_float16(uint16_t bits) { return dspa::float_of_float16(bits); }
inline uint16_t float16_of_float(float value) { return dspa::float16_of_float(value); }
inline uint16_t bfloat16_of_float(float value) { return dspa::bfloat16_of_float(value); }

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

// ---- copies of matrix rows by the copy engine -----------------------------------------------------------------------

constexpr uint32_t box_columns = 64;

// What a box has of a matrix, to shared memory of one block.
inline void copy_box(cuda_shim::Block& block, ptrdiff_t offset, const CUtensorMap& map, int32_t column, int32_t row) {
  const uint32_t address = block.shared_begin() + static_cast<uint32_t>(offset);
  if (address % 1024 != 0) cuda_shim::refuse("a box at no multiple of 1024 bytes");
  if (static_cast<size_t>(offset) + 128 * map.box_rows > block.launch->shared_bytes)
    cuda_shim::refuse("a box outside of the block");
  for (uint32_t r = 0; r < map.box_rows; ++r) {
    for (uint32_t c = 0; c < box_columns; ++c) {
      const int64_t from_row = int64_t{row} + r, from_column = int64_t{column} + c;
      const bool inside = from_row >= 0 && from_row < map.rows && from_column >= 0 && from_column < map.columns;
      const uint16_t number = inside ? map.data[from_row * map.row_stride + from_column] : uint16_t{0};
      const uint32_t place = r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2;
      std::memcpy(block.shared + offset + place, &number, sizeof number);
    }
  }
}

inline void copy_rows(void* shared, const CUtensorMap& map, int32_t column, int32_t row, uint64_t* barrier) {
  cuda_shim::Block& block = *cuda_shim::self().block;
  copy_box(block, static_cast<char*>(shared) - block.shared, map, column, row);
  change_barrier(barrier, [&](int64_t&, int64_t& left) { left -= 128 * map.box_rows; });
}

inline void copy_rows_to_pair(void* shared, const CUtensorMap& map, int32_t column, int32_t row, uint64_t* barrier) {
  cuda_shim::Block& own = *cuda_shim::self().block;
  if (own.launch->cluster != 2) cuda_shim::refuse("a copy to a pair in another cluster");
  for (const auto& block : own.cluster->blocks) {
    copy_box(*block, static_cast<char*>(shared) - own.shared, map, column, row);
    auto* there = reinterpret_cast<uint64_t*>(block->shared + (reinterpret_cast<char*>(barrier) - own.shared));
    change_barrier(there, [&](int64_t&, int64_t& left) { left -= 128 * map.box_rows; });
  }
}

inline void barrier_arrive_in_cluster(uint64_t* barrier, uint32_t rank) {
  const cuda_shim::Block& own = *cuda_shim::self().block;
  cuda_shim::Block& block = *own.cluster->blocks[rank];
  barrier_arrive(reinterpret_cast<uint64_t*>(block.shared + (reinterpret_cast<char*>(barrier) - own.shared)));
}

// The block's count of copies to some 16 bytes of shared memory that were begun and not shown to the tensor cores yet.
inline uint32_t& hidden_copies(const void* shared) {
  const ptrdiff_t offset = static_cast<const char*>(shared) - dynamic_shared();
  return cuda_shim::self().block->hidden.at(static_cast<size_t>(offset) / 16);
}

// Copies are done when they have to be, and not before.
inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0))
    std::abort();
  __atomic_fetch_add(&hidden_copies(shared), 1, __ATOMIC_RELAXED);
  cuda_shim::self().copies.back().push_back({shared, global, valid});
}

inline void commit_copies() { cuda_shim::self().copies.emplace_back(); }

template <int kPending>
void wait_for_copies() {
  cuda_shim::Thread& thread = cuda_shim::self();
  auto& groups = thread.copies;
  while (groups.size() > kPending + 1) {  // the last group is open
    for (const cuda_shim::Copy& copy : groups.front()) {
      thread.done.push_back(copy.to);
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
  static constexpr uint32_t exponent = 0x7f80;
  static float number(uint32_t bits) { return dspa::float_of_bfloat16(static_cast<uint16_t>(bits)); }
};
struct Float16Pairs {
  static constexpr uint32_t exponent = 0x7c00;
  static float number(uint32_t bits) { return dspa::float_of_float16(static_cast<uint16_t>(bits)); }
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

// ---- products of warpgroups -----------------------------------------------------------------------------------------

// The tensor cores read the matrices at any time between a product and the wait for it. Here they are read as late as
// can be for the sums, and as early as can be to see that nobody changes them in between. No copy to them may be under
// way, or done and not shown; whether ordinary stores were shown is not checked.

constexpr bool has_warpgroup_products = true;

inline void show_to_tensor_cores() {
  cuda_shim::Thread& thread = cuda_shim::self();
  for (const void* to : thread.done) __atomic_fetch_sub(&hidden_copies(to), 1, __ATOMIC_RELAXED);
  thread.done.clear();
}

// Where columns 8 `piece` to 8 `piece` + 7 of a row lie in shared memory, by what PTX says of matrix descriptors: K is
// the major dimension, the swizzle is that of 128 bytes.
inline const char* row_piece(uint64_t descriptor, uint32_t row, uint32_t piece) {
  const cuda_shim::Block& block = *cuda_shim::self().block;
  const uint32_t start = (descriptor & 0x3fff) << 4, of_eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  const uint64_t fields = 0x3fff | uint64_t{0x3fff} << 16 | uint64_t{0x3fff} << 32 | uint64_t{3} << 62;
  if ((descriptor & ~fields) != 0 || descriptor >> 62 != 1) cuda_shim::refuse("a descriptor of another kind");
  const uint32_t plain = start + row / 8 * of_eight_rows + row % 8 * 128 + piece * 16;
  const uint32_t offset = (plain ^ (plain >> 7 & 7) << 4) - block.shared_begin();
  if (offset + 16 > block.launch->shared_bytes) cuda_shim::refuse("a matrix outside of the block");
  const char* found = dynamic_shared() + offset;
  if (__atomic_load_n(&hidden_copies(found), __ATOMIC_RELAXED) != 0)
    cuda_shim::refuse("a product of what was not shown to the tensor cores");
  return found;
}

inline uint64_t digest_of(uint64_t a, uint64_t b) {
  uint64_t digest = 0;
  for (uint32_t row = 0; row < 64 + 256; ++row) {
    for (uint32_t piece = 0; piece < 2; ++piece) {
      uint64_t words[2];
      std::memcpy(words, row < 64 ? row_piece(a, row, piece) : row_piece(b, row - 64, piece), sizeof words);
      for (const uint64_t word : words) digest = (digest ^ word) * 0x9e3779b97f4a7c15u;
    }
  }
  return digest;
}

inline void settle(float (&)[128]) {}

template <int kRegisters>
void leave_registers() {}
template <int kRegisters>
void take_registers() {}

inline void begin_products() { cuda_shim::self().products_begun = true; }

template <class Pairs>
void multiply_add(Pairs, float (&sums)[128], uint64_t a, uint64_t b) {
  cuda_shim::Thread& thread = cuda_shim::self();
  const size_t number = thread.thread_index.x / 128;
  if (number >= thread.block->warpgroups.size()) cuda_shim::refuse("a product of less than a warpgroup");
  if (!thread.products_begun) cuda_shim::refuse("a product without a fence");
  cuda_shim::Warpgroup& group = *thread.block->warpgroups[number];
  uint64_t* named = group.matrices[thread.thread_index.x % 128];
  named[0] = a;
  named[1] = b;
  if (group.arrived.fetch_add(1) == 127) {  // the last thread of the group: now the tensor cores may begin
    group.arrived.store(0);
    for (const uint64_t(&others)[2] : group.matrices)
      if (others[0] != a || others[1] != b) cuda_shim::refuse("matrices that differ in a warpgroup");
    group.digest = digest_of(a, b);
  }
  group.barrier.wait();
  thread.products.back().push_back({sums, a, b, &Pairs::number, group.digest});
}

inline void commit_products() { cuda_shim::self().products.emplace_back(); }

// What a thread has of a product.
inline void multiply_own(const cuda_shim::Product& product) {
  const uint32_t thread = cuda_shim::self().thread_index.x % 128;
  if (thread == 0 && digest_of(product.a, product.b) != product.digest)
    cuda_shim::refuse("a matrix that changed while it was multiplied");
  const auto load_row = [&](uint64_t matrix, uint32_t row, float (&numbers)[16]) {
    for (uint32_t piece = 0; piece < 2; ++piece) {
      uint16_t bits[8];
      std::memcpy(bits, row_piece(matrix, row, piece), sizeof bits);
      for (uint32_t i = 0; i < 8; ++i) numbers[8 * piece + i] = product.number(bits[i]);
    }
  };
  float rows[2][16], column[16];
  for (uint32_t i = 0; i < 2; ++i) load_row(product.a, thread / 32 * 16 + thread % 32 / 4 + 8 * i, rows[i]);
  for (uint32_t j = 0; j < 32; ++j) {
    for (uint32_t c = 0; c < 2; ++c) {
      load_row(product.b, 8 * j + thread % 4 * 2 + c, column);
      for (uint32_t i = 0; i < 2; ++i)
        for (uint32_t k = 0; k < 16; ++k) {
          float& sum = product.sums[4 * j + 2 * i + c];
          sum = fmaf(rows[i][k], column[k], sum);
        }
    }
  }
}

template <int kPending>
void wait_for_products() {
  cuda_shim::Thread& thread = cuda_shim::self();
  while (thread.products.size() > kPending + 1) {  // the last group is open
    for (const cuda_shim::Product& product : thread.products.front()) multiply_own(product);
    thread.products.erase(thread.products.begin());
  }
  if (kPending == 0) thread.products_begun = false;  // from here on the sums may be looked at
}

}  // namespace dspa::cuda::ptx
