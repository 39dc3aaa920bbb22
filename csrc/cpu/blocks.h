// The rows of a weight matrix in blocks that fit a cache, distributed over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "parallel.h"

namespace dspa::cpu {

inline constexpr int64_t bytes_per_block = 256 * 1024;
inline constexpr int64_t rows_at_once = 8;

// The rows of a matrix in blocks, distributed over the threads. A thread takes its next block early, to prefetch it.
class Blocks {
 public:
  Blocks(int64_t rows, int64_t row_bytes)
      : rows_(rows),
        block_rows_(std::clamp<int64_t>(bytes_per_block / std::max<int64_t>(row_bytes, 1) / rows_at_once * rows_at_once,
                                        rows_at_once, 1024)) {}

  int64_t block_rows() const { return block_rows_; }

  // `work(first, count, upcoming)` until no block is left or it returns false; upcoming is -1 for none.
  template <class Work>
  void for_each(const Work& work) {
    int64_t first = next_.fetch_add(block_rows_);
    while (first < rows_) {
      const int64_t upcoming = next_.fetch_add(block_rows_);
      if (!work(first, std::min(block_rows_, rows_ - first), upcoming < rows_ ? upcoming : -1)) return;
      first = upcoming;
    }
  }

  // Calls `work()` on the threads of the pool, or on the calling one if there is only one block.
  template <class Work>
  void on_threads(const ThreadPool& pool, const Work& work) const {
    (rows_ <= block_rows_ ? calling_thread : pool).on_each_thread(work);
  }

 private:
  int64_t rows_;
  int64_t block_rows_;
  std::atomic<int64_t> next_{0};
};

}  // namespace dspa::cpu
