// The launchers of batch normalisation. backends/normalisation_kernels.py decides the same in Python.
#pragma once

#include <cuda_runtime.h>

#include "cuda/normalisation_kernels.cuh"
#include "cuda/start.cuh"
#include "launch.h"

namespace asgl::cuda {

// Four columns a thread if of one channel and aligned.
template <class Scalar, class... Gradients>
void plan_channels(ChannelTiles& tiles, int64 rows_each, const Scalar* x_seq, const Gradients*... gradients) {
  const bool fours =
      kHasFours<Scalar> && tiles.shape.inner % 4 == 0 && is_aligned(x_seq) && (is_aligned(gradients) && ...);
  const int lanes = fours ? 4 : 1;
  tiles = ChannelTiles::plan(tiles.shape, lanes, kBlockThreads, rows_each / lanes);
}

template <class Scalar>
cudaError_t plan_on(Device, MomentsParams<Scalar>& params) {
  plan_channels(params.tiles, kMomentsRowsEach, params.x_seq);
  return cudaSuccess;
}

template <class Scalar>
cudaError_t plan_on(Device, InputGradientParams<Scalar>& params) {
  plan_channels(params.tiles, kChannelRowsEach, params.x_seq, params.grad_x_seq, params.grad_residual);
  return cudaSuccess;
}

template <class Scalar>
cudaError_t launch_on(Device, const MomentsParams<Scalar>& params, cudaStream_t stream) {
  auto* kernel = &batch_moments_kernel<Scalar, 1>;
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.lanes == 4) kernel = &batch_moments_kernel<Scalar, 4>;
  }
  return start(kernel, params.tiles.tasks(), kBlockThreads, params, stream);
}

template <class Real>
cudaError_t launch_on(Device, const CoefficientsParams<Real>& params, cudaStream_t stream) {
  return start(&batch_norm_coefficients_kernel<Real>, params.channels, kBlockThreads, params, stream);
}

template <class Real>
cudaError_t launch_on(Device, const RunningParams<Real>& params, cudaStream_t stream) {
  const int64 blocks = blocks_for(params.channels, kBlockThreads);
  return start(&batch_norm_running_kernel<Real>, blocks, kBlockThreads, params, stream);
}

template <class Real>
cudaError_t launch_on(Device, const AdjointParams<Real>& params, cudaStream_t stream) {
  const int64 blocks = blocks_for(params.channels, kBlockThreads);
  return start(&batch_norm_adjoint_kernel<Real>, blocks, kBlockThreads, params, stream);
}

template <class Scalar>
cudaError_t launch_on(Device, const InputGradientParams<Scalar>& params, cudaStream_t stream) {
  const bool residual = params.grad_residual != nullptr;
  auto* kernel = residual ? &batch_norm_input_gradient_kernel<Scalar, 1, true>
                          : &batch_norm_input_gradient_kernel<Scalar, 1, false>;
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.lanes == 4) {
      kernel = residual ? &batch_norm_input_gradient_kernel<Scalar, 4, true>
                        : &batch_norm_input_gradient_kernel<Scalar, 4, false>;
    }
  }
  return start(kernel, params.tiles.tasks(), kBlockThreads, params, stream);
}

}  // namespace asgl::cuda
