// The neuron model that reads every option at run time. The general CUDA kernels use it, and so do calls with rare
// rules that no other model has: several spikes per step, and a lower bound of the potential (v_min).
#pragma once

#include "math/neuron.h"

namespace asgl {

// All options, and the neuron model that reads them at run time. Kernels of other models copy only NeuronOptions.
template <class Real>
struct LIFByOptions : NeuronOptions<Real> {
  // LIF with each reset, for functions that do not depend on the surrogate.
  using Hard = LIF<Surrogate::kRectangle, true>;
  using Soft = LIF<Surrogate::kRectangle, false>;
  static constexpr bool kOnlyGeneral = true, kHasAdaptation = false;
  static constexpr int kNumStates = 1;

  Real v_min;
  bool multi_spike;
  bool periodic;     // whether `distance` is a sawtooth above the threshold
  bool floored;      // whether v_min bounds the potential
  uint8 adaptation;  // bits of math/adaptive.h, or 0; stored in padding, as levels

  // Whether the neuron is adaptive, with a state w. input_gain, input_bias and input_mean are then parameters of the
  // adaptation.
  ASGL_HOST_DEVICE bool has_adaptation() const { return adaptation != 0; }
  // The number of states: v, and for adaptive neurons w.
  ASGL_HOST_DEVICE int num_states() const { return has_adaptation() ? 2 : 1; }
  // Whether the neuron has a rule that LIF does not have.
  ASGL_HOST_DEVICE bool has_optional_rules() const { return multi_spike || floored || has_adaptation(); }
  // Whether the hard value is F(h / width) rounded, which is a number of spikes.
  ASGL_HOST_DEVICE bool counts_spikes() const { return this->surrogate == Surrogate::kInteger; }

  // The functions below are those of LIF in math/neuron.h. See there for equations that are not repeated here.
  static ASGL_HOST_DEVICE const LIFByOptions& from_options(const LIFByOptions& options) { return options; }

  template <Input kInput>
  static ASGL_HOST_DEVICE Real charge(Real c, const Real& v, const Neuron<Real>& neuron,
                                      const NeuronOptions<Real>& options) {
    return Hard::charge<kInput>(c, v, neuron, options);
  }

  // With multi_spike the hard value is (h > 0) * trunc(h / v_threshold), a product so that NaN stays NaN. It is at most
  // `levels`, unless `levels` is 0.
  template <class FiringRule>
  ASGL_HOST_DEVICE Real fire(Real h, bool analog, const Neuron<Real>& neuron, const FiringRule& firing) const {
    const Real u = distance_from_threshold(h, neuron);
    if (kBranches && analog) return analog_value(u, neuron);
    if (kBranches && !multi_spike) {
      return counts_spikes() ? math::round_half_even(analog_value(u, neuron)) : firing.spike(u);
    }
    const Real several = (h > Real(0) ? Real(1) : Real(0)) * math::trunc(h / neuron.v_threshold);
    const Real most = static_cast<Real>(this->levels);
    const Real limited = most > Real(0) && several > most ? most : several;
    const Real z = choose(multi_spike, limited, firing.spike(u));
    if (kBranches) return z;
    const Real a = analog_value(u, neuron);
    return analog ? a : counts_spikes() ? math::round_half_even(a) : z;
  }

  // F(u / width), the value of an element that is analog.
  ASGL_HOST_DEVICE Real analog_value(Real u, const Neuron<Real>& neuron) const {
    return any_surrogate_value(this->surrogate, static_cast<Real>(this->levels), u * neuron.inverse_width);
  }

  // The argument of the surrogate before the width divides it: u = h - v_threshold, or h for the surrogate kInteger.
  ASGL_HOST_DEVICE Real distance_from_threshold(Real h, const Neuron<Real>& neuron) const {
    return counts_spikes() ? h : h - neuron.v_threshold;
  }

  // The potential after reset, before v_min bounds it from below.
  ASGL_HOST_DEVICE Real potential_after_reset(Real h, Real s, const Neuron<Real>& neuron) const {
    return choose(this->hard_reset, Hard::reset(h, s, neuron), Soft::reset(h, s, neuron));
  }

  // v[t], which is the potential v after reset, or relu(v - v_min) + v_min if `floored`.
  ASGL_HOST_DEVICE Real reset(Real h, Real s, const Neuron<Real>& neuron) const {
    const Real v = potential_after_reset(h, s, neuron), above = v - v_min;
    if (kBranches && !floored) return v;
    return choose(floored, (above <= Real(0) ? Real(0) : above) + v_min, v);
  }

  // The adjoint of the bound v_min: the gradient dv is 0 where v <= v_min.
  ASGL_HOST_DEVICE Real floor_adjoint(Real h, Real s, const Neuron<Real>& neuron, Real dv) const {
    if (kBranches && !floored) return dv;
    const Real above = potential_after_reset(h, s, neuron) - v_min;
    return choose(floored, above <= Real(0) ? Real(0) : dv, dv);
  }

  ASGL_HOST_DEVICE Real reset_parameter_gradient(Real dv, Real s) const {
    return choose(this->hard_reset, Hard::reset_parameter_gradient(dv, s), Soft::reset_parameter_gradient(dv, s));
  }

  ASGL_HOST_DEVICE Real spike_gradient(Real g, Real h, bool through_reset, const Neuron<Real>& neuron, Real dv) const {
    return choose(this->hard_reset, Hard::spike_gradient(g, h, through_reset, neuron, dv),
                  Soft::spike_gradient(g, h, through_reset, neuron, dv));
  }

  // The distance of h from the threshold, which the width divides. It is a sawtooth above the threshold if `periodic`:
  //   distance = u                                                  where h < v_threshold, or not periodic
  //            = v_threshold * (2 frac(h / v_threshold - 1/2) - 1)  else
  // Backward takes the derivative of the distance by h as 1, also on the sawtooth, where it is 2.
  ASGL_HOST_DEVICE Real distance(Real h, const Neuron<Real>& neuron) const {
    const Real u = distance_from_threshold(h, neuron);
    if (kBranches && !periodic) return u;
    const Real turns = h / neuron.v_threshold - Real(0.5);
    const Real whole = math::trunc(turns), floor = whole > turns ? whole - Real(1) : whole;
    const Real above = neuron.v_threshold * (Real(2) * (turns - floor) - Real(1));
    return choose(periodic, h < neuron.v_threshold ? u : above, u);
  }

  ASGL_HOST_DEVICE StepGradient<Real> step_adjoint(Real ds, Real gh, Real h, Real s, bool carried,
                                                   const Neuron<Real>& neuron, const NeuronOptions<Real>&,
                                                   Real& v_gradient) const {
    const Real dv = v_gradient, y = distance(h, neuron) * neuron.inverse_width;
    const Real dy =
        any_surrogate_adjoint(this->surrogate, static_cast<Real>(this->levels), y, ds * this->surrogate_gain);
    const Real from_v = choose(this->hard_reset, dv * (Real(1) - s), dv);
    const Real dh = (gh + keep_if(carried, from_v)) + dy * neuron.inverse_width;
    v_gradient = neuron.decay * dh;
    return {dy, dh, dh};
  }
};

}  // namespace asgl
