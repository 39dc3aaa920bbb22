// Put before the kernels where they are compiled without optimisation, to count branches: the shim itself is optimised.
#pragma once

#pragma GCC push_options
#pragma GCC optimize("O2")
#include <cuda_runtime.h>
#include <ptx_on_cpu.h>
#pragma GCC pop_options
