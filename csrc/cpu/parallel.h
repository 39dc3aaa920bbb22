// Work distributed over a thread pool: torch's through the binding, one thread elsewhere.
#pragma once

#include <atomic>
#include <cstdint>

namespace dspa::cpu {

// Calls `task(context)` once on each of up to `threads` threads and returns when all are done.
struct ThreadPool {
  int threads = 1;
  void (*run)(int threads, void (*task)(void*), void* context) = nullptr;

  template <class Task>
  void on_each_thread(const Task& task) const {
    if (threads == 1 || run == nullptr) {
      task();
    } else {
      run(threads, [](void* context) { (*static_cast<const Task*>(context))(); },
          const_cast<void*>(static_cast<const void*>(&task)));
    }
  }

  // `task(index)` for each index below count. A thread takes the next index when it is free, so a busy core
  // does not delay the others; tasks must not depend on which thread runs them.
  template <class Task>
  void for_each(int64_t count, const Task& task) const {
    if (count == 1) {
      task(int64_t{0});
      return;
    }
    std::atomic<int64_t> next{0};
    on_each_thread([&] {
      for (int64_t index = next++; index < count; index = next++) task(index);
    });
  }
};

inline constexpr ThreadPool calling_thread{};

}  // namespace dspa::cpu
