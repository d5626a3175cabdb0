"""The code of the CUDA kernels by nvcc and NVRTC: registers, spills, faults."""
