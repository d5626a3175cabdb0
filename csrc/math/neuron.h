// One step of the neuron and its adjoint, for one element, in CPU and CUDA kernels. LIF below is a neuron model, and
// lif_by_options.h has the model with rare firing rules. docs/design/maintainers.md says how to add a surrogate, a
// firing rule or a neuron.
//
// Settled kernels are for calls in which no parameter changes over time. They are plain if the input current is x, and
// normalised if it has a gain, bias or mean. General kernels support every option at run time.
#pragma once

#include "math/surrogates.h"

namespace asgl {

// Parameters of a neuron at one step. `reset`: v_reset for the hard reset, reset_amount for the soft reset.
template <class Real>
struct Neuron {
  Real decay, v_threshold, reset, inverse_width, input_gain, input_bias, input_mean;
};

// Options that are the same for all neurons and steps.
template <class Real>
struct NeuronOptions {
  Real v_rest;
  Real surrogate_gain;
  Surrogate surrogate;
  bool hard_reset;
  bool strict_threshold;
  bool scale_output;
  bool detach_reset;
  bool log_width;    // the parameter kWidth is the logarithm of the width
  bool logit_decay;  // kDecay is the logit of the decay
  // The largest number of spikes per step, for kInteger and multi_spike. With multi_spike, 0 means no limit. Stored in
  // padding, so that the struct is no larger.
  uint16 levels;
};

// What input_current and charge may assume about the parameters. If the assumption holds, the results are those of the
// general case, except for the sign of a zero.
enum class Input {
  kGeneral,
  kNormalised,          // v_rest = 0
  kPlain,               // v_rest = 0, input_gain = 1, input_bias = 0, input_mean = 0
  kNormalisedResidual,  // v_rest = 0, with a residual
  kGeneralResidual,
  kApart,  // as kNormalised, where parameters may differ between a thread's neurons
};
template <Input kInput>
constexpr bool kIsGeneral = kInput == Input::kGeneral || kInput == Input::kGeneralResidual;
template <Input kInput>
constexpr bool kHasResidual = kInput == Input::kNormalisedResidual || kInput == Input::kGeneralResidual;

// The input current without the residual, c[t] = input_gain * (x[t] - input_mean) + input_bias. For kPlain it is x.
template <Input kInput, class Real>
ASGL_HOST_DEVICE Real input_current(Real x, const Neuron<Real>& neuron) {
  return kInput == Input::kPlain ? x : neuron.input_gain * (x - neuron.input_mean) + neuron.input_bias;
}
// The input current plus residual_gain * residual[t], which is read only if kInput has a residual.
template <Input kInput, class Real>
ASGL_HOST_DEVICE Real input_current(Real x, const Neuron<Real>& neuron, Real residual_gain, const Real& residual) {
  const Real c = input_current<kInput>(x, neuron);
  return kHasResidual<kInput> ? c + residual_gain * residual : c;
}

// The firing rule, which gives the hard spike: z = 1 if u >= 0 (strict: u > 0), else 0.
template <class Real>
struct Firing {
  bool strict;
  Real levels;

  ASGL_HOST_DEVICE explicit Firing(const NeuronOptions<Real>& options)
      : strict(options.strict_threshold), levels(static_cast<Real>(options.levels)) {}
  ASGL_HOST_DEVICE Real spike(Real u) const {
    return strict ? (u > Real(0) ? Real(1) : Real(0)) : (u >= Real(0) ? Real(1) : Real(0));
  }
};

// The firing rule in a single comparison, for CUDA kernels. It is wrong on a CPU that treats subnormals as zero.
template <class Real>
struct FiringFromLeast {
  Real least_u;  // the smallest u that spikes
  Real levels;

  ASGL_HOST_DEVICE explicit FiringFromLeast(const NeuronOptions<Real>& options)
      : least_u(options.strict_threshold ? (sizeof(Real) == 4 ? Real(0x1p-149f) : Real(0x1p-1074)) : Real(0)),
        levels(static_cast<Real>(options.levels)) {}
  ASGL_HOST_DEVICE Real spike(Real u) const { return u >= least_u ? Real(1) : Real(0); }
};

// Whether code branches on conditions. CPU code instead computes both values and selects one by a mask, because a
// branch would prevent vectorisation.
#if defined(__CUDA_ARCH__)
constexpr bool kBranches = true;
#else
constexpr bool kBranches = false;
#endif

// `a` if the condition holds, else `b`.
ASGL_HOST_DEVICE float choose(bool condition, float a, float b) {
  if (kBranches) return condition ? a : b;
  const uint32 mask = 0u - static_cast<uint32>(condition);
  return bit_cast<float>((bit_cast<uint32>(a) & mask) | (bit_cast<uint32>(b) & ~mask));
}
ASGL_HOST_DEVICE double choose(bool condition, double a, double b) {
  if (kBranches) return condition ? a : b;
  const uint64 mask = 0ull - static_cast<uint64>(condition);
  return bit_cast<double>((bit_cast<uint64>(a) & mask) | (bit_cast<uint64>(b) & ~mask));
}

// `value` if the condition holds, else 0, even if `value` is NaN.
ASGL_HOST_DEVICE float keep_if(bool condition, float value) {
  if (kBranches) return condition ? value : 0.0f;
  return bit_cast<float>(bit_cast<uint32>(value) & (0u - static_cast<uint32>(condition)));
}
ASGL_HOST_DEVICE double keep_if(bool condition, double value) {
  return bit_cast<double>(bit_cast<uint64>(value) & (0ull - static_cast<uint64>(condition)));
}

// A gradient that is known at compile time to be absent, so that not even a zero is added.
struct NoGradient {};

ASGL_HOST_DEVICE float operator+(NoGradient, float value) { return value; }
ASGL_HOST_DEVICE double operator+(NoGradient, double value) { return value; }

// Stands for a slope that was not stored, so that the adjoint computes it.
struct NoSlope {};

// The results of step_adjoint.
template <class Real>
struct StepGradient {
  Real dy;  // the gradient of y = u / width
  Real dh;  // the gradient of the potential before reset
  Real dc;  // the gradient of the input current
};

// Kernels multiply by 1 / width and sum the gradient of 1 / width; gradient_of_width converts the sum.
template <class Real>
ASGL_HOST_DEVICE Real inverse_of_width(Real width) {
  return Real(1) / width;
}
ASGL_HOST_DEVICE double gradient_of_width(double gradient_of_inverse, double width) {
  return -gradient_of_inverse / (width * width);
}

// The leaky integrate-and-fire neuron, with surrogate and reset as constants.
template <Surrogate kSurrogate, bool kHardReset>
struct LIF {
  // kOnlyGeneral: only the general kernels run the model.
  static constexpr bool kResetsHard = kHardReset, kOnlyGeneral = false;
  // The number of states. Arrays of states begin with v.
  static constexpr int kNumStates = 1;
  // Whether there is a second state, the adaptation w (math/adaptive.h), which has parameters of its own.
  static constexpr bool kHasAdaptation = false;
  static constexpr bool kCountsSpikes = kSurrogate == Surrogate::kInteger, kHasSlope = asgl::kHasSlope<kSurrogate>;

  // Returns the model whose functions kernels call. LIF ignores the options, LIFByOptions stores them.
  template <class Options>
  static ASGL_HOST_DEVICE LIF from_options(const Options&) {
    return {};
  }

  // h[t] = v_rest + decay * (v[t-1] - v_rest) + c[t]
  template <Input kInput, class Real>
  static ASGL_HOST_DEVICE Real charge(Real c, const Real& v, const Neuron<Real>& neuron,
                                      const NeuronOptions<Real>& options) {
    const Real v_rest = options.v_rest;
    return kIsGeneral<kInput> ? (v_rest + neuron.decay * (v - v_rest)) + c : neuron.decay * v + c;
  }

  // s = F(u / width) where analog, else z, with
  //   u = h - v_threshold,   z = 1 if the firing rule lets u fire, else 0
  // or, with kCountsSpikes, with
  //   u = h,                 z = round(F(u / width))
  template <class Real, class FiringRule>
  static ASGL_HOST_DEVICE Real fire(Real h, bool analog, const Neuron<Real>& neuron, const FiringRule& firing) {
    const Real u = distance(h, neuron);
    const Real a = surrogate_value<kSurrogate>(firing.levels, u * neuron.inverse_width);
    const Real z = kCountsSpikes ? math::round_half_even(a) : firing.spike(u);
    return analog ? a : z;
  }

  // v[t] = h * (1 - s) + v_reset * s   hard,   h - reset_amount * s   soft
  template <class Real>
  static ASGL_HOST_DEVICE Real reset(Real h, Real s, const Neuron<Real>& neuron) {
    return kHardReset ? h * (Real(1) - s) + neuron.reset * s : h - neuron.reset * s;
  }

  // Converts the gradient of v[t] into the gradient of the potential after reset. They differ only in models with a
  // lower bound of the potential, v_min (the floor).
  template <class Real>
  static ASGL_HOST_DEVICE Real floor_adjoint(Real /*h*/, Real /*s*/, const Neuron<Real>&, Real dv) {
    return dv;
  }

  // The term that is added to the gradient of neuron.reset: dv * s for v_reset, -dv * s for reset_amount.
  template <class Real>
  static ASGL_HOST_DEVICE Real reset_parameter_gradient(Real dv, Real s) {
    return kHardReset ? dv * s : -(dv * s);
  }

  // With dv the gradient of v[t], and g the gradient of s as an output:
  //   ds = g + dv * v_reset - dv * h   hard,   g - dv * reset_amount   soft,   g under detach_reset
  // Terms are added in the order of autograd on the reference. `through_reset` is false under detach_reset, and while
  // v[t] has no gradient. Terms of dv are then left out. Computed with dv = 0, they would be NaN for an infinite h.
  template <class Real>
  static ASGL_HOST_DEVICE Real spike_gradient(Real g, Real h, bool through_reset, const Neuron<Real>& neuron, Real dv) {
    return kHardReset ? (g + keep_if(through_reset, dv * neuron.reset)) - keep_if(through_reset, dv * h)
                      : g - keep_if(through_reset, dv * neuron.reset);
  }

  // The distance of h from the threshold, which the width divides: y = distance / width,
  //   distance = h - v_threshold, or h if spikes are counted
  template <class Real>
  static ASGL_HOST_DEVICE Real distance(Real h, const Neuron<Real>& neuron) {
    return kCountsSpikes ? h : h - neuron.v_threshold;
  }

  // F'(y), for surrogates with kHasSlope.
  template <class Real>
  static ASGL_HOST_DEVICE Real slope(Real h, const Neuron<Real>& neuron) {
    return SurrogateMath<kSurrogate>::slope(distance(h, neuron) * neuron.inverse_width);
  }

  // The gradients of one step:
  //   dy = F'(y) * ds * surrogate_gain
  //   dh = gh + dv * (1 - s) + dy / width   hard,   gh + dv + dy / width   soft
  // gh is the gradient of h as an output. Terms are added in the order of autograd on the reference. If `carried` is
  // false, v[t] has no gradient, and terms of dv are left out. `v_gradient` is dv on entry, and the gradient of v[t-1]
  // on return. `kept_slope` is F'(y), if a kernel stored it.
  template <class Real, class GradientOfH, class Slope = NoSlope>
  static ASGL_HOST_DEVICE StepGradient<Real> step_adjoint(Real ds, GradientOfH gh, Real h, Real s, bool carried,
                                                          const Neuron<Real>& neuron,
                                                          const NeuronOptions<Real>& options, Real& v_gradient,
                                                          Slope kept_slope = {}) {
    const Real dy = adjoint_of_surrogate(ds * options.surrogate_gain, h, neuron, options, kept_slope);
    const Real dv = v_gradient, from_v = kHardReset ? dv * (Real(1) - s) : dv;
    const Real dh = (gh + keep_if(carried, from_v)) + dy * neuron.inverse_width;
    v_gradient = neuron.decay * dh;
    return {dy, dh, dh};
  }

 private:
  // The gradient of y, from the gradient da of F(y).
  template <class Real>
  static ASGL_HOST_DEVICE Real adjoint_of_surrogate(Real da, Real h, const Neuron<Real>& neuron,
                                                    const NeuronOptions<Real>& options, NoSlope) {
    const Real y = distance(h, neuron) * neuron.inverse_width;
    return surrogate_adjoint<kSurrogate>(static_cast<Real>(options.levels), y, da);
  }
  template <class Real>
  static ASGL_HOST_DEVICE Real adjoint_of_surrogate(Real da, Real, const Neuron<Real>&, const NeuronOptions<Real>&,
                                                    Real kept_slope) {
    return da * kept_slope;
  }
};

}  // namespace asgl
