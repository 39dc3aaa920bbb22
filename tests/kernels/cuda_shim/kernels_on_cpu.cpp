// The CUDA sources as they are, compiled with the stand-in for CUDA's header.
#include "cuda/adapter_step.cu"
#include "cuda/encode_density.cu"
#include "cuda/lookup.cu"
#include "cuda/token_step.cu"
