// The launchers for every model: the type of params is the kernel. What they are made for is in the files launch_*.cu,
// one a type, which compile side by side.
#pragma once

#include "cuda/choose.cuh"
#include "launch.h"

namespace asgl::cuda {

template <class Scalar>
cudaError_t launch(const ForwardParams<Scalar>& params, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_model(params.options, [&](auto model) { error = launch(model, params, stream); });
  return error;
}

template <class Scalar>
cudaError_t launch(const BackwardParams<Scalar>& params, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_model(params.options, [&](auto model) { error = launch(model, params, stream); });
  return error;
}

}  // namespace asgl::cuda
