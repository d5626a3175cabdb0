// How the kernels of the leaky integrator are launched. backends/integrator_kernels.py decides the same in Python.
#include "cuda/choose.cuh"
#include "cuda/integrator_kernels.cuh"
#include "launch.h"

namespace asgl::cuda {
namespace {

template <class Scalar, class Params, class... Places>
cudaError_t cut_integrator(Params& params, const Places&... sequences_and_states) {
  bool fours = false;
  cudaError_t error = cudaSuccess;
  if (kHasFours<Scalar> && groups_of_four(params, sequences_and_states...)) error = fours_pay(params, &fours);
  params.tiles.tile = fours ? 4 * kBlockThreads : kBlockThreads;
  params.tiles.count = blocks_for(params.shape.neurons(), params.tiles.tile);
  return error;
}

}  // namespace

template <class Scalar>
cudaError_t cut(IntegratorForwardParams<Scalar>& params) {
  return cut_integrator<Scalar>(params, params.v_seq, params.last);
}

template <class Scalar>
cudaError_t cut(IntegratorBackwardParams<Scalar>& params) {
  return cut_integrator<Scalar>(params, params.grad_v_seq, params.grad_last, params.v_seq, params.grad_x_seq,
                                params.grad_init);
}

template <class Scalar>
cudaError_t launch(const IntegratorForwardParams<Scalar>& params, cudaStream_t stream) {
  auto* kernel = &integrator_forward_kernel<Scalar, 1>;
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.tile > kBlockThreads) kernel = &integrator_forward_kernel<Scalar, 4>;
  }
  return start(kernel, params.tiles.count, kBlockThreads, params, stream);
}

template <class Scalar>
cudaError_t launch(const IntegratorBackwardParams<Scalar>& params, cudaStream_t stream) {
  const bool learns = params.wants(kDecay) || params.wants(kInputGain);
  auto* kernel = learns ? &integrator_backward_kernel<Scalar, 1, true> : &integrator_backward_kernel<Scalar, 1, false>;
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.tile > kBlockThreads) {
      kernel = learns ? &integrator_backward_kernel<Scalar, 4, true> : &integrator_backward_kernel<Scalar, 4, false>;
    }
  }
  return start(kernel, params.tiles.count, kBlockThreads, params, stream);
}

template cudaError_t cut(IntegratorForwardParams<Half>&);
template cudaError_t launch(const IntegratorForwardParams<Half>&, cudaStream_t);
template cudaError_t cut(IntegratorBackwardParams<Half>&);
template cudaError_t launch(const IntegratorBackwardParams<Half>&, cudaStream_t);
template cudaError_t cut(IntegratorForwardParams<BFloat16>&);
template cudaError_t launch(const IntegratorForwardParams<BFloat16>&, cudaStream_t);
template cudaError_t cut(IntegratorBackwardParams<BFloat16>&);
template cudaError_t launch(const IntegratorBackwardParams<BFloat16>&, cudaStream_t);
template cudaError_t cut(IntegratorForwardParams<float>&);
template cudaError_t launch(const IntegratorForwardParams<float>&, cudaStream_t);
template cudaError_t cut(IntegratorBackwardParams<float>&);
template cudaError_t launch(const IntegratorBackwardParams<float>&, cudaStream_t);
template cudaError_t cut(IntegratorForwardParams<double>&);
template cudaError_t launch(const IntegratorForwardParams<double>&, cudaStream_t);
template cudaError_t cut(IntegratorBackwardParams<double>&);
template cudaError_t launch(const IntegratorBackwardParams<double>&, cudaStream_t);

}  // namespace asgl::cuda
