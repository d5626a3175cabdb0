// The CPU kernels of recurrent neurons.
#pragma once

#include "params/recurrent.h"

namespace asgl::cpu {

template <class Scalar>
void recurrent_forward(const RecurrentForwardParams<Scalar>& params);
template <class Scalar>
void recurrent_backward(const RecurrentBackwardParams<Scalar>& params);

}  // namespace asgl::cpu
