// The CUDA kernels of adaptive neurons. They read the options of the neuron at run time, as the general kernels of
// cuda/neuron_kernels.cuh do. A thread computes one neuron.
#pragma once

#include "cuda/neuron_kernels.cuh"
#include "math/adaptive.h"

namespace asgl {

// Blocks per multiprocessor: few enough that no registers spill.
template <class Real>
constexpr int kAdaptiveBlocksPerSM = sizeof(Real) == 8 ? 3 : 4;

// Loads v and w of neuron n from an array in which w is `stride` elements after v. If the array is null, v is v_rest
// and w is 0.
template <class Real>
__device__ __forceinline__ void load_states(const Real* from, int64 n, int64 stride, Real v_rest, Real& v, Real& w) {
  v = from == nullptr ? v_rest : from[n];
  w = from == nullptr ? Real(0) : from[n + stride];
}
// Stores v and w of neuron n in an array in which w is `stride` elements after v.
template <class Real>
__device__ __forceinline__ void store_states(Real v, Real w, Real* to, int64 n, int64 stride) {
  to[n] = v;
  to[n + stride] = w;
}

// Computes s_seq, and the wanted potentials, last states and checkpoints.
template <class Scalar>
__global__ void __launch_bounds__(kBlockThreads, kAdaptiveBlocksPerSM<Real_t<Scalar>>)
    adaptive_forward_kernel(const ForwardParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  constexpr int kSteps = 8;  // steps loaded while as many others are computed
  const int64 steps = params.shape.steps, stride = params.shape.inner, neurons = params.shape.neurons();
  const ThreadIndex<1> index(params.shape);
  Packed<1, Scalar> now[kSteps], next[kSteps];
  int64 load_element = index.element, element = index.element;
  const auto load_steps = [&](int64 left, Packed<1, Scalar>(&to)[kSteps]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k < left) to[k].load(params.x_seq + load_element);
      advance(load_element, stride);
    }
  };
  load_steps(steps, now);
  const NoiseSource source(params.noise);
  const auto model = AdaptiveLIF<Real>::from_options(params.options);
  const FiringFromLeast<Real> firing(model);
  ThreadNeuron<Real, true> neuron(params, index.read_n, model);
  Real v, w;
  load_states(params.v_init, index.read_n, neurons, model.v_rest, v, w);
  for (int64 start = 0; start < steps; start += kSteps) {
    load_steps(steps - start - kSteps, next);
    const int length = steps - start < kSteps ? static_cast<int>(steps - start) : kSteps;
    const SegmentNoise<1, kSteps> noise(source, index.n, start, length);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k >= length) continue;
      neuron.move_to(start + k);
      Real x[1], s;
      now[k].unpack(x);
      const Real used_w = w, h = model.step(x[0], noise.is_analog(k, 0), neuron.now(), firing, v, w, s);
      if (index.live) {
        params.s_seq[element] = from_real<Scalar>(s);
        if (params.h_seq != nullptr) params.h_seq[element] = model.compared_potential(h, used_w);
        if (params.v_seq != nullptr) params.v_seq[element] = v;
      }
      advance(element, stride);
    }
    const int64 done = start + kSteps;
    if (params.checkpoints != nullptr && done % kCheckpointSteps == 0 && done < steps && index.live) {
      const int64 at = (done / kCheckpointSteps - 1) * neurons + index.n;
      store_states(v, w, params.checkpoints, at, checkpoint_stride(params.shape));
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) now[k] = next[k];
  }
  if (params.v_last != nullptr && index.live) store_states(v, w, params.v_last, index.n, neurons);
  if (params.zeros != nullptr && index.n == 0) params.zeros[0] = params.zeros[1] = Real(0);
}

// Computes the wanted gradients. The potentials and adaptations of a segment are in shared memory, because registers
// can't be indexed at run time.
template <class Scalar>
__global__ void __launch_bounds__(kBlockThreads, kAdaptiveBlocksPerSM<Real_t<Scalar>>)
    adaptive_backward_kernel(const BackwardParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  constexpr int kSteps = kCheckpointSteps, kTogether = 8;  // loads in flight
  __shared__ Real potentials[kSteps][kBlockThreads], adaptations[kSteps][kBlockThreads];
  const int64 steps = params.shape.steps, stride = params.shape.inner, neurons = params.shape.neurons();
  const ThreadIndex<1> index(params.shape);
  const NoiseSource source(params.noise);
  const auto model = AdaptiveLIF<Real>::from_options(params.options);
  const Real v_rest = model.v_rest;
  const FiringFromLeast<Real> firing(model);
  ThreadNeuron<Real, true> neuron(params, index.read_n, model);
  const uint32 wanted = params.summary.wanted;
  Real sums[kNumParameters] = {};
  // Stores the sums of the parameters that change over time if `per_step`, else those of the other parameters. Then
  // sets these sums to 0. Overwrites this row of `potentials`, which serves as the buffer of store_block_sum.
  const auto store_sums = [&](bool per_step, int64 t, int row) {
#pragma unroll
    for (int id = 0; id < kNumParameters; ++id) {
      if (!has_bit(wanted, id) || (params.parameters[id].step_stride != 0) != per_step) continue;
      store_block_sum<1>(params, id, t, sums[id], reinterpret_cast<ThreadSums<Real>&>(potentials[row]));
      sums[id] = Real(0);
    }
  };
  bool carried = params.grad_v_last != nullptr;
  Real dv, dw;
  load_states(params.grad_v_last, index.read_n, neurons, Real(0), dv, dw);

  for (int64 start = (steps - 1) / kSteps * kSteps; start >= 0; start -= kSteps) {
    const int length = steps - start < kSteps ? static_cast<int>(steps - start) : kSteps;
    const int64 first_element = index.element + start * stride;
    for (int first = 0; first < length; first += kTogether) {
      Packed<1, Scalar> x[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k < length) x[k].load(params.x_seq + (first_element + (first + k) * stride));
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k < length) potentials[first + k][threadIdx.x] = to_real(x[k].element);
      }
    }
    Real v, w;
    if (start > 0) {
      const int64 at = (start / kSteps - 1) * neurons + index.read_n;
      load_states(params.checkpoints, at, checkpoint_stride(params.shape), v_rest, v, w);
    } else {
      load_states(params.v_init, index.read_n, neurons, v_rest, v, w);
    }
    const Real first_v = v;
    const SegmentNoise<1, kSteps> noise(source, index.n, start, length);
#pragma unroll 1
    for (int k = 0; k < length; ++k) {
      neuron.move_to(start + k);
      adaptations[k][threadIdx.x] = w;
      Real s;
      const Real x = potentials[k][threadIdx.x];
      potentials[k][threadIdx.x] = model.step(x, noise.is_analog(k, 0), neuron.now(), firing, v, w, s);
    }
    // Returns the potential after step k of the segment, and sets s to the spike of this step.
    const auto recompute = [&](int k, Real& s) {
      neuron.move_to(start + k);
      const Real h = potentials[k][threadIdx.x], w = adaptations[k][threadIdx.x];
      s = model.fire(model.compared_potential(h, w), noise.is_analog(k, 0), neuron.now(), firing);
      return model.potential_after_reset(h, s, model.with_adapted_reset(neuron.now(), w));
    };
#pragma unroll 1
    for (int k = length - 1; k >= 0; --k) {
      const int64 t = start + k, element = first_element + k * stride;
      const Real g = params.grad_s_seq == nullptr ? Real(0) : to_real(params.grad_s_seq[element]);
      const Real gh = params.grad_h_seq == nullptr ? Real(0) : params.grad_h_seq[element];
      if (params.grad_v_seq != nullptr) {
        dv += params.grad_v_seq[element];
        carried = true;
      }
      Real s, before = first_v;
      if (has_bit(wanted, kDecay) && k > 0) before = recompute(k - 1, s);
      const Real after = recompute(k, s), h = potentials[k][threadIdx.x], used_w = adaptations[k][threadIdx.x];
      if (carried) {
        sums[kAdaptDecay] += dw * used_w;
        sums[kAdaptPotential] += dw * (after - v_rest);
        sums[kAdaptSpike] += dw * s;
      }
      const auto gradient =
          model.adjoint(g, gh, h, model.compared_potential(h, used_w), s, used_w, carried, neuron.now(), dv, dw);
      sums[kWidth] += gradient.step.dy * gradient.distance;
      sums[kThreshold] -= gradient.step.dy * neuron.now().inverse_width;
      sums[kReset] += gradient.reset;
      sums[kDecay] += gradient.step.dh * (before - v_rest);
      carried = true;
      if (params.grad_x_seq != nullptr && index.live) params.grad_x_seq[element] = from_real<Scalar>(gradient.step.dc);
      store_sums(true, t, k);
    }
    __syncthreads();  // all threads have read the sums
  }
  store_sums(false, 0, 0);
  if (params.grad_v_init != nullptr && index.live) store_states(dv, dw, params.grad_v_init, index.n, neurons);
}

}  // namespace asgl
