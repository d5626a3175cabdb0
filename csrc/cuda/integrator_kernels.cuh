// The CUDA kernel of the leaky integrator. A thread computes one neuron, or four adjacent ones, over all steps, forward
// or backward. Forward reads x and writes v. Backward reads the gradient of v and writes dx. It also reads v for the
// gradient of decay, and x for the gradient of input_gain.
#pragma once

#include "cuda/neuron_kernels.cuh"
#include "params/integrator.h"

namespace asgl {

// Blocks per multiprocessor: few enough that no registers spill.
template <class Real, Pass kPass>
constexpr int kIntegratorBlocksPerSM = sizeof(Real) == 8      ? (kPass == Pass::kSums ? 3 : 4)
                                       : kPass == Pass::kSums ? 5
                                                              : 7;

template <class Scalar, int kLanes, Pass kPass>
__global__ void __launch_bounds__(kBlockThreads, kIntegratorBlocksPerSM<Real_t<Scalar>, kPass>)
    integrator_kernel(const IntegratorParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  using Lanes = Access<kLanes>;
  constexpr bool kBack = kPass != Pass::kForward, kSums = kPass == Pass::kSums;
  constexpr int kSteps = (kLanes == 1 ? 8 : 4) / (kSums ? 2 : 1);  // steps loaded while as many others are computed
  const int64 steps = params.shape.steps, stride = kBack ? -params.shape.inner : params.shape.inner;
  const ThreadIndex<kLanes> index(params.shape);
  if (!kSums && !index.live) return;
  const int64 first_element = index.element + (kBack ? (1 - steps) * stride : 0);
  const uint32 wanted = params.summary.wanted;
  struct Steps {
    Packed<kLanes, Scalar> in[kSteps], before[kSteps], x[kSteps];
  };
  int64 load_element = first_element;
  const auto load_steps = [&](int64 left, Steps& to) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k < left) to.in[k].load((kBack ? params.grad_v_seq : params.x_seq) + load_element);
      if (kSums && k < left - 1 && has_bit(wanted, kDecay)) {
        to.before[k].load(params.v_seq + (params.delay ? load_element : load_element + stride));
      }
      if (kSums && k < left && has_bit(wanted, kInputGain)) to.x[k].load(params.x_seq + load_element);
      advance(load_element, stride);
    }
  };

  Steps now, next;
  load_steps(steps, now);
  const Real v_rest = params.options.v_rest;
  ThreadNeuron<Real, true> neuron(params, index.read_n, params.options);
  Real v[kLanes], later[kLanes];  // later: the gradient of v
  load_v_init(params, index, v);
  fill(later, Real(0));
  if (kBack && params.grad_v_last != nullptr) Lanes::load(params.grad_v_last + index.read_n, later);
  Real sums[2] = {};
  __shared__ ThreadSums<Real> thread_sums[2];
  const auto store_sums = [&](int64 t, bool per_step) {
    constexpr int kIds[2] = {kDecay, kInputGain};
    uint32 stored = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool has_steps = params.parameters[kIds[i]].step_stride != 0;
      if (has_bit(wanted, kIds[i]) && has_steps == per_step) stored |= 1u << i;
    }
    if (stored == 0) return;
    __syncthreads();  // all threads have read the earlier sums
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!has_bit(stored, i)) continue;
      thread_sums[i].values[threadIdx.x] = sums[i];
      sums[i] = Real(0);
    }
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x / kWarpThreads), id = warp == 0 ? kDecay : kInputGain;
    if (!has_bit(stored, warp)) return;
    Real* slots = params.partials[id].data + t * params.partials[id].slots;
    store_partials<kLanes>(slots, params.parameters[id], params.shape, thread_sums[warp]);
  };

  Scalar* const out_seq = kBack ? params.grad_x_seq : params.v_seq;
  int64 element = first_element;
  for (int64 left = steps; left > 0; left -= kSteps) {
    load_steps(left - kSteps, next);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k >= left) continue;
      const int64 t = kBack ? left - 1 - k : steps - left + k;
      neuron.move_to(t);
      Real in[kLanes], before[kLanes], x[kLanes], out[kLanes];
      now.in[k].unpack(in);
      if (kSums) now.before[k].unpack(before);
      if (kSums) now.x[k].unpack(x);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        if constexpr (kBack) {
          const Real dv = integrator_adjoint(in[j], params.delay, neuron.now(), later[j]);
          out[j] = neuron.now().input_gain * dv;
          if (kSums) sums[0] += dv * ((t == 0 ? v[j] : before[j]) - v_rest);
          if (kSums) sums[1] += dv * x[j];
        } else {
          before[j] = v[j];
          v[j] = integrate(in[j], before[j], neuron.now(), v_rest);
          out[j] = params.delay ? before[j] : v[j];
        }
      }
      if (out_seq != nullptr && index.live) Lanes::store(out, out_seq + element);
      advance(element, stride);
      if (kSums) store_sums(t, true);
    }
    now = next;
  }
  if (kSums) store_sums(0, false);
  Real* const end = kBack ? params.grad_v_init : params.v_last;
  if (end != nullptr && index.live) Lanes::store(kBack ? later : v, end + index.n);
}

}  // namespace asgl
