// Starts the kernels that nvcc compiled.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernel.h"

namespace asgl::cuda {

// The arguments of a launcher. `params` are those of the kernel.
struct Start {
  Launch launch;
  const void* params;
  cudaStream_t stream;

  template <class Params>
  cudaError_t operator()(void (*kernel)(Params)) const {
    constexpr int64 kMostBlocks = 0x7FFFFFFF;
    if (launch.blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
    void* arguments[] = {const_cast<void*>(params)};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(launch.blocks)), dim3(launch.threads),
                                               arguments, 0, stream);
    // Cleared, or a later call would report it. An error of others stays for them; one that outlasts this, as of an
    // illegal access, is returned by the launch itself.
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
    return error;
  }
};

// The launchers for one type of x_seq, instantiated in launch_*.cu.
template <class Scalar>
cudaError_t launch_for(const Start& start);
template <class Scalar>
cudaError_t launch_integrator(const Start& start);

// The error is that of this launch alone.
inline cudaError_t launch(const Launch& launch, const void* params, cudaStream_t stream) {
  const Start start{launch, params, stream};
  switch (launch.kernel.type) {
    case Type::kHalf:
      return launch_for<Half>(start);
    case Type::kBFloat16:
      return launch_for<BFloat16>(start);
    case Type::kFloat:
      return launch_for<float>(start);
    case Type::kDouble:
      return launch_for<double>(start);
  }
  return cudaErrorInvalidValue;
}

}  // namespace asgl::cuda
