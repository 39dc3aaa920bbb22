// Reads memory and does nothing else: the bandwidth that a pass over W_enc is compared with.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace dspa::cpu {

// Exclusive or of the data but for a tail of less than 256 bytes.
uint64_t stream_read(const char* data, int64_t bytes, const ThreadPool& pool);

}  // namespace dspa::cpu
