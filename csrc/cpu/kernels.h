// What the operators call of the CPU's kernels. Arguments are checked in ops.
#pragma once

#include "params/gradient.h"
#include "params/integrator.h"
#include "params/normalisation.h"
#include "params/recurrent.h"

namespace asgl::cpu {

// plan_tiles(params) divides values into tiles, and launch(params) runs the kernel for params: ForwardParams,
// BackwardParams, GradientSum, IntegratorParams, MomentsParams, CoefficientsParams and InputGradientParams.
template <class Params>
void plan_tiles(Params& params);
template <class Params>
void launch(const Params& params);

template <class Scalar>
void recurrent_forward(const RecurrentForwardParams<Scalar>& params);
template <class Scalar>
void recurrent_backward(const RecurrentBackwardParams<Scalar>& params);

int num_threads();

}  // namespace asgl::cpu
