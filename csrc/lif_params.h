// What a kernel is given: plain structs, passed by value.
#pragma once

#include "half_types.h"
#include "lif_math.h"

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

enum ParameterId { kWidth, kDecay, kThreshold, kReset, kInputGain, kInputBias };
constexpr int kNumParameters = 6;

// A parameter at neuron n and step t is data[t * step_stride + (n / inner) % count], or constant where data is null.
template <class Real>
struct ParameterView {
  const Real* data;
  Real constant;
  int64 step_stride, inner, count;

  ASGL_HOST_DEVICE Real at(int64 n, int64 t) const {
    return data == nullptr ? constant : data[t * step_stride + (n / inner) % count];
  }
};

struct NoiseParams {
  const int64* rng_state;  // (seed, offset)
  uint32 analog_below;     // round(analog_prob * 65536)

  // 0 is never analog, 65536 always: neither needs a draw.
  ASGL_HOST_DEVICE bool drawn() const { return analog_below > 0 && analog_below < 65536; }
};

template <class Scalar>
struct LIFParams {
  using Real = Real_t<Scalar>;
  SequenceShape shape;
  ParameterView<Real> parameters[kNumParameters];
  NeuronOptions<Real> options;
  NoiseParams noise;
  const Scalar* x_seq;
  const Real* v_init;  // null: v_rest
};

// Outputs that are null are not asked for.
template <class Scalar>
struct ForwardParams : LIFParams<Scalar> {
  using typename LIFParams<Scalar>::Real;
  Scalar* s_seq;
  Real* v_last;
  Real* v_seq;
  Real* h_seq;
  Real* checkpoints;  // v after steps 16, 32, ..., each [neurons]
};

// Partial sums of one parameter's gradient, one row of `slots` numbers a step (one row in all where step_stride is 0).
// Tile k of neurons adds up its part of each run of neurons that share a value and writes it to slot run + k,
// run = n / inner: no two tiles share a slot, and no slot depends on the number of threads.
template <class Real>
struct GradientPartials {
  Real* data;  // null: not asked for
  int64 slots;
};

// Gradients that are null are zero (inputs) or not asked for (outputs).
template <class Scalar>
struct BackwardParams : LIFParams<Scalar> {
  using typename LIFParams<Scalar>::Real;
  const Scalar* grad_s_seq;
  const Real* grad_v_last;
  const Real* grad_v_seq;
  const Real* grad_h_seq;
  const Real* checkpoints;
  Scalar* grad_x_seq;
  Real* grad_v_init;
  GradientPartials<Real> partials[kNumParameters];
};

}  // namespace asgl
