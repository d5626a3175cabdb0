// Starts the kernels that nvcc compiled.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernel.h"

namespace asgl::cuda {

// The arguments of a launch. `params` points to the params struct that the kernel takes.
struct Start {
  Launch launch;
  const void* params;
  cudaStream_t stream;

  // Starts the kernel, and returns the error of the launch.
  template <class Params>
  cudaError_t operator()(void (*kernel)(Params)) const {
    constexpr int64 kMostBlocks = 0x7FFFFFFF;
    if (launch.blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
    void* arguments[] = {const_cast<void*>(params)};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(launch.blocks)), dim3(launch.threads),
                                               arguments, 0, stream);
    // Clears the error, which a later call would report otherwise. Errors of earlier calls of other code are not
    // cleared. Errors that can't be cleared, such as an illegal access, are returned by the launch itself.
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
    return error;
  }
};

// Starts a kernel for one type. Only compiled_*.cu instantiate it: without the declarations as extern, nvcc would also
// instantiate it for the calls below.
template <class Scalar>
cudaError_t start_compiled(const Start& start);
extern template cudaError_t start_compiled<Half>(const Start& start);
extern template cudaError_t start_compiled<BFloat16>(const Start& start);
extern template cudaError_t start_compiled<float>(const Start& start);
extern template cudaError_t start_compiled<double>(const Start& start);

// Starts the kernel of `launch`. Returns the error of this launch alone.
inline cudaError_t launch(const Launch& launch, const void* params, cudaStream_t stream) {
  const Start start{launch, params, stream};
  switch (launch.kernel.type) {
    case Type::kHalf:
      return start_compiled<Half>(start);
    case Type::kBFloat16:
      return start_compiled<BFloat16>(start);
    case Type::kFloat:
      return start_compiled<float>(start);
    case Type::kDouble:
      return start_compiled<double>(start);
  }
  return cudaErrorInvalidValue;
}

}  // namespace asgl::cuda
