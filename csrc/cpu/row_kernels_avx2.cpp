// The inner loops for processors with AVX2, FMA and F16C; empty elsewhere.
#if defined(__x86_64__)

#include "row_kernels.h"

// Every header that is not meant for this instruction set stands above this line.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "lanes_avx2.h"

#define DSPA_ISA avx2
#define DSPA_KERNELS row_kernels_avx2
#include "row_kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
