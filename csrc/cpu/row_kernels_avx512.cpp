// The inner loops for processors with AVX-512; empty elsewhere.
#if defined(__x86_64__)

#include "row_kernels.h"

// Every header that is not meant for this instruction set stands above this line.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
// GCC 12 takes the deliberately undefined operands inside its own AVX-512 header for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "lanes_avx512.h"

#define DSPA_ISA avx512
#define DSPA_KERNELS row_kernels_avx512
#include "row_kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
