"""The source of the CUDA kernels, compiled by the host compiler and run on the CPU."""
