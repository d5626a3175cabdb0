"""The CUDA kernels run on the CPU by the host compiler."""
