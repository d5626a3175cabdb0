// The neuron with rules that few ask for: several spikes a step, and a floor of the potential. Everything is decided at
// run time by the options, so that one model has it all, in general kernels alone.
#pragma once

#include "math/neuron.h"

namespace asgl {

namespace math {

#if defined(__CUDA_ARCH__)
ASGL_HOST_DEVICE float trunc(float x) { return ::truncf(x); }
ASGL_HOST_DEVICE double trunc(double x) { return ::trunc(x); }
ASGL_HOST_DEVICE float floor(float x) { return ::floorf(x); }
ASGL_HOST_DEVICE double floor(double x) { return ::floor(x); }
#else
ASGL_HOST_DEVICE float trunc(float x) { return __builtin_truncf(x); }
ASGL_HOST_DEVICE double trunc(double x) { return __builtin_trunc(x); }
ASGL_HOST_DEVICE float floor(float x) { return __builtin_floorf(x); }
ASGL_HOST_DEVICE double floor(double x) { return __builtin_floor(x); }
#endif

}  // namespace math

template <class Real>
struct OptionalRules {
  using Hard = LIF<Surrogate::kRectangle, true>;
  using Soft = LIF<Surrogate::kRectangle, false>;
  const NeuronOptions<Real>& options;

  // multi_spike: s = trunc(h / v_threshold) where h > 0, else 0 (as this product, NaN for NaN)
  template <class FiringRule>
  ASGL_HOST_DEVICE Real fire(Real h, bool analog, const Neuron<Real>& neuron, const FiringRule& firing) const {
    if (options.multi_spike) return (h > Real(0) ? Real(1) : Real(0)) * math::trunc(h / neuron.v_threshold);
    const Real u = h - neuron.v_threshold;
    if (!analog) return firing.spike(u);
    return with_surrogate(options.surrogate, [&](auto surrogate) { return surrogate.value(u * neuron.inverse_width); });
  }

  // floored: v[t] = relu(v - v_min) + v_min,   v after reset
  template <class States>
  ASGL_HOST_DEVICE void reset(Real h, Real s, const Neuron<Real>& neuron, States&& state) const {
    options.hard_reset ? Hard::reset(h, s, neuron, state) : Soft::reset(h, s, neuron, state);
    if (!options.floored) return;
    const Real above = state.v - options.v_min;
    state.v = (above <= Real(0) ? Real(0) : above) + options.v_min;
  }

  // d v = 0 where v <= v_min
  template <class States>
  ASGL_HOST_DEVICE void floor_adjoint(Real h, Real s, const Neuron<Real>& neuron, States&& d_state) const {
    if (!options.floored) return;
    State<Real> state;
    options.hard_reset ? Hard::reset(h, s, neuron, state) : Soft::reset(h, s, neuron, state);
    if (state.v - options.v_min <= Real(0)) d_state.v = Real(0);
  }

  ASGL_HOST_DEVICE Real gradient_of_reset(Real dv, Real s) const {
    return options.hard_reset ? Hard::gradient_of_reset(dv, s) : Soft::gradient_of_reset(dv, s);
  }

  ASGL_HOST_DEVICE Real spike_gradient(Real g, Real h, bool through_reset, const Neuron<Real>& neuron, Real dv) const {
    return options.hard_reset ? Hard::spike_gradient(g, h, through_reset, neuron, dv)
                              : Soft::spike_gradient(g, h, through_reset, neuron, dv);
  }

  // periodic: d = u                                                          where h < v_threshold
  //             = v_threshold * (2 frac(h / v_threshold - 1/2) - 1)          else;   its slope by h is 1
  ASGL_HOST_DEVICE Real distance(Real h, const Neuron<Real>& neuron) const {
    const Real u = h - neuron.v_threshold;
    if (!options.periodic) return u;
    const Real turns = h / neuron.v_threshold - Real(0.5);
    const Real above = neuron.v_threshold * (Real(2) * (turns - math::floor(turns)) - Real(1));
    return h < neuron.v_threshold ? u : above;
  }

  template <class States>
  ASGL_HOST_DEVICE StepGradient<Real> step_adjoint(Real ds, Real gh, Real h, Real s, bool carried,
                                                   const Neuron<Real>& neuron, const NeuronOptions<Real>&,
                                                   States&& d_state) const {
    const Real y = distance(h, neuron) * neuron.inverse_width, da = ds * options.surrogate_gain;
    const Real dy = with_surrogate(options.surrogate, [&](auto surrogate) { return surrogate.adjoint(y, da); });
    return options.hard_reset ? Hard::charge_adjoint(dy, gh, s, carried, neuron, d_state)
                              : Soft::charge_adjoint(dy, gh, s, carried, neuron, d_state);
  }
};

// It takes charge from LIF.
struct LIFByOptions : LIF<Surrogate::kRectangle, true> {
  static constexpr bool kOnlyGeneral = true;

  template <class Real>
  static ASGL_HOST_DEVICE OptionalRules<Real> of(const NeuronOptions<Real>& options) {
    return {options};
  }
};

}  // namespace asgl
