"""What the Triton kernels of several operations share."""
