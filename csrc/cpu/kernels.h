// The functions through which the operators (csrc/ops) call the CPU kernels. The functions for products of spikes are
// in cpu/spikes.h. The operators have checked the arguments.
#pragma once

#include "params/gradient.h"
#include "params/integrator.h"
#include "params/normalisation.h"
#include "params/recurrent.h"

namespace asgl::cpu {

// plan_tiles(params) divides the neurons or channels into tiles, and launch(params) runs the kernel. Both are
// instantiated for ForwardParams, BackwardParams, GradientSum, IntegratorParams, MomentsParams and InputGradientParams.
// launch is also instantiated for CoefficientsParams.
template <class Params>
void plan_tiles(Params& params);
template <class Params>
void launch(const Params& params);

// The kernels of recurrent neurons. The equations are in params/recurrent.h.
template <class Scalar>
void recurrent_forward(const RecurrentForwardParams<Scalar>& params);
template <class Scalar>
void recurrent_backward(const RecurrentBackwardParams<Scalar>& params);

}  // namespace asgl::cpu
