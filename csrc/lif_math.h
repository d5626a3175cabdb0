// One step of the neuron and its adjoint, for one element. Every backend runs these very functions.
#pragma once

#include "surrogate_math.h"

namespace asgl {

// The neuron's parameters at one element and step. `reset` is v_reset for the hard reset, reset_amount for the soft
// one.
template <class Real>
struct Neuron {
  Real decay, v_threshold, reset, inverse_width, input_gain, input_bias, input_mean;
};

// What is the same for all elements and steps.
template <class Real>
struct NeuronOptions {
  Real v_rest;
  Real surrogate_gain;
  bool strict_threshold;
  bool scale_output;
  bool detach_reset;
};

// What charge may take for granted, which changes nothing but the sign of a zero.
enum class Input {
  kGeneral,
  kNormalised,  // v_rest = 0
  kPlain,       // v_rest = 0, input_gain = 1, input_bias = 0, input_mean = 0
};

// c[t] = input_gain * (x[t] - input_mean) + input_bias
template <class Real>
ASGL_HOST_DEVICE Real input_current(Real x, const Neuron<Real>& neuron) {
  return neuron.input_gain * (x - neuron.input_mean) + neuron.input_bias;
}

// h[t] = v_rest + decay * (v[t-1] - v_rest) + c[t]
template <Input kInput, class Real>
ASGL_HOST_DEVICE Real charge(Real x, Real v, const Neuron<Real>& neuron, Real v_rest) {
  const Real c = kInput == Input::kPlain ? x : input_current(x, neuron);
  return kInput == Input::kGeneral ? (v_rest + neuron.decay * (v - v_rest)) + c : neuron.decay * v + c;
}

// 1 if u >= 0 (strict: u > 0) else 0
template <class Real>
ASGL_HOST_DEVICE Real hard_spike(Real u, bool strict_threshold) {
  return strict_threshold ? (u > Real(0) ? Real(1) : Real(0)) : (u >= Real(0) ? Real(1) : Real(0));
}

// The same as one comparison, where subnormal numbers are not taken for zero.
template <class Real>
struct LeastSpike {
  Real u;

  ASGL_HOST_DEVICE explicit LeastSpike(bool strict_threshold)
      : u(strict_threshold ? (sizeof(Real) == 4 ? Real(0x1p-149f) : Real(0x1p-1074)) : Real(0)) {}
};
template <class Real>
ASGL_HOST_DEVICE Real hard_spike(Real u, LeastSpike<Real> least) {
  return u >= least.u ? Real(1) : Real(0);
}

// s = F(u / width) where analog, else the hard spike,   u = h - v_threshold
template <Surrogate kSurrogate, class Real, class Strictness>
ASGL_HOST_DEVICE Real fire(Real h, bool analog, const Neuron<Real>& neuron, Strictness strictness) {
  const Real u = h - neuron.v_threshold;
  const Real a = SurrogateMath<kSurrogate>::value(u * neuron.inverse_width);
  const Real z = hard_spike(u, strictness);
  return analog ? a : z;
}

// v[t] = h * (1 - s) + v_reset * s   hard,   h - reset_amount * s   soft
template <bool kHardReset, class Real>
ASGL_HOST_DEVICE Real reset(Real h, Real s, const Neuron<Real>& neuron) {
  return kHardReset ? h * (Real(1) - s) + neuron.reset * s : h - neuron.reset * s;
}

// `value`, or 0 whatever it is. The condition is the same for all elements: as a mask it costs no branch in their loop.
ASGL_HOST_DEVICE float keep_if(bool condition, float value) {
  return bit_cast<float>(bit_cast<uint32>(value) & (0u - static_cast<uint32>(condition)));
}
ASGL_HOST_DEVICE double keep_if(bool condition, double value) {
  return bit_cast<double>(bit_cast<uint64>(value) & (0ull - static_cast<uint64>(condition)));
}

// A gradient that does not flow, where that is known when compiling: not even a zero is added.
struct NoGradient {};

ASGL_HOST_DEVICE float operator+(NoGradient, float value) { return value; }
ASGL_HOST_DEVICE double operator+(NoGradient, double value) { return value; }

template <class Real>
struct StepGradient {
  Real dy;  // of y = u / width
  Real dh;  // of the potential before reset
};

// With dv the gradient of v[t], g that of s and gh that of h where it is returned:
//   ds = g + dv * v_reset - dv * h   hard,   g - dv * reset_amount   soft,   g under detach_reset
//   dy = F'(y) * ds * surrogate_gain
//   dh = gh + dv * (1 - s) + dy / width   hard,   gh + dv + dy / width   soft
// in the order in which autograd adds these terms for the reference. `carried` is false where nothing has flowed into
// v[t] yet (the last step, unless v was returned): its terms are then absent, not zero times a value that may be
// infinite.
template <Surrogate kSurrogate, bool kHardReset, class Real, class GradientOfH>
ASGL_HOST_DEVICE StepGradient<Real> step_adjoint(Real g, GradientOfH gh, Real dv, Real h, Real s, bool carried,
                                                 const Neuron<Real>& neuron, const NeuronOptions<Real>& options) {
  const Real y = (h - neuron.v_threshold) * neuron.inverse_width;
  const bool through_reset = carried && !options.detach_reset;
  const Real ds = kHardReset ? (g + keep_if(through_reset, dv * neuron.reset)) - keep_if(through_reset, dv * h)
                             : g - keep_if(through_reset, dv * neuron.reset);
  const Real dy = SurrogateMath<kSurrogate>::adjoint(y, ds * options.surrogate_gain);
  const Real from_v = kHardReset ? dv * (Real(1) - s) : dv;
  return {dy, (gh + keep_if(carried, from_v)) + dy * neuron.inverse_width};
}

}  // namespace asgl
