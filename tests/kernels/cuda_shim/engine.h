// Threads of blocks of a grid, on the CPU.
//
// As fibers, all of them take turns on one thread, in an order that follows from `Machine::seed`, and change places
// only where they wait: fast, repeatable, and every seed is another interleaving. As threads of the operating system
// they run truly side by side, so that ThreadSanitizer sees what is not ordered.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace cuda_shim {

// The device that is played.
struct Machine {
  int processors = 2;
  int blocks_per_processor = 2;
  int shared_limit = 227 * 1024;
  int compute_capability = 9;
  int device = 0;            // its number
  int last_error = 0;        // of CUDA, that nobody has asked for yet
  int calls_to_failure = 0;  // the call of CUDA that fails, counted from here on; 0 for none
  int clusters_at_a_time = 3;  // that really run: one is enough for a kernel that is right
  bool real_threads = false;
  bool order_is_missing = false;  // makes atomics that should order what is around them order nothing
  uint64_t seed = 1;
};

Machine& machine();

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
  Index3() = default;
  Index3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Lets others go on.
void pause(const std::atomic<uint32_t>* changing = nullptr, uint32_t value = 0);

// `count` threads meet, again and again.
class Barrier {
 public:
  explicit Barrier(uint32_t count) : count_(count) {}
  void wait() {
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_acq_rel);
      round_.notify_all();
      return;
    }
    while (round_.load(std::memory_order_acquire) == round) pause(&round_, round);
  }

 private:
  const uint32_t count_;
  std::atomic<uint32_t> arrived_{0};
  std::atomic<uint32_t> round_{0};
};

struct Warp {
  Barrier barrier{32};
  uint64_t values[2][32] = {};  // taken in turns, so that nobody writes what others still read
};

// The 128 threads that give the tensor cores a product together.
struct Warpgroup {
  Barrier barrier{128};
  std::atomic<uint32_t> arrived{0};
  uint64_t matrices[128][2] = {};  // what each of them names
  uint64_t digest = 0;             // of these
};

struct Launch {
  Index3 blocks, threads;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  std::function<void()> body;
};

struct Block;

struct ClusterOfBlocks {
  explicit ClusterOfBlocks(const Launch& launch) : barrier(launch.cluster * launch.threads.x) {}
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Block {
  Block(const Launch& launch_, unsigned index_, ClusterOfBlocks& cluster_);
  ~Block() { std::free(memory); }
  const Launch* launch;
  ClusterOfBlocks* cluster;
  Index3 index;
  Barrier barrier;
  std::atomic<uint32_t> votes[2] = {};
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Warpgroup>> warpgroups;
  std::vector<uint32_t> hidden;  // of 16 bytes of shared memory each: copies that were begun and not shown yet
  char* memory;
  char* shared;  // in memory, of just the size that was asked for, so that AddressSanitizer sees what is past its end
  // Where shared memory begins: in each cluster at another multiple of 128, though on a GPU it is the same in all.
  uint32_t shared_begin() const { return 1024 + 128 * (index.x / launch->cluster % 8); }
};

// A copy that was asked for and has not been done yet.
struct Copy {
  void* to;
  const void* from;
  bool valid;
};

// A product that was asked for and has not been done yet.
struct Product {
  float* sums;
  uint64_t a, b;
  float (*number)(uint32_t bits);
  uint64_t digest;  // of both matrices as they were
};

struct Thread {
  Index3 thread_index;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned collectives = 0;
  unsigned block_votes = 0;
  std::vector<std::vector<Copy>> copies{1};       // by groups, the last one open
  std::vector<std::vector<Product>> products{1};  // likewise
  bool products_begun = false;
  std::vector<const void*> done;  // copies that were waited for and not shown yet: where they went

  unsigned lane() const { return thread_index.x % 32; }
};

Thread& self();

// Ends the program: a GPU would do what nobody can foresee.
[[noreturn]] void refuse(const char* what);

void run(const Launch& launch);

// A kernel gets more than 48 KB of shared memory only after it has been said.
void allow_shared(const void* kernel, int bytes);
int shared_allowed(const void* kernel);

// ---- collectives ----------------------------------------------------------------------------------------------------

// What each lane gives, for all to read until the warp's next collective but one.
template <class Value>
const uint64_t* exchange(uint32_t lanes, Value value) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  if (lanes != 0xffffffffu) std::abort();  // the kernels have only whole warps
  Thread& thread = self();
  uint64_t* values = thread.warp->values[thread.collectives++ % 2];
  uint64_t& own = values[thread.lane()];
  own = 0;
  std::memcpy(&own, &value, sizeof value);
  thread.warp->barrier.wait();
  return values;
}

template <class Value>
Value value_of(uint64_t bits) {
  Value value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Value>
Value read_lane(uint32_t lanes, Value value, unsigned lane) {
  return value_of<Value>(exchange(lanes, value)[lane % 32]);
}

template <class Value, class Fold>
Value fold_lanes(uint32_t lanes, Value value, const Fold& fold) {
  const uint64_t* values = exchange(lanes, value);
  Value result = value_of<Value>(values[0]);
  for (int lane = 1; lane < 32; ++lane) result = fold(result, value_of<Value>(values[lane]));
  return result;
}

// How many threads of the block say yes.
inline uint32_t vote_in_block(bool yes) {
  Thread& thread = self();
  std::atomic<uint32_t>* votes = thread.block->votes;
  const unsigned turn = thread.block_votes++ % 2;
  if (yes) votes[turn].fetch_add(1);
  thread.block->barrier.wait();
  const uint32_t count = votes[turn].load();
  thread.block->barrier.wait();
  if (thread.thread_index.x == 0) votes[turn].store(0);  // read again only after another barrier
  return count;
}

}  // namespace cuda_shim
