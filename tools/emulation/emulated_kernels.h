// The kernels by name, for whatever finds them at run time.
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

// It is null if there is no kernel of this name.
const EmulatedKernel* find_kernel(const char* name);

// The name of the kernel at this address; it is empty if there is none of ours.
const char* kernel_name(const void* address);

}  // namespace asgl_emulation
