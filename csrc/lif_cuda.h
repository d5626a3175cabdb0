// The launchers of the CUDA kernels, free of torch. A call checks nothing: ops.h has. What it returns is the error of
// its own launch.
#pragma once

#include <cuda_runtime.h>

#include "lif_launch.h"

namespace asgl::cuda {

// For parameters whose partial sums are not allocated yet.
template <class Scalar>
cudaError_t backward_tiles(const BackwardParams<Scalar>& params, TilePlan* plan);

template <class Scalar>
cudaError_t launch_forward(Surrogate surrogate, bool hard_reset, const ForwardParams<Scalar>& params,
                           cudaStream_t stream);

template <class Scalar>
cudaError_t launch_backward(Surrogate surrogate, bool hard_reset, const BackwardParams<Scalar>& params,
                            cudaStream_t stream);

template <class Real>
cudaError_t launch_gradient_sum(const GradientSum<Real>& sum, cudaStream_t stream);

}  // namespace asgl::cuda
