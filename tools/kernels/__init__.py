"""The code that nvcc and NVRTC make of the CUDA kernels: registers, spills, faults."""
