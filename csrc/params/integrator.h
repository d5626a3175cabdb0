// Arguments of the kernels of the leaky integrator. Of the neuron's arguments (params/neuron.h), the integrator's
// equations use decay, input_gain, v_rest, logit_decay, x_seq and v_init.
#pragma once

#include "math/integrator.h"
#include "params/neuron.h"

namespace asgl {

enum class Pass { kForward, kBackward, kSums };  // kSums: backward, and decay or input_gain wants a gradient

// The arguments of the integrator's forward pass if grad_v_seq is null, or else of its backward pass. In backward, a
// null grad_v_last means zero, and a gradient whose pointer is null is not computed. Backward reads v_seq only for the
// gradient of decay, and x_seq only for the gradient of input_gain.
template <class Scalar>
struct IntegratorParams : LIFParams<Scalar> {
  using typename LIFParams<Scalar>::Real;
  bool delay;
  Scalar* v_seq;             // [outer, T, inner], after each step, or with delay before it
  Real* v_last;              // [N]
  const Scalar* grad_v_seq;  // [outer, T, inner]; null in forward
  const Real* grad_v_last;   // [N]
  Scalar* grad_x_seq;        // [outer, T, inner]
  Real* grad_v_init;         // [N]
  GradientPartials<Real> partials[kNumParameters];

  // Always true. cuda/plan.h calls this function for neurons and integrators, and no output of an integrator needs a
  // general kernel.
  ASGL_HOST_DEVICE bool outputs_only_spikes() const { return true; }
  // Whether a parameter wants a gradient. Only then does it have a buffer for partial sums.
  ASGL_HOST_DEVICE bool wants_gradient(int id) const { return partials[id].data != nullptr; }
  // The pass that these arguments request.
  ASGL_HOST_DEVICE Pass requested_pass() const {
    return grad_v_seq == nullptr                                  ? Pass::kForward
           : wants_gradient(kDecay) || wants_gradient(kInputGain) ? Pass::kSums
                                                                  : Pass::kBackward;
  }
};

}  // namespace asgl
