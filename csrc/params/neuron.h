// Arguments of the neuron's kernels, structs that are passed by value.
#pragma once

#include "math/half_types.h"
#include "math/learned.h"
#include "math/lif_by_options.h"
#include "math/philox.h"
#include "params/summary.h"

namespace asgl {

// A sequence is stored as (outer, steps, inner): neuron n = o * inner + i at step t is element
// (o * steps + t) * inner + i.
struct SequenceShape {
  int64 outer, steps, inner;

  // The number of neurons.
  ASGL_HOST_DEVICE int64 neurons() const { return outer * inner; }
  // The offset of the element of neuron n at step t.
  ASGL_HOST_DEVICE int64 offset(int64 n, int64 t) const { return (n / inner * steps + t) * inner + n % inner; }
};

// Threads per block of all CUDA kernels except the one that sums gradients.
constexpr int kBlockThreads = 128;

// Steps between checkpoints of the state for backward. Sequences up to this length have none.
constexpr int kCheckpointSteps = 16;

// A short sequence that is common in practice. Some CUDA kernels are compiled for this number of steps as a constant.
constexpr int kShortSequence = 4;

// The distance, in elements, between v and w of a neuron in the checkpoints of adaptive neurons. All checkpoints of v
// are stored before those of w.
ASGL_HOST_DEVICE int64 checkpoint_stride(const SequenceShape& shape) {
  return (shape.steps - 1) / kCheckpointSteps * shape.neurons();
}

// For sequences of more than kCheckpointSteps steps, settled CUDA kernels compute four neurons per thread if there are
// more neurons than this number of sixteenths of the threads that the device can hold. On sm_80 and sm_90 a scheduler
// holds 16 warps, so one sixteenth is one warp per scheduler.
//
// If there are few warps, latency determines the time. By prediction (docs/design/gpu.md), a step of one warp takes 117
// cycles forward and 274 backward with one neuron per thread, and 179 and 433 with four. A warp with one neuron per
// thread issues 51 instructions per step forward and 106 backward. Four such warps on a scheduler therefore take about
// as long as one warp with four neurons per thread. GPUs that hold fewer warps use the same number.
constexpr int kOccupancySixteenths = 3;

// A parameter at neuron n and step t is data[t * step_stride + (n / inner) % count]. If data is null, the parameter is
// `constant`, with count = 1 and step_stride = 0.
template <class Real>
struct ParameterView {
  const Real* data;
  Real constant;
  int64 step_stride, inner, count;

  // The index of neuron n's value among the `count` values of a step.
  ASGL_HOST_DEVICE int64 index(int64 n) const { return count == 1 ? 0 : n / inner % count; }
  // The value of neuron n at step t.
  ASGL_HOST_DEVICE Real at(int64 n, int64 t) const {
    return data == nullptr ? constant : data[t * step_stride + index(n)];
  }

  // Whether all neurons share one value in each step.
  ASGL_HOST_DEVICE bool is_same_for_all() const { return count == 1; }
  // Whether all neurons and steps share one value.
  ASGL_HOST_DEVICE bool is_uniform() const { return count == 1 && step_stride == 0; }
  // Whether each group of four neurons that begins at a multiple of four shares a value.
  ASGL_HOST_DEVICE bool is_shared_by_four() const { return data == nullptr || inner % 4 == 0; }
  // Whether each value belongs to several neurons of a tile that are not adjacent, as one value per channel does in
  // channels_last.
  ASGL_HOST_DEVICE bool is_interleaved_in(int64 tile) const { return inner == 1 && 2 * count <= tile; }
};

// Whether the first `count` parameters are uniform.
template <class Real>
ASGL_HOST_DEVICE bool all_uniform(const ParameterView<Real> (&parameters)[kNumParameters], int count = kNumParameters) {
  bool all = true;
  for (int id = 0; id < count; ++id) all = all && parameters[id].is_uniform();
  return all;
}

// The value of a parameter that may be stored as a logarithm or logit.
template <class Real>
ASGL_HOST_DEVICE Real parameter_value(ParameterId id, Real stored, const NeuronOptions<Real>& options) {
  if (id == kWidth && options.log_width) return exp_within_bound(stored);
  if (id == kDecay && options.logit_decay) return sigmoid_within_bound(stored);
  return stored;
}

// Makes a neuron whose parameters are value(id).
template <class Real, class F>
ASGL_HOST_DEVICE Neuron<Real> make_neuron(F&& value) {
  return {value(kDecay),     value(kThreshold), value(kReset),    inverse_of_width<Real>(value(kWidth)),
          value(kInputGain), value(kInputBias), value(kInputMean)};
}

// If analog_below has this value, rng_state[2] contains the actual value.
constexpr uint32 kAnalogBelowInState = kAlwaysAnalog + 1;

struct NoiseParams {
  const int64* rng_state;  // [2]: seed and offset; [3] with kAnalogBelowInState: analog_below as well
  uint32 analog_below;     // round(analog_prob * kAlwaysAnalog): an element is analog if its draw is below

  // Whether elements need random draws. They need none if no element is analog (0), or all are (kAlwaysAnalog). Call
  // this only on params that are `resolved()`.
  ASGL_HOST_DEVICE bool needs_draws() const { return analog_below > 0 && analog_below < kAlwaysAnalog; }

  // Returns these params. If rng_state[2] contains the actual analog_below, the returned params have this value,
  // clamped to the allowed range.
  ASGL_HOST_DEVICE NoiseParams resolved() const {
    if (analog_below <= kAlwaysAnalog) return *this;
    const int64 below = rng_state[2];
    return {rng_state, below <= 0 ? 0 : below >= kAlwaysAnalog ? kAlwaysAnalog : static_cast<uint32>(below)};
  }
};

// The tiles of plan_tiles(), which determine the size of GradientPartials.
struct NeuronTiles {
  int64 tile;   // neurons per tile
  int64 count;  // the number of tiles
};

// Arguments that forward and backward share. For adaptive neurons, states are [2, N] and checkpoints [2, (T - 1) /
// kCheckpointSteps, N], with v first and w second.
template <class Scalar>
struct LIFParams {
  using Real = Real_t<Scalar>;
  SequenceShape shape;
  ParameterView<Real> parameters[kNumParameters];
  LIFByOptions<Real> options;
  NoiseParams noise;
  NeuronTiles tiles;
  ParameterSummary summary;  // set by plan_tiles() of CUDA; from kDividendLimit neurons on only `wanted`
  const Scalar* x_seq;       // [outer, T, inner]
  const Real* v_init;        // [N]; null means at rest
  const Scalar* residual;    // [outer, T, inner]; null means none
  Real residual_gain;

  // What input_current and charge may assume about the parameters, whether or not there is a residual. Returns kGeneral
  // if v_rest is not 0, for optional rules, and if a parameter changes over time, which settled kernels do not support.
  ASGL_HOST_DEVICE Input input_assumption() const {
    for (const auto& parameter : parameters) {
      if (parameter.data != nullptr && parameter.step_stride != 0) return Input::kGeneral;
    }
    if (options.v_rest != Real(0) || options.has_optional_rules()) return Input::kGeneral;
    return is_input_plain() ? Input::kPlain : Input::kNormalised;
  }

  // Whether the input current is x itself, apart from the residual.
  ASGL_HOST_DEVICE bool is_input_plain() const {
    const auto is_constant = [&](ParameterId id, Real value) {
      return parameters[id].data == nullptr && parameters[id].constant == value;
    };
    return is_constant(kInputGain, Real(1)) && is_constant(kInputBias, Real(0)) && is_constant(kInputMean, Real(0));
  }
};

// Null outputs are not computed.
template <class Scalar>
struct ForwardParams : LIFParams<Scalar> {
  using typename LIFParams<Scalar>::Real;
  Scalar* s_seq;      // [outer, T, inner]
  Real* v_last;       // [N]
  Real* v_seq;        // [outer, T, inner]
  Real* h_seq;        // [outer, T, inner]
  Real* checkpoints;  // [(T - 1) / kCheckpointSteps, N], after steps 16, 32, ...
  Real* zeros;        // [2], padding, zeroed so that no output is uninitialised

  // Whether only unscaled spikes, the last state and checkpoints are wanted.
  ASGL_HOST_DEVICE bool outputs_only_spikes() const {
    return v_seq == nullptr && h_seq == nullptr && !this->options.scale_output;
  }
};

// Partial sums of one parameter's gradient, with one row of `slots` values per step, or a single row if step_stride is
// 0. Run r is the neurons with n / inner == r, which share a value. Tile k sums its part of run r into slot r + k, or
// into slot r if a run is one neuron. If is_interleaved_in(tile), tile k of CUDA instead sums its neurons of value i
// into slot k * count + i. No two tiles share a slot, and no slot depends on the number of threads.
template <class Real>
struct GradientPartials {
  Real* data;  // [T or 1, slots]; null if not wanted
  int64 slots;

  // The index of the slot for the part of a run that a tile sums.
  ASGL_HOST_DEVICE static int64 slot_index(int64 inner, int64 run, int64 tile) { return inner == 1 ? run : run + tile; }
  // The number of slots of a step: a multiple of four, so that four adjacent slots can be stored at once.
  ASGL_HOST_DEVICE static int64 num_slots(int64 inner, int64 neurons, int64 tiles) {
    return (slot_index(inner, neurons / inner, tiles) + 3) / 4 * 4;
  }
};

// A null gradient of a result of forward means zero. A null gradient of an argument of forward is not computed.
template <class Scalar>
struct BackwardParams : LIFParams<Scalar> {
  using typename LIFParams<Scalar>::Real;
  const Scalar* grad_s_seq;  // [outer, T, inner]
  const Real* grad_v_last;   // [N]
  const Real* grad_v_seq;    // [outer, T, inner]
  const Real* grad_h_seq;    // [outer, T, inner]
  const Real* checkpoints;   // as in ForwardParams
  Scalar* grad_x_seq;        // [outer, T, inner]
  Real* grad_v_init;         // [N]
  Scalar* grad_residual;     // [outer, T, inner], residual_gain times the gradient of the input current
  GradientPartials<Real> partials[kNumParameters];

  // Whether a parameter wants a gradient. Only then does it have a buffer for partial sums.
  ASGL_HOST_DEVICE bool wants_gradient(int id) const { return partials[id].data != nullptr; }

  // Whether settled kernels can compute the wanted gradients. They need a gradient of s_seq, which must be unscaled,
  // and support no gradient of v_seq or h_seq. x_seq or the residual must want a gradient, and input_mean must want
  // none.
  ASGL_HOST_DEVICE bool outputs_only_spikes() const {
    return grad_s_seq != nullptr && (grad_x_seq != nullptr || grad_residual != nullptr) && grad_v_seq == nullptr &&
           grad_h_seq == nullptr && !this->options.scale_output && !wants_gradient(kInputMean);
  }
};

}  // namespace asgl
