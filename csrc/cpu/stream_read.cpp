#include "stream_read.h"

#include <algorithm>
#include <atomic>

#include "row_kernels.h"

namespace dspa::cpu {

uint64_t stream_read(const char* data, int64_t bytes, const ThreadPool& pool) {
  constexpr int64_t block = 1024 * 1024;
  const int64_t whole = bytes / 256 * 256;
  std::atomic<uint64_t> sum{0};
  pool.for_each((whole + block - 1) / block, [&](int64_t index) {
    sum ^= row_kernels().fold(data + index * block, std::min(block, whole - index * block));
  });
  return sum;
}

}  // namespace dspa::cpu
