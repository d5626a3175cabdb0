// The launchers of the leaky integrator, which name every kernel for nvcc.
#include <cuda_runtime.h>

#include "cuda/integrator_kernels.cuh"
#include "cuda/start.cuh"
#include "launch.h"

namespace asgl::cuda {

template <class Scalar>
cudaError_t launch_integrator(const Start& start) {
  cudaError_t error = cudaErrorInvalidValue;
  with_pass(start.launch.kernel.pass, [&](auto pass) {
    if constexpr (kHasFours<Scalar>) {
      if (start.launch.kernel.lanes == 4) {
        error = start(&integrator_kernel<Scalar, 4, pass()>);
        return;
      }
    }
    error = start(&integrator_kernel<Scalar, 1, pass()>);
  });
  return error;
}

template cudaError_t launch_integrator<Half>(const Start&);
template cudaError_t launch_integrator<BFloat16>(const Start&);
template cudaError_t launch_integrator<float>(const Start&);
template cudaError_t launch_integrator<double>(const Start&);

}  // namespace asgl::cuda
