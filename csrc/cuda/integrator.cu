// How the kernels of the leaky integrator are launched. backends/integrator_kernels.py decides the same in Python.
#include "cuda/choose.cuh"
#include "cuda/integrator_kernels.cuh"
#include "launch.h"

namespace asgl::cuda {

template <class Scalar>
cudaError_t cut(IntegratorParams<Scalar>& params) {
  return cut_with_sums(params);
}

template <class Scalar>
cudaError_t launch(const IntegratorParams<Scalar>& params, cudaStream_t stream) {
  void (*kernel)(IntegratorParams<Scalar>) = nullptr;
  with_pass(params.pass(), [&](auto pass) {
    kernel = &integrator_kernel<Scalar, 1, pass()>;
    if constexpr (kHasFours<Scalar>) {
      if (params.tiles.tile > kBlockThreads) kernel = &integrator_kernel<Scalar, 4, pass()>;
    }
  });
  return start(kernel, params.tiles.count, kBlockThreads, params, stream);
}

template cudaError_t cut(IntegratorParams<Half>&);
template cudaError_t cut(IntegratorParams<BFloat16>&);
template cudaError_t cut(IntegratorParams<float>&);
template cudaError_t cut(IntegratorParams<double>&);
template cudaError_t launch(const IntegratorParams<Half>&, cudaStream_t);
template cudaError_t launch(const IntegratorParams<BFloat16>&, cudaStream_t);
template cudaError_t launch(const IntegratorParams<float>&, cudaStream_t);
template cudaError_t launch(const IntegratorParams<double>&, cudaStream_t);

}  // namespace asgl::cuda
