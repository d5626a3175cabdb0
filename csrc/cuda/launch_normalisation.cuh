// The launchers of batch normalisation, which name every kernel for nvcc.
#pragma once

#include <cuda_runtime.h>

#include "cuda/normalisation_kernels.cuh"
#include "cuda/start.cuh"

namespace asgl::cuda {

template <class Scalar>
cudaError_t launch_moments(const Start& start) {
  if constexpr (kHasFours<Scalar>) {
    if (start.launch.kernel.lanes == 4) return start(&batch_moments_kernel<Scalar, 4>);
  }
  return start(&batch_moments_kernel<Scalar, 1>);
}

template <class Scalar>
cudaError_t launch_input_gradient(const Start& start) {
  const Kernel& kernel = start.launch.kernel;
  if constexpr (kHasFours<Scalar>) {
    if (kernel.lanes == 4) {
      return kernel.residual ? start(&batch_norm_input_gradient_kernel<Scalar, 4, true>)
                             : start(&batch_norm_input_gradient_kernel<Scalar, 4, false>);
    }
  }
  return kernel.residual ? start(&batch_norm_input_gradient_kernel<Scalar, 1, true>)
                         : start(&batch_norm_input_gradient_kernel<Scalar, 1, false>);
}

}  // namespace asgl::cuda
