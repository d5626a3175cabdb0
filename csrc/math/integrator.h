// One step of the leaky integrator and its adjoint, for one element, in CPU and CUDA kernels.
//
//   v[t] = v_rest + decay * (v[t-1] - v_rest) + input_gain * x[t];   out[t] = v[t], or v[t-1] with delay
//
// With g and dv the gradients of out and v:
//   dv[t] = g[t] + decay * dv[t+1],   or with delay   g[t+1] + decay * dv[t+1]
//   dx[t] = input_gain * dv[t];   d decay += dv[t] * (v[t-1] - v_rest);   d input_gain += dv[t] * x[t]
#pragma once

#include "math/neuron.h"

namespace asgl {

// Returns v[t] from x[t] and v, which is v[t-1].
template <class Real>
ASGL_HOST_DEVICE Real integrate(Real x, Real v, const Neuron<Real>& neuron, Real v_rest) {
  return (v_rest + neuron.decay * (v - v_rest)) + neuron.input_gain * x;
}

// Returns dv[t]. On entry `later` is the part of dv[t] that comes from later steps, and on return that of dv[t-1].
template <class Real>
ASGL_HOST_DEVICE Real integrator_adjoint(Real g, bool delay, const Neuron<Real>& neuron, Real& later) {
  const Real dv = delay ? later : g + later;
  later = neuron.decay * dv;
  if (delay) later = g + later;
  return dv;
}

}  // namespace asgl
