// The CPU kernels of the neuron in the place of the CUDA ones, so that the tests of these are theirs, too.
#pragma once

#include "cpu_test.h"
#include "lif_cpu.cpp"

namespace asgl::cuda {

template <Surrogate kSurrogate, bool kHardReset, class Scalar>
cudaError_t launch_forward(const ForwardParams<Scalar>& params, cudaStream_t) {
  cpu::launch_forward(kSurrogate, kHardReset, params);
  return cudaSuccess;
}

template <class Scalar>
cudaError_t backward_tiles(const BackwardParams<Scalar>& params, TilePlan* plan) {
  *plan = cpu::backward_tiles(params.shape);
  return cudaSuccess;
}

template <Surrogate kSurrogate, bool kHardReset, class Scalar>
cudaError_t launch_backward(const BackwardParams<Scalar>& params, cudaStream_t) {
  cpu::launch_backward(kSurrogate, kHardReset, params);
  return cudaSuccess;
}

template <class Real>
cudaError_t launch_gradient_sum(const GradientSum<Real>& sum, cudaStream_t) {
  cpu::launch_gradient_sum(sum);
  return cudaSuccess;
}

}  // namespace asgl::cuda
