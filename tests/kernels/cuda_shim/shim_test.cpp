// The shim does what CUDA does. Arguments: "fibers" or "threads" runs all checks; "race" and "overrun" do what
// ThreadSanitizer and AddressSanitizer have to find, the others what the shim itself has to refuse. Ends with 0 if all
// is well.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"

namespace ptx = dspa::cuda::ptx;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

template <class Body>
void body_of(Body* body) {
  (*body)();
}

template <class Body>
cudaError_t launch(unsigned blocks, unsigned threads, size_t shared, unsigned cluster, Body body) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute attribute = {};
  attribute.val.clusterDim.x = cluster;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, &body_of<Body>, &body);
}

// Every thread of every block runs once, with its own numbers.
void indices() {
  std::vector<uint32_t> seen(5 * 96, 0);
  launch(5, 96, 0, 1, [&] {
    seen[blockIdx.x * blockDim.x + threadIdx.x] += 1 + blockDim.x;
  });
  for (uint32_t count : seen) expect(count == 97, "each thread once");
}

// What is written before a barrier is read after it, round after round.
void barriers() {
  launch(3, 64, 64 * 4, 1, [] {
    auto* shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
    for (uint32_t round = 0; round < 20; ++round) {
      shared[threadIdx.x] = round * 100 + threadIdx.x;
      __syncthreads();
      const uint32_t other = (threadIdx.x + 17) % 64;
      expect(shared[other] == round * 100 + other, "a barrier lets nobody pass early");
      __syncthreads();
    }
  });
}

void warps() {
  launch(2, 64, 0, 1, [] {
    const uint32_t lane = threadIdx.x % 32;
    for (int offset = 1; offset < 32; offset *= 2) {
      expect(__shfl_xor_sync(0xffffffffu, lane, offset) == (lane ^ static_cast<uint32_t>(offset)), "shfl_xor");
      const uint32_t below = lane < static_cast<uint32_t>(offset) ? lane : lane - static_cast<uint32_t>(offset);
      expect(__shfl_up_sync(0xffffffffu, lane, static_cast<unsigned>(offset)) == below, "shfl_up");
    }
    expect(__shfl_xor_sync(0xffffffffu, 0.5 + lane, 3) == 0.5 + (lane ^ 3), "shfl_xor of doubles");
    expect(__ballot_sync(0xffffffffu, lane % 3 == 0) == 0x49249249u, "ballot");
    expect(__all_sync(0xffffffffu, lane < 32) != 0 && __all_sync(0xffffffffu, lane < 31) == 0, "all");
    expect(__any_sync(0xffffffffu, lane == 31) != 0 && __any_sync(0xffffffffu, lane > 31) == 0, "any");
    expect(__reduce_max_sync(0xffffffffu, lane * 7 % 32) == 31, "reduce_max");
    for (uint32_t turn = 0; turn < 9; ++turn) {
      expect((__syncthreads_or(threadIdx.x == turn && turn % 2 == 0) != 0) == (turn % 2 == 0), "syncthreads_or");
      expect((__syncthreads_and(threadIdx.x != turn || turn % 2 == 0) != 0) == (turn % 2 == 0), "syncthreads_and");
    }
  });
}

void atomics() {
  uint32_t sum = 0, maximum = 0, before = 0;
  unsigned long long wide = 0;
  launch(4, 64, 0, 1, [&] {
    atomicAdd(&sum, 1u);
    atomicAdd(&wide, 1ull << 32);
    atomicMax(&maximum, blockIdx.x * 1000 + threadIdx.x * 7 % 64);
    atomicAdd(&before, ptx::add_acquire_release(&sum, 0u) > 256 ? 1u : 0u);
  });
  expect(sum == 256 && wide == 256ull << 32 && maximum == 3063 && before == 0, "atomics");
}

// A value is handed from block to block, in the order of the tickets, whoever runs when.
void tickets() {
  uint32_t ticket = 0, done = 0;
  std::vector<uint32_t> order;
  launch(7, 32, 4, 1, [&] {
    auto* shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
    if (threadIdx.x == 0) {
      *shared = ptx::add_acquire_release(&ticket, 1);
      while (ptx::load_acquire(&done) < *shared) ptx::wait_a_moment();
      order.push_back(*shared);
      ptx::add_acquire_release(&done, 1);
    }
    __syncthreads();
  });
  for (uint32_t i = 0; i < 7; ++i) expect(order.size() == 7 && order[i] == i, "tickets");
}

void clusters() {
  launch(6, 32, 4 * 4, 2, [] {
    auto* shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
    expect(ptx::cluster_size() == 2 && ptx::cluster_rank() == blockIdx.x % 2, "cluster ranks");
    if (threadIdx.x == 0)
      for (uint32_t rank = 0; rank < 2; ++rank) ptx::store_in_cluster(shared + ptx::cluster_rank(), rank, blockIdx.x);
    ptx::cluster_barrier();
    expect(shared[0] == blockIdx.x / 2 * 2 && shared[1] == blockIdx.x / 2 * 2 + 1, "shared memory of the cluster");
    ptx::cluster_barrier();
  });
}

// Copies happen when they are waited for, the oldest group first, and not before.
void copies() {
  alignas(16) static uint32_t from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  launch(1, 32, 32 * 32, 1, [] {
    auto* to = reinterpret_cast<uint32_t*>(ptx::dynamic_shared() + threadIdx.x * 32);
    to[0] = to[4] = 99;
    ptx::copy_async(to, from, true);
    ptx::commit_copies();
    ptx::copy_async(to + 4, from + 4, false);
    ptx::commit_copies();
    expect(to[0] == 99, "a copy takes its time");
    ptx::wait_for_copies<1>();
    expect(to[0] == 1 && to[3] == 4 && to[4] == 99, "one group may be under way");
    ptx::wait_for_copies<0>();
    expect(to[4] == 0 && to[7] == 0, "what is not valid is zero");
  });
}

// ldmatrix and mma by their definitions, on matrices that tell every element from every other.
void matrices() {
  launch(1, 32, 16 * 16 * 2 + 8 * 16 * 2, 1, [] {
    auto* a = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
    uint16_t* b = a + 16 * 16;  // [column][row]
    const auto number = [](int i) { return static_cast<float>(i * 37 % 101 - 50); };
    const unsigned lane = threadIdx.x;
    for (unsigned i = lane; i < 256; i += 32) a[i] = ptx::bfloat16_of_float(number(static_cast<int>(i)));
    for (unsigned i = lane; i < 128; i += 32) b[i] = ptx::bfloat16_of_float(number(static_cast<int>(i) + 300));
    __syncthreads();
    uint32_t of_a[4], of_b[4];
    ptx::load_matrices(of_a, a + lane % 16 * 16 + lane / 16 * 8);
    ptx::load_matrices(of_b, b + lane % 8 * 16 + lane / 8 % 2 * 8);
    float sums[4] = {1, 2, 3, 4};
    ptx::multiply_add(ptx::Bfloat16Pairs{}, sums, of_a, of_b[0], of_b[1]);
    for (unsigned c = 0; c < 4; ++c) {
      const int row = static_cast<int>(lane / 4 + 8 * (c / 2)), column = static_cast<int>(lane % 4 * 2 + c % 2);
      float expected = static_cast<float>(c + 1);
      for (int k = 0; k < 16; ++k) expected += number(row * 16 + k) * number(column * 16 + k + 300);
      expect(sums[c] == expected, "mma");
    }
  });
}

// Two warpgroups multiply a and b, each other columns of them, which lie where PTX says that the tensor cores look for
// them. `spoil` is called between a product and the wait for it.
struct WarpgroupProduct {
  bool shows = true, begins = true, agrees = true;
  void (*spoil)(char* element) = [](char*) {};

  static float number(unsigned row, unsigned column) {
    return static_cast<float>((row * 29 + column * 7) % 127) - 60.0f;
  }

  // Rows have 128 bytes; the swizzle permutes the eight pieces of 16 bytes of each.
  static char* element(char* matrix, unsigned row, unsigned column) {
    return matrix + row * 128 + (column / 8 ^ row % 8) * 16 + column % 8 * 2;
  }

  static uint64_t descriptor(const char* first) { return ptx::shared_address(first) / 16 | 64ull << 32 | 1ull << 62; }

  void operator()() const {
    char* a = ptx::dynamic_shared();
    a += 1023 - (ptx::shared_address(a) + 1023) % 1024;
    char* b = a + 64 * 128;
    alignas(16) uint16_t piece[8];
    for (unsigned i = threadIdx.x; i < (64 + 256) * 8; i += blockDim.x) {
      const unsigned row = i / 8, first = i % 8 * 8;
      for (unsigned k = 0; k < 8; ++k) piece[k] = ptx::bfloat16_of_float(number(row, first + k));
      ptx::copy_async(element(a, row, first), piece, true);
      ptx::commit_copies();
      ptx::wait_for_copies<0>();
    }
    if (shows) ptx::show_to_tensor_cores();
    __syncthreads();
    const unsigned group = threadIdx.x / 128, thread = threadIdx.x % 128, skipped = 16 + 32 * group;
    float sums[128];
    for (float& sum : sums) sum = 0.5f;
    if (begins) ptx::begin_products();
    const unsigned other = !agrees && thread == 77 ? 1024 : 0;
    ptx::multiply_add(ptx::Bfloat16Pairs{}, sums, descriptor(a + skipped * 2), descriptor(b + skipped * 2 + other));
    ptx::commit_products();
    if (threadIdx.x == 100) spoil(element(b, 5, skipped));
    __syncthreads();
    expect(sums[0] == 0.5f, "a product takes its time");
    ptx::wait_for_products<0>();
    for (unsigned n = 0; n < 128; ++n) {
      const unsigned row = thread / 32 * 16 + thread % 32 / 4 + n / 2 % 2 * 8;
      const unsigned column = n / 4 * 8 + thread % 4 * 2 + n % 2;
      float expected = 0.5f;
      for (unsigned k = skipped; k < skipped + 16; ++k) expected += number(row, k) * number(64 + column, k);
      expect(sums[n] == expected, "a product of a warpgroup");
    }
  }
};

void warpgroups(const WarpgroupProduct& product) {
  expect(launch(2, 256, 42 * 1024, 1, product) == cudaSuccess, "launch of warpgroups");
}

void shared_memory() {
  expect(launch(1, 32, 49 * 1024, 1, [] {}) != cudaSuccess, "more than 48 KB must be asked for");
  auto body = [] {};
  const auto kernel = &body_of<decltype(body)>;
  expect(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              49 * 1024) == cudaSuccess,
         "and may be had");
  cudaLaunchConfig_t config = {};
  config.blockDim = 32;
  config.dynamicSmemBytes = 49 * 1024;
  expect(cudaLaunchKernelEx(&config, kernel, &body) == cudaSuccess, "launch above 48 KB");
  expect(cudaFuncSetAttribute(nullptr, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20) != cudaSuccess,
         "but not more than there is");
  launch(2, 32, 128, 1, [] {
    expect(*reinterpret_cast<uint32_t*>(ptx::dynamic_shared() + 4 * threadIdx.x) == 0xffffffffu,
           "shared memory begins as anything but zero");
  });
}

// Two blocks write the same word without order.
void race() {
  uint32_t word = 0;
  launch(2, 32, 0, 1, [&] {
    if (threadIdx.x == 0) word += 1;
  });
}

// One word past the end of shared memory.
void overrun() {
  launch(1, 32, 128, 1, [] { reinterpret_cast<uint32_t*>(ptx::dynamic_shared())[threadIdx.x + 1] = 1; });
}

}  // namespace

int main(int, char** arguments) {
  const std::string what = arguments[1];
  cuda_shim::machine().real_threads = what != "fibers";
  if (what == "race") {
    race();
  } else if (what == "overrun") {
    overrun();
  } else if (what == "hidden") {
    warpgroups({.shows = false});
  } else if (what == "no fence") {
    warpgroups({.begins = false});
  } else if (what == "other matrices") {
    warpgroups({.agrees = false});
  } else if (what == "changed") {
    warpgroups({.spoil = [](char* element) { element[0] ^= 1; }});
  } else if (what == "half a warpgroup") {
    launch(1, 64, 42 * 1024, 1, WarpgroupProduct{});
  } else {
    for (int turn = 0; turn < 3; ++turn) {
      cuda_shim::machine().clusters_at_a_time = turn + 1;
      indices();
      barriers();
      warps();
      atomics();
      tickets();
      clusters();
      copies();
      matrices();
      warpgroups({});
      shared_memory();
    }
  }
  return failures == 0 ? 0 : 1;
}
