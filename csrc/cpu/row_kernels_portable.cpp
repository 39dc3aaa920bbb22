// The inner loops for any processor.
#include "row_kernels.h"

#include "lanes_portable.h"

#define DSPA_ISA portable
#define DSPA_KERNELS row_kernels_portable
#include "row_kernels_impl.h"
