// The CPU kernels of batch normalisation in the place of the CUDA ones, so that the tests of these are theirs, too.
#pragma once

#include "batch_norm_cpu.cpp"
#include "cpu_test.h"

namespace asgl::cuda {

template <class Scalar>
ChannelTiles channel_tiles(const ChannelShape& shape, const Scalar*, const Scalar*) {
  return cpu::channel_tiles(shape);
}

template <class Scalar>
cudaError_t launch_moments(const MomentsParams<Scalar>& params, cudaStream_t) {
  cpu::launch_moments(params);
  return cudaSuccess;
}

template <class Real>
cudaError_t launch_coefficients(const CoefficientsParams<Real>& params, cudaStream_t) {
  cpu::launch_coefficients(params);
  return cudaSuccess;
}

template <class Real>
cudaError_t launch_adjoint(const AdjointParams<Real>& params, cudaStream_t) {
  cpu::launch_adjoint(params);
  return cudaSuccess;
}

template <class Scalar>
cudaError_t launch_input_gradient(const InputGradientParams<Scalar>& params, cudaStream_t) {
  cpu::launch_input_gradient(params);
  return cudaSuccess;
}

}  // namespace asgl::cuda
