// The launchers of batch normalisation, the bridge between operators and kernels. They check nothing:
// batch_norm_ops.h has.
#pragma once

#include "batch_norm_params.h"

namespace asgl::cpu {

ChannelTiles channel_tiles(const ChannelShape& shape);

template <class Scalar>
void launch_moments(const MomentsParams<Scalar>& params);

template <class Real>
void launch_coefficients(const CoefficientsParams<Real>& params);

template <class Real>
void launch_adjoint(const AdjointParams<Real>& params);

template <class Scalar>
void launch_input_gradient(const InputGradientParams<Scalar>& params);

}  // namespace asgl::cpu
