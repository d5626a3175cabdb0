// Starts the kernels that nvcc compiled.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernel.h"

namespace asgl::cuda {

// A function object that starts a compiled kernel. `launch` has the kernel's name and its grid, and `params` points to
// the params struct that the kernel takes.
struct KernelStarter {
  Launch launch;
  const void* params;
  cudaStream_t stream;

  // Starts this function as the kernel of `launch`, and returns the error of the launch.
  template <class Params>
  cudaError_t operator()(void (*kernel)(Params)) const {
    constexpr int64 kMaxBlocks = 0x7FFFFFFF;
    if (launch.blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
    void* arguments[] = {const_cast<void*>(params)};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(launch.blocks)), dim3(launch.threads),
                                               arguments, 0, stream);
    // Clears the error, which a later call would report otherwise. If the launch succeeds, errors that other code has
    // left are not cleared. Errors that can't be cleared, such as an illegal access, are returned by the launch itself.
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
    return error;
  }
};

// Starts a kernel of one type. Each compiled_*.cu instantiates this function for its type. Without the extern
// declarations, nvcc would also instantiate it there for the other types, because the function launch below calls it.
template <class Scalar>
cudaError_t start_compiled(const KernelStarter& starter);
extern template cudaError_t start_compiled<Half>(const KernelStarter& starter);
extern template cudaError_t start_compiled<BFloat16>(const KernelStarter& starter);
extern template cudaError_t start_compiled<float>(const KernelStarter& starter);
extern template cudaError_t start_compiled<double>(const KernelStarter& starter);

// Starts the kernel of `launch`. Returns the error of this launch, not errors that other code has left.
inline cudaError_t launch(const Launch& launch, const void* params, cudaStream_t stream) {
  const KernelStarter starter{launch, params, stream};
  switch (launch.kernel.type) {
    case Type::kHalf:
      return start_compiled<Half>(starter);
    case Type::kBFloat16:
      return start_compiled<BFloat16>(starter);
    case Type::kFloat:
      return start_compiled<float>(starter);
    case Type::kDouble:
      return start_compiled<double>(starter);
  }
  return cudaErrorInvalidValue;
}

}  // namespace asgl::cuda
