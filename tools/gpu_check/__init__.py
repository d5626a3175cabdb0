"""Builds, tests and times the CUDA kernels on a machine with a GPU."""
