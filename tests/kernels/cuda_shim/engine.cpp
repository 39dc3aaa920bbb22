#include "engine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

namespace cuda_shim {
namespace {

constexpr size_t stack_bytes = 128 * 1024;
constexpr int shared_without_asking = 48 * 1024;

thread_local Thread* current = nullptr;

std::map<std::pair<int, const void*>, int>& allowances() {  // of a device and a kernel
  static std::map<std::pair<int, const void*>, int> instance;
  return instance;
}

// ---- fibers ---------------------------------------------------------------------------------------------------------

struct Fiber {
  Thread thread;
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf place;
  bool begun = false;
  bool done = false;
};

jmp_buf scheduler;
Fiber* running = nullptr;

void begin_fiber() {
  running->thread.block->launch->body();
  running->done = true;
  _longjmp(scheduler, 1);
}

// Goes on with a fiber until it waits or ends.
void go_on(Fiber& fiber) {
  running = &fiber;
  current = &fiber.thread;
  if (_setjmp(scheduler) == 0) {
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.start);
  }
  current = nullptr;
}

class Stacks {
 public:
  std::unique_ptr<char[]> take() {
    if (free_.empty()) return std::unique_ptr<char[]>(new char[stack_bytes]);
    auto stack = std::move(free_.back());
    free_.pop_back();
    return stack;
  }
  void give_back(std::unique_ptr<char[]> stack) { free_.push_back(std::move(stack)); }

 private:
  std::vector<std::unique_ptr<char[]>> free_;
};

// ---- blocks ---------------------------------------------------------------------------------------------------------

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

std::unique_ptr<ClusterOfBlocks> make_cluster(const Launch& launch, unsigned number) {
  auto cluster = std::make_unique<ClusterOfBlocks>(launch);
  for (unsigned rank = 0; rank < launch.cluster; ++rank)
    cluster->blocks.push_back(std::make_unique<Block>(launch, number * launch.cluster + rank, *cluster));
  return cluster;
}

template <class Visit>
void for_each_thread(ClusterOfBlocks& cluster, const Visit& visit) {
  for (auto& block : cluster.blocks) {
    for (unsigned t = 0; t < block->launch->threads.x; ++t) {
      Thread thread;
      thread.thread_index = {t, 0, 0};
      thread.block = block.get();
      thread.warp = block->warps[t / 32].get();
      visit(std::move(thread));
    }
  }
}

// Clusters in the order in which they start.
std::vector<unsigned> shuffled(unsigned count, uint64_t& random) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[next_random(random) % i]);
  return order;
}

void run_as_fibers(const Launch& launch, const std::vector<unsigned>& order, uint64_t random) {
  struct Running {
    std::unique_ptr<ClusterOfBlocks> cluster;
    std::vector<std::unique_ptr<Fiber>> fibers;
  };
  static Stacks stacks;
  std::vector<Running> active;
  size_t next = 0;
  while (next < order.size() || !active.empty()) {
    while (next < order.size() && active.size() < static_cast<size_t>(machine().clusters_at_a_time)) {
      Running started{make_cluster(launch, order[next++]), {}};
      for_each_thread(*started.cluster, [&](Thread thread) {
        auto fiber = std::make_unique<Fiber>();
        fiber->thread = std::move(thread);
        fiber->stack = stacks.take();
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = fiber->stack.get();
        fiber->start.uc_stack.ss_size = stack_bytes;
        fiber->start.uc_link = nullptr;
        makecontext(&fiber->start, begin_fiber, 0);
        started.fibers.push_back(std::move(fiber));
      });
      active.push_back(std::move(started));
    }
    // One cluster goes on for a random while, from a random thread of it on.
    Running& chosen = active[next_random(random) % active.size()];
    const size_t count = chosen.fibers.size(), first = next_random(random) % count;
    for (uint64_t round = next_random(random) % 8 + 1; round > 0; --round)
      for (size_t i = 0; i < count; ++i)
        if (Fiber& fiber = *chosen.fibers[(first + i) % count]; !fiber.done) go_on(fiber);
    if (std::all_of(chosen.fibers.begin(), chosen.fibers.end(), [](const auto& fiber) { return fiber->done; })) {
      for (auto& fiber : chosen.fibers) stacks.give_back(std::move(fiber->stack));
      std::swap(chosen, active.back());
      active.pop_back();
    }
  }
}

// The threads of a processor run one cluster after another: starting them takes longer than most blocks. Clusters are
// dealt out beforehand, and no thread begins before all are there, with the first cluster of each processor. So
// neighbours run on different threads, none of which has taken the place of another, and nothing orders the first ones,
// not even a lock for memory: then ThreadSanitizer sees what they share.
void run_as_threads(const Launch& launch, const std::vector<unsigned>& order) {
  struct Processor {
    explicit Processor(uint32_t count) : barrier(count) {}
    Barrier barrier;
    size_t next = 0;                           // place of its next cluster
    std::unique_ptr<ClusterOfBlocks> cluster;  // none when there are no more
    std::vector<Thread> threads;               // of the cluster
  };
  const auto take_cluster = [&](Processor& processor) {
    const size_t place = processor.next;
    processor.next += machine().clusters_at_a_time;
    processor.threads.clear();
    processor.cluster = place < order.size() ? make_cluster(launch, order[place]) : nullptr;
    if (processor.cluster != nullptr)
      for_each_thread(*processor.cluster, [&](Thread thread) { processor.threads.push_back(std::move(thread)); });
  };
  std::mutex mutex;
  std::condition_variable all_are_there;
  bool begun = false;
  const auto run_clusters = [&](Processor& processor, unsigned number) {
    {
      std::unique_lock<std::mutex> lock(mutex);
      all_are_there.wait(lock, [&] { return begun; });
    }
    while (processor.cluster != nullptr) {
      current = &processor.threads[number];
      launch.body();
      processor.barrier.wait();
      if (number == 0) take_cluster(processor);
      processor.barrier.wait();
    }
  };
  const unsigned count = launch.cluster * launch.threads.x;
  std::vector<std::unique_ptr<Processor>> processors;
  std::vector<std::thread> threads;
  for (int i = 0; i < machine().clusters_at_a_time; ++i) {
    processors.push_back(std::make_unique<Processor>(count));
    processors.back()->next = i;
    take_cluster(*processors.back());
    for (unsigned number = 0; number < count; ++number)
      threads.emplace_back(run_clusters, std::ref(*processors.back()), number);
  }
  {
    const std::lock_guard<std::mutex> lock(mutex);
    begun = true;
  }
  all_are_there.notify_all();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

Machine& machine() {
  static Machine instance;
  return instance;
}

Thread& self() { return *current; }

void pause(const std::atomic<uint32_t>* changing, uint32_t value) {
  if (machine().real_threads) {
    if (changing != nullptr)
      changing->wait(value, std::memory_order_acquire);
    else
      std::this_thread::yield();
    return;
  }
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
}

Block::Block(const Launch& launch_, unsigned index_, ClusterOfBlocks& cluster_)
    : launch(&launch_), cluster(&cluster_), index(index_, 0, 0), barrier(launch_.threads.x) {
  for (unsigned w = 0; w < launch_.threads.x / 32; ++w) warps.push_back(std::make_unique<Warp>());
  for (unsigned g = 0; g < launch_.threads.x / 128; ++g) warpgroups.push_back(std::make_unique<Warpgroup>());
  const size_t bytes = std::max<size_t>((launch_.shared_bytes + 127) / 128 * 128, 128), skipped = shared_begin() % 1024;
  hidden.resize(bytes / 16);
  void* allocated = nullptr;
  if (posix_memalign(&allocated, 1024, skipped + bytes) != 0) std::abort();
  memory = static_cast<char*>(allocated);
  shared = memory + skipped;
  std::memset(shared, 0xff, bytes);  // NaN, and large numbers: what a block finds is not zero
}

void refuse(const char* what) {
  std::fprintf(stderr, "undefined on a GPU: %s\n", what);
  std::abort();
}

void run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  uint64_t random = machine().seed * 0x9e3779b97f4a7c15ull + 1;
  const std::vector<unsigned> order = shuffled(launch.blocks.x / launch.cluster, random);
  if (machine().real_threads)
    run_as_threads(launch, order);
  else
    run_as_fibers(launch, order, random);
  machine().seed += 1;  // the next launch runs in another order
}

void allow_shared(const void* kernel, int bytes) { allowances()[{machine().device, kernel}] = bytes; }

int shared_allowed(const void* kernel) {
  const auto found = allowances().find({machine().device, kernel});
  return found == allowances().end() ? shared_without_asking : found->second;
}

}  // namespace cuda_shim

// For the tests, which have no other way in.
extern "C" __attribute__((visibility("default"))) void cuda_shim_configure(int clusters_at_a_time, int processors,
                                                                           int shared_limit, int compute_capability,
                                                                           uint64_t seed, int device,
                                                                           int calls_to_failure) {
  cuda_shim::Machine& machine = cuda_shim::machine();
  machine.clusters_at_a_time = clusters_at_a_time;
  machine.processors = processors;
  machine.shared_limit = shared_limit;
  machine.compute_capability = compute_capability;
  machine.seed = seed;
  machine.device = device;
  machine.calls_to_failure = calls_to_failure;
}

extern "C" __attribute__((visibility("default"))) int cuda_shim_last_error() { return cuda_shim::machine().last_error; }
