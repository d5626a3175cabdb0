// One step of adaptive neurons and its adjoint, for one element, in CPU and CUDA kernels. The neurons are those of
// LIFByOptions with a second state w, which is subtracted from the input current, or added to the threshold or to the
// reset amount.
//
//   w[t+1] = adapt_decay * w[t] + (adapt_potential * (v[t] - v_rest) + adapt_spike * s[t])
//
// Step t computes v[t] and w[t+1], which are the state after the step. The input is not normalised. The fields of
// Neuron for a normalisation hold other parameters instead: input_gain is adapt_decay, input_bias is adapt_potential,
// and input_mean is adapt_spike.
#pragma once

#include "math/lif_by_options.h"

namespace asgl {

// Bits of LIFByOptions::adaptation, which say where w acts: it is subtracted from the current, added to the threshold,
// or added to the amount of a soft reset. The last two bits may be combined.
constexpr uint8 kAdaptsCurrent = 1, kAdaptsThreshold = 2, kAdaptsReset = 4;

template <class Real>
struct AdaptiveLIF : LIFByOptions<Real> {
  using Base = LIFByOptions<Real>;
  static constexpr int kNumStates = 2;
  static constexpr bool kHasAdaptation = true;

  // Returns the model for these options.
  static ASGL_HOST_DEVICE AdaptiveLIF from_options(const Base& options) {
    AdaptiveLIF model{options};
    model.multi_spike = model.periodic = model.floored = false;  // rules that adaptive neurons do not have
    return model;
  }
  // Whether w is subtracted from the current, added to the threshold, or added to the reset amount.
  ASGL_HOST_DEVICE bool adapts_current() const { return (this->adaptation & kAdaptsCurrent) != 0; }
  ASGL_HOST_DEVICE bool adapts_threshold() const { return (this->adaptation & kAdaptsThreshold) != 0; }
  ASGL_HOST_DEVICE bool adapts_reset() const { return (this->adaptation & kAdaptsReset) != 0; }

  // The potential that is compared with v_threshold. If w is added to the threshold, this is h - w, and v_threshold
  // stays as it is.
  ASGL_HOST_DEVICE Real compared_potential(Real h, Real w) const { return h - keep_if(adapts_threshold(), w); }
  // The inverse of compared_potential, up to rounding: h, the potential before reset.
  ASGL_HOST_DEVICE Real charged_potential(Real compared_h, Real w) const {
    return compared_h + keep_if(adapts_threshold(), w);
  }

  // The neuron with w added to its reset amount, if w acts there.
  ASGL_HOST_DEVICE Neuron<Real> with_adapted_reset(Neuron<Real> neuron, Real w) const {
    neuron.reset = neuron.reset + keep_if(adapts_reset(), w);
    return neuron;
  }

  // Computes one step: returns h, sets s, and replaces v and w by their next values. The fields input_gain, input_bias
  // and input_mean are adapt_decay, adapt_potential and adapt_spike.
  template <class FiringRule>
  ASGL_HOST_DEVICE Real step(Real x, bool analog, const Neuron<Real>& neuron, const FiringRule& firing, Real& v,
                             Real& w, Real& s) const {
    const Real c = x - keep_if(adapts_current(), w);
    const Real h = Base::template charge<Input::kGeneral>(c, v, neuron, *this);
    s = this->fire(compared_potential(h, w), analog, neuron, firing);
    v = this->potential_after_reset(h, s, with_adapted_reset(neuron, w));
    w = neuron.input_gain * w + (neuron.input_bias * (v - this->v_rest) + neuron.input_mean * s);
    return h;
  }

  struct Gradient {
    Real reset;     // the gradient of the reset amount
    Real distance;  // the distance from the threshold, not a gradient
    StepGradient<Real> step;
  };

  // On entry dv and dw are the gradients of v and w after the step, and on return those before the step. g and gh are
  // the gradients of s and of compared_h, the potential that is compared with v_threshold. Terms are added in the order
  // of autograd on the reference. `carried` is as in LIF::step_adjoint.
  ASGL_HOST_DEVICE Gradient adjoint(Real g, Real gh, Real h, Real compared_h, Real s, Real w, bool carried,
                                    const Neuron<Real>& neuron, Real& dv, Real& dw) const {
    const Neuron<Real> now = with_adapted_reset(neuron, w);
    dv = dv + keep_if(carried, neuron.input_bias * dw);
    const Real d_reset = keep_if(carried, this->reset_parameter_gradient(dv, s));
    const Real ds =
        this->spike_gradient(g + keep_if(carried, neuron.input_mean * dw), h, carried && !this->detach_reset, now, dv);
    const StepGradient<Real> step = this->step_adjoint(ds, gh, compared_h, s, carried, now, *this, dv);
    const Real d_compared = keep_if(adapts_threshold(), gh + step.dy * neuron.inverse_width);
    dw = (neuron.input_gain * dw + keep_if(adapts_reset(), d_reset)) - choose(adapts_current(), step.dc, d_compared);
    return {d_reset, this->distance(compared_h, neuron), step};
  }
};

}  // namespace asgl
