// The neuron's kernels are given these plain structs, by value. The backend cupy reads their layout from this text.
#pragma once

#include "math/divisor.h"
#include "math/half_types.h"
#include "math/learned.h"
#include "math/lif_by_options.h"
#include "math/philox.h"

namespace asgl {

// A sequence lies in memory as (outer, steps, inner). Neuron n = o * inner + i at step t is element (o * steps + t) *
// inner + i.
struct SequenceShape {
  int64 outer, steps, inner;

  ASGL_HOST_DEVICE int64 neurons() const { return outer * inner; }
  ASGL_HOST_DEVICE int64 element(int64 n, int64 t) const { return (n / inner * steps + t) * inner + n % inner; }
};

// Steps between two potentials kept for backward. A sequence of at most this length keeps none.
constexpr int kCheckpointSteps = 16;

enum ParameterId { kWidth, kDecay, kThreshold, kReset, kInputGain, kInputBias, kInputMean, kNumParameters };

// A parameter at neuron n and step t is data[t * step_stride + (n / inner) % count]. Where data is null it is constant,
// count is 1 and step_stride 0, so that one comparison says what is the same for all.
template <class Real>
struct ParameterView {
  const Real* data;
  Real constant;
  int64 step_stride, inner, count;

  ASGL_HOST_DEVICE int64 index(int64 n) const { return count == 1 ? 0 : n / inner % count; }
  ASGL_HOST_DEVICE Real at(int64 n, int64 t) const {
    return data == nullptr ? constant : data[t * step_stride + index(n)];
  }

  // One value for all neurons of a step.
  ASGL_HOST_DEVICE bool is_same_for_all() const { return count == 1; }
  // One value for all neurons and steps.
  ASGL_HOST_DEVICE bool is_uniform() const { return count == 1 && step_stride == 0; }
  ASGL_HOST_DEVICE Real uniform_value() const { return data == nullptr ? constant : *data; }
};

// Says whether the first `count` parameters are uniform.
template <class Real>
ASGL_HOST_DEVICE bool all_uniform(const ParameterView<Real> (&parameters)[kNumParameters], int count = kNumParameters) {
  bool all = true;
  for (int id = 0; id < count; ++id) all = all && parameters[id].is_uniform();
  return all;
}

// The value of a parameter, which is given as it is or as the options say.
template <class Real>
ASGL_HOST_DEVICE Real value_of(ParameterId id, Real given, const NeuronOptions<Real>& options) {
  if (id == kWidth && options.log_width) return exp_within_bound(given);
  if (id == kDecay && options.logit_decay) return sigmoid_within_bound(given);
  return given;
}

// The neuron whose parameters have the values value(id).
template <class Real, class F>
ASGL_HOST_DEVICE Neuron<Real> neuron_of(F&& value) {
  return {value(kDecay),     value(kThreshold), value(kReset),    inverse_of_width<Real>(value(kWidth)),
          value(kInputGain), value(kInputBias), value(kInputMean)};
}

// Where a parameter's value for a neuron lies, as ParameterView::index says it, of less than kDivisible neurons.
struct NeuronIndex {
  Divisor inner, count;

  ASGL_HOST_DEVICE uint32 of(int64 n) const {
    return count.by == 1 ? 0 : count.remainder(inner.quotient(static_cast<uint32>(n)));
  }
};

// What a kernel would ask of each parameter, in short: a few comparisons each are a tenth of the instructions of a
// short sequence.
struct ParameterSummary {
  uint32 tensors;  // a bit for each that is not constant
  uint32 wanted;   // a bit for each that wants a gradient
  // Parameters that differ between neurons mostly do so in the same way. Then they have an index in common, and each a
  // stride of 1, or of 0 if it does not differ.
  bool alike;
  NeuronIndex common;
  uint32 strides[kNumParameters];
  NeuronIndex own[kNumParameters];  // where they are not alike
};

ASGL_HOST_DEVICE bool has(uint32 bits, int id) { return bits >> id & 1u; }

constexpr uint32 kAnalogBelowInState = kAlwaysAnalog + 1;

struct NoiseParams {
  const int64* rng_state;  // [2]: seed and offset; [3] with kAnalogBelowInState: analog_below as well
  uint32 analog_below;     // round(analog_prob * kAlwaysAnalog)

  // 0 is never analog, kAlwaysAnalog always: neither needs a draw.
  ASGL_HOST_DEVICE bool drawn() const { return analog_below > 0 && analog_below < kAlwaysAnalog; }

  // Where analog_below is data, it is read; a value out of range is the nearest in it.
  ASGL_HOST_DEVICE NoiseParams settled() const {
    if (analog_below <= kAlwaysAnalog) return *this;
    const int64 below = rng_state[2];
    return {rng_state, below <= 0 ? 0 : below >= kAlwaysAnalog ? kAlwaysAnalog : static_cast<uint32>(below)};
  }
};

// A launcher's cut() says how neurons are cut among tasks, which fixes the size of GradientPartials.
struct NeuronTiles {
  int64 tile;   // neurons a tile
  int64 count;  // tiles in all
};

template <class Scalar>
struct LIFParams {
  using Real = Real_t<Scalar>;
  SequenceShape shape;
  ParameterView<Real> parameters[kNumParameters];
  AllOptions<Real> options;
  NoiseParams noise;
  NeuronTiles tiles;
  ParameterSummary summary;  // for CUDA, whose cut() says it; of kDivisible neurons or more only what is wanted
  const Scalar* x_seq;       // [outer, T, inner]
  State<const Real*> init;   // [N]; null: at rest

  // The state of a neuron at rest.
  ASGL_HOST_DEVICE State<Real> at_rest() const { return {options.v_rest}; }

  // What charge may take for granted; kGeneral also where a parameter changes from step to step.
  ASGL_HOST_DEVICE Input input() const {
    for (const auto& parameter : parameters) {
      if (parameter.data != nullptr && parameter.step_stride != 0) return Input::kGeneral;
    }
    if (options.v_rest != Real(0) || options.has_optional_rules()) return Input::kGeneral;
    return is_input_plain() ? Input::kPlain : Input::kNormalised;
  }

  // Says whether the input current is x itself.
  ASGL_HOST_DEVICE bool is_input_plain() const {
    const auto is = [&](ParameterId id, Real value) {
      return parameters[id].data == nullptr && parameters[id].constant == value;
    };
    return is(kInputGain, Real(1)) && is(kInputBias, Real(0)) && is(kInputMean, Real(0));
  }
};

// Outputs that are null are not asked for.
template <class Scalar>
struct ForwardParams : LIFParams<Scalar> {
  using typename LIFParams<Scalar>::Real;
  Scalar* s_seq;             // [outer, T, inner]
  State<Real*> last;         // [N]
  Real* v_seq;               // [outer, T, inner]
  Real* h_seq;               // [outer, T, inner]
  State<Real*> checkpoints;  // [(T - 1) / kCheckpointSteps, N], after steps 16, 32, ...
  Real* zeros;               // [2], are made zero: no result of an operator is left as the memory was

  // Says whether nothing is wanted except spikes, the last state and checkpoints.
  ASGL_HOST_DEVICE bool only_spikes() const {
    return v_seq == nullptr && h_seq == nullptr && !this->options.scale_output;
  }
};

// Partial sums of one parameter's gradient, one row of `slots` numbers a step (one row in all where step_stride is 0).
// Tile k of neurons adds up its part of each run of neurons that share a value and writes it to slot run + k,
// run = n / inner: no two tiles share a slot, and no slot depends on the number of threads.
template <class Real>
struct GradientPartials {
  Real* data;  // [T or 1, slots]; null: not asked for
  int64 slots;
};

// Gradients that are null are zero (inputs) or not asked for (outputs).
template <class Scalar>
struct BackwardParams : LIFParams<Scalar> {
  using typename LIFParams<Scalar>::Real;
  const Scalar* grad_s_seq;        // [outer, T, inner]
  State<const Real*> grad_last;    // [N]
  const Real* grad_v_seq;          // [outer, T, inner]
  const Real* grad_h_seq;          // [outer, T, inner]
  State<const Real*> checkpoints;  // as in ForwardParams
  Scalar* grad_x_seq;              // [outer, T, inner]
  State<Real*> grad_init;          // [N]
  GradientPartials<Real> partials[kNumParameters];

  ASGL_HOST_DEVICE bool wants(int id) const { return partials[id].data != nullptr; }

  // Says whether the spikes have a gradient and the sequence wants one, and nothing else has or wants one except states
  // and parameters other than the mean of the input.
  ASGL_HOST_DEVICE bool only_spikes() const {
    return grad_s_seq != nullptr && grad_x_seq != nullptr && grad_v_seq == nullptr && grad_h_seq == nullptr &&
           !this->options.scale_output && !wants(kInputMean);
  }
};

// A gradient is of the parameter as it is given. The partial sums are so, too, or they are of 1 / width or of the
// decay, and the derivative of these by the parameter is left to apply.
enum class Derivative { kNone, kOfWidth, kOfLogWidth, kOfLogitDecay };

// This turns the partial sums of one parameter's gradient into the gradient.
template <class Real>
struct GradientPart {
  GradientPartials<Real> partials;
  ParameterView<Real> parameter;
  Derivative derivative;
  // For CUDA, whose cut() says it: a block's threads are divided among so many elements, so many runs of each and so
  // many slots of each run, powers of two.
  int elements_each, runs_each, slots_each;
  int64 blocks;    // as many as it takes
  Real* gradient;  // [T or 1, count]

  ASGL_HOST_DEVICE int64 elements(const SequenceShape& shape) const {
    return (parameter.step_stride != 0 ? shape.steps : 1) * parameter.count;
  }

  ASGL_HOST_DEVICE void store(int64 element, double total) const {
    gradient[element] =
        derivative == Derivative::kNone ? static_cast<Real>(total) : of_given(total, parameter.data[element]);
  }

 private:
  // These are rounded as autograd does it for exp and sigmoid.
  ASGL_HOST_DEVICE Real of_given(double total, Real given) const {
    if (derivative == Derivative::kOfLogitDecay) {
      const Real decay = sigmoid_within_bound(given);
      return (static_cast<Real>(total) * (Real(1) - decay)) * decay;
    }
    const Real width = derivative == Derivative::kOfLogWidth ? exp_within_bound(given) : given;
    const Real of_width = static_cast<Real>(gradient_of_width(total, static_cast<double>(width)));
    return derivative == Derivative::kOfLogWidth ? of_width * width : of_width;
  }
};

// The gradients of all parameters. They are summed up in one launch.
template <class Real>
struct GradientSum {
  SequenceShape shape;
  int64 tile;  // neurons
  int count;   // parts that there are
  GradientPart<Real> parts[kNumParameters];
};

}  // namespace asgl
