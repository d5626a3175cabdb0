// The kernels by name, for lookup at run time.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <map>
#include <string>

namespace asgl_emulation {

struct EmulatedKernel {
  std::size_t params_bytes;
  std::function<cudaError_t(unsigned blocks, unsigned threads, const void* params)> launch;
};

// Null for an unknown name.
const EmulatedKernel* find_kernel(const char* name);

// The name of the kernel at this address, or empty.
const char* kernel_name(const void* address);

}  // namespace asgl_emulation
