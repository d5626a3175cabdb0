// The launchers of the CUDA kernels of batch normalisation, free of torch. A call checks nothing: batch_norm_ops.h has.
// What it returns is the error of its own launch.
#pragma once

#include <cuda_runtime.h>

#include "batch_norm_launch.h"

namespace asgl::cuda {

// The gradient of x is null where there is none.
template <class Scalar>
ChannelTiles channel_tiles(const ChannelShape& shape, const Scalar* x_seq, const Scalar* grad_x_seq);

template <class Scalar>
cudaError_t launch_moments(const MomentsParams<Scalar>& params, cudaStream_t stream);

template <class Real>
cudaError_t launch_coefficients(const CoefficientsParams<Real>& params, cudaStream_t stream);

template <class Real>
cudaError_t launch_adjoint(const AdjointParams<Real>& params, cudaStream_t stream);

template <class Scalar>
cudaError_t launch_input_gradient(const InputGradientParams<Scalar>& params, cudaStream_t stream);

}  // namespace asgl::cuda
