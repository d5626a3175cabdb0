// What the kernels of the leaky integrator are given beside the neuron's structs, of which decay, input_gain, v_rest,
// logit_decay and the places of x_seq and init count.
#pragma once

#include "math/integrator.h"
#include "params/neuron.h"

namespace asgl {

enum class Pass { kForward, kBackward, kSums };  // kSums: backward, and decay or input_gain wants a gradient

// Forward has no gradients. In backward, gradients that are null are zero (inputs) or not asked for (outputs), and so
// are the sequences that only the gradient of a parameter needs: v_seq for decay, x_seq for input_gain.
template <class Scalar>
struct IntegratorParams : LIFParams<Scalar> {
  using typename LIFParams<Scalar>::Real;
  bool delay;
  Scalar* v_seq;                 // [outer, T, inner], after each step, or with delay before it
  State<Real*> last;             // [N]
  const Scalar* grad_v_seq;      // [outer, T, inner]; null in forward
  State<const Real*> grad_last;  // [N]
  Scalar* grad_x_seq;            // [outer, T, inner]
  State<Real*> grad_init;        // [N]
  GradientPartials<Real> partials[kNumParameters];

  ASGL_HOST_DEVICE bool only_spikes() const { return true; }
  ASGL_HOST_DEVICE bool wants(int id) const { return partials[id].data != nullptr; }
  ASGL_HOST_DEVICE Pass pass() const {
    return grad_v_seq == nullptr ? Pass::kForward : wants(kDecay) || wants(kInputGain) ? Pass::kSums : Pass::kBackward;
  }
};

}  // namespace asgl
