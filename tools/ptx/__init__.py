"""The PTX of the CUDA kernels run on the CPU."""
