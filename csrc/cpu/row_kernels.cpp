// The choice of the inner loops for this processor.
#include "row_kernels.h"

#include <cstdlib>
#include <cstring>

namespace dspa::cpu {

extern const RowKernels row_kernels_portable;
#if defined(__x86_64__)
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;
#endif

namespace {

#if defined(__x86_64__)
// DSPA_CPU_CAPABILITY=avx2 or portable limits the instruction set, for tests and comparisons.
bool allowed(const char* capability) {
  const char* limit = std::getenv("DSPA_CPU_CAPABILITY");
  if (limit == nullptr || std::strcmp(limit, "avx512") == 0) return true;
  return std::strcmp(limit, "avx2") == 0 && std::strcmp(capability, "avx2") == 0;
}
#endif

const RowKernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && allowed("avx512")) return row_kernels_avx512;
  if (avx2 && allowed("avx2")) return row_kernels_avx2;
#endif
  return row_kernels_portable;
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

}  // namespace dspa::cpu
