"""A stand-in for CUDA that runs the kernels of `csrc/cuda` on the CPU, for the tests alone."""
