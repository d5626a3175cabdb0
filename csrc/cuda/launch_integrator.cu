// The launchers of the leaky integrator. backends/integrator_kernels.py decides the same in Python.
#include <cuda_runtime.h>

#include "cuda/integrator_kernels.cuh"
#include "cuda/plan_neurons.cuh"
#include "launch.h"

namespace asgl::cuda {

template <class Scalar>
cudaError_t plan_on(Device, IntegratorParams<Scalar>& params) {
  const bool grouped = groups_of_four(params, params.v_seq, params.v_last, params.grad_v_seq, params.grad_v_last,
                                      params.grad_x_seq, params.grad_v_init);
  return plan_with_sums(params, grouped && share_parameters(params));
}

template <class Scalar>
cudaError_t launch_on(Device, const IntegratorParams<Scalar>& params, cudaStream_t stream) {
  void (*kernel)(IntegratorParams<Scalar>) = nullptr;
  with_pass(params.pass(), [&](auto pass) {
    kernel = &integrator_kernel<Scalar, 1, pass()>;
    if constexpr (kHasFours<Scalar>) {
      if (params.tiles.tile > kBlockThreads) kernel = &integrator_kernel<Scalar, 4, pass()>;
    }
  });
  return start(kernel, params.tiles.count, kBlockThreads, params, stream);
}

template cudaError_t plan_tiles(IntegratorParams<Half>&);
template cudaError_t plan_tiles(IntegratorParams<BFloat16>&);
template cudaError_t plan_tiles(IntegratorParams<float>&);
template cudaError_t plan_tiles(IntegratorParams<double>&);
template cudaError_t launch(const IntegratorParams<Half>&, cudaStream_t);
template cudaError_t launch(const IntegratorParams<BFloat16>&, cudaStream_t);
template cudaError_t launch(const IntegratorParams<float>&, cudaStream_t);
template cudaError_t launch(const IntegratorParams<double>&, cudaStream_t);

}  // namespace asgl::cuda
