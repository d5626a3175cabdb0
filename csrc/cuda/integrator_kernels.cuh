// The CUDA kernels of the leaky integrator. A thread owns one neuron, or four neighbouring ones, for the whole
// sequence. Forward reads x and writes v, backward reads the gradient and writes dx: two element sizes each.
#pragma once

#include "cuda/neuron_kernels.cuh"
#include "integrator_params.h"

namespace asgl {

// Steps that are loaded at a time, while as many are computed.
template <int kLanes>
constexpr int kIntegratorSteps = kLanes == 1 ? 8 : 4;

template <class Scalar, int kLanes>
__global__ void __launch_bounds__(kBlockThreads, sizeof(Real_t<Scalar>) == 8 ? 4 : 7)
    integrator_forward_kernel(const IntegratorParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  using Lanes = Access<kLanes>;
  constexpr int kSteps = kIntegratorSteps<kLanes>;
  const int64 steps = params.shape.steps, stride = params.shape.inner;
  const Place<kLanes> place(params.shape);
  if (!place.live) return;

  int64 load_element = place.element;
  const auto load_steps = [&](int64 left, Real(&x)[kSteps][kLanes]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k < left) Lanes::load(params.x_seq + load_element, x[k]);
      advance(load_element, stride);
    }
  };

  Real x[kSteps][kLanes], later_x[kSteps][kLanes];
  load_steps(steps, x);
  const Real v_rest = params.options.v_rest;
  ThreadNeuron<Real, Input::kGeneral> neuron(params.parameters, place.n, params.options);
  State<Real[kLanes]> state;
  load_state(params, State<const Real*>{}, 0, place, state);
  int64 element = place.element;
  for (int64 start = 0; start < steps; start += kSteps) {
    load_steps(steps - start - kSteps, later_x);  // on their way while these steps are computed
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k < steps - start) {
        neuron.move_to(start + k);
        Real out[kLanes];
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const Real before = state.v[j];
          state.v[j] = integrate(x[k][j], before, neuron.now(), v_rest);
          out[j] = params.delay ? before : state.v[j];
        }
        Lanes::store(out, params.v_seq + element);
        advance(element, stride);
      }
#pragma unroll
      for (int j = 0; j < kLanes; ++j) x[k][j] = later_x[k][j];
    }
  }
  if (exists(params.last)) store(state, place.n, params.last);
}

// kLearns: decay or input_gain wants a gradient.
template <class Scalar, int kLanes, bool kLearns>
__global__ void __launch_bounds__(kBlockThreads, sizeof(Real_t<Scalar>) == 8 ? (kLearns ? 3 : 4) : (kLearns ? 5 : 7))
    integrator_backward_kernel(const IntegratorParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  using Lanes = Access<kLanes>;
  constexpr int kSteps = kLearns ? kIntegratorSteps<kLanes> / 2 : kIntegratorSteps<kLanes>;
  const int64 steps = params.shape.steps, stride = params.shape.inner;
  const Place<kLanes> place(params.shape);
  if (!kLearns && !place.live) return;
  struct Steps {
    Real g[kSteps][kLanes], before[kSteps][kLanes], x[kSteps][kLanes];
  };
  int64 load_element = place.element + (steps - 1) * stride;
  const auto load_steps = [&](int64 last, Steps& to) {  // `last` and the steps before it
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k <= last) Lanes::load(params.grad_v_seq + load_element, to.g[k]);
      if (kLearns && k < last && params.wants(kDecay)) {
        Lanes::load(params.v_seq + (params.delay ? load_element : load_element - stride), to.before[k]);
      }
      if (kLearns && k <= last && params.wants(kInputGain)) Lanes::load(params.x_seq + load_element, to.x[k]);
      advance(load_element, -stride);
    }
  };

  Steps now, next;
  load_steps(steps - 1, now);
  const Real v_rest = params.options.v_rest;
  ThreadNeuron<Real, Input::kGeneral> neuron(params.parameters, place.read_n, params.options);
  State<Real[kLanes]> init;
  if (kLearns) load_state(params, State<const Real*>{}, 0, place, init);
  State<Real[kLanes]> later;
  fill(later, State<Real>());
  if (exists(params.grad_last)) load(params.grad_last, place.read_n, later);
  Real sums[2] = {};
  __shared__ WarpSums<Real> room;
  Run run;
  constexpr int kIds[2] = {kDecay, kInputGain};
  const auto store_sums = [&](int64 t, bool per_step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const ParameterView<Real>& parameter = params.parameters[kIds[i]];
      const GradientPartials<Real>& partials = params.partials[kIds[i]];
      if (partials.data == nullptr || (parameter.step_stride != 0) != per_step) continue;
      store_partial(partials.data + t * partials.slots, parameter, place, sums[i], run, room);
      sums[i] = Real(0);
    }
  };

  int64 element = load_element + kSteps * stride;
  for (int64 last = steps - 1; last >= 0; last -= kSteps) {
    load_steps(last - kSteps, next);  // on their way while these steps are computed
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k <= last) {
        neuron.move_to(last - k);
        Real dx[kLanes];
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const Real dv = integrator_adjoint(now.g[k][j], params.delay, neuron.now(), later.v[j]);
          dx[j] = neuron.now().input_gain * dv;
          if (kLearns) {
            sums[0] += dv * ((k == last ? init.v[j] : now.before[k][j]) - v_rest);
            sums[1] += dv * now.x[k][j];
          }
        }
        if (params.grad_x_seq != nullptr && place.live) Lanes::store(dx, params.grad_x_seq + element);
        advance(element, -stride);
        if (kLearns) store_sums(last - k, true);
      }
    }
    now = next;
  }
  if (kLearns) store_sums(0, false);
  if (exists(params.grad_init) && place.live) store(later, place.n, params.grad_init);
}

}  // namespace asgl
