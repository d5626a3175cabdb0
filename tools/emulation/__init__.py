"""The CUDA kernels on the CPU, compiled by the host compiler."""
