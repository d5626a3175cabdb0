// How the kernels of the leaky integrator are launched. backends/integrator_kernels.py decides the same in Python.
#include "cuda/choose.cuh"
#include "cuda/integrator_kernels.cuh"
#include "launch.h"

namespace asgl::cuda {

template <class Scalar>
cudaError_t cut(IntegratorParams<Scalar>& params) {
  bool fours = false;
  cudaError_t error = cudaSuccess;
  if (kHasFours<Scalar> && groups_of_four(params, params.v_seq, params.last, params.grad_v_seq, params.grad_last,
                                          params.grad_x_seq, params.grad_init)) {
    error = fours_pay(params, &fours);
  }
  params.tiles.tile = fours ? 4 * kBlockThreads : kBlockThreads;
  params.tiles.count = blocks_for(params.shape.neurons(), params.tiles.tile);
  return error;
}

template <class Scalar>
cudaError_t launch(const IntegratorParams<Scalar>& params, cudaStream_t stream) {
  void (*kernel)(IntegratorParams<Scalar>) = nullptr;
  const auto choose = [&](auto lanes) {
    kernel = params.grad_v_seq == nullptr ? &integrator_forward_kernel<Scalar, lanes()>
             : params.learns()            ? &integrator_backward_kernel<Scalar, lanes(), true>
                                          : &integrator_backward_kernel<Scalar, lanes(), false>;
  };
  choose(std::integral_constant<int, 1>{});
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.tile > kBlockThreads) choose(std::integral_constant<int, 4>{});
  }
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
