// The kernels of the leaky integrator are given the neuron's structs, of which decay, input_gain, v_rest and
// logit_decay count, and more.
#pragma once

#include "math/integrator.h"
#include "neuron_params.h"

namespace asgl {

// Outputs that are null are not asked for.
template <class Scalar>
struct IntegratorForwardParams : LIFParams<Scalar> {
  using typename LIFParams<Scalar>::Real;
  bool delay;
  Scalar* v_seq;      // [outer, T, inner], after each step, or with delay before it
  State<Real*> last;  // [N]

  ASGL_HOST_DEVICE bool only_spikes() const { return true; }
};

// Gradients that are null are zero (inputs) or not asked for (outputs). Sequences that no parameter's gradient needs
// are null: v_seq is for decay, x_seq for input_gain.
template <class Scalar>
struct IntegratorBackwardParams : LIFParams<Scalar> {
  using typename LIFParams<Scalar>::Real;
  bool delay;
  const Scalar* grad_v_seq;      // [outer, T, inner]
  State<const Real*> grad_last;  // [N]
  const Scalar* v_seq;           // [outer, T, inner], as forward has returned it
  Scalar* grad_x_seq;            // [outer, T, inner]
  State<Real*> grad_init;        // [N]
  GradientPartials<Real> partials[kNumParameters];

  ASGL_HOST_DEVICE bool only_spikes() const { return true; }
  ASGL_HOST_DEVICE bool wants(int id) const { return partials[id].data != nullptr; }
};

}  // namespace asgl
