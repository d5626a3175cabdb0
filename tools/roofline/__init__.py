"""The bound of each CUDA kernel from its bytes and instructions."""
