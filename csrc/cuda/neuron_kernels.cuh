// The CUDA kernels of the neuron. A thread owns one neuron, or four neighbouring ones, for the whole sequence; their
// state stays in its registers. The equations are those of math/neuron.h.
//
// Forward reads x and writes s: two element sizes a neuron and step. Backward goes through segments of at most
// kCheckpointSteps steps from the last to the first: it computes the potentials of a segment again from x and keeps
// them on chip, then walks back over them reading the gradient and writing dx: three element sizes.
//
// The file is one idea, and has some more lines than others: forward and backward must compute the same potentials.
#pragma once

#include "cuda/access.cuh"
#include "cuda/noise.cuh"
#include "neuron_params.h"

namespace asgl {

// The parameters of a thread's neurons, which share them. Except for kGeneral they are the same at all steps.
template <class Real, Input kInput>
class ThreadNeuron {
 public:
  __device__ __forceinline__ ThreadNeuron(const ParameterView<Real> (&parameters)[kNumParameters], int64 n)
      : neuron_(settled_neuron<kInput>(parameters, n)) {}

  __device__ __forceinline__ void move_to(int64) {}
  __device__ __forceinline__ const Neuron<Real>& now() const { return neuron_; }

 private:
  Neuron<Real> neuron_;
};

template <class Real>
class ThreadNeuron<Real, Input::kGeneral> {
 public:
  __device__ __forceinline__ ThreadNeuron(const ParameterView<Real> (&parameters)[kNumParameters], int64 n)
      : parameters_(parameters) {
#pragma unroll
    for (int id = 0; id < kNumParameters; ++id) {
      const ParameterView<Real>& parameter = parameters[id];
      values_[id] = parameter.constant;
      first_[id] = nullptr;
      if (parameter.data != nullptr) {
        first_[id] = parameter.data + parameter.index(n);
        values_[id] = *first_[id];
        per_step_ = per_step_ || parameter.step_stride != 0;
      }
    }
    convert();
  }

  __device__ __forceinline__ void move_to(int64 t) {
    if (!per_step_) return;
#pragma unroll
    for (int id = 0; id < kNumParameters; ++id) {
      const int64 stride = parameters_[id].step_stride;
      if (stride != 0) values_[id] = first_[id][t * stride];
    }
    convert();
  }

  __device__ __forceinline__ const Neuron<Real>& now() const { return neuron_; }

 private:
  __device__ __forceinline__ void convert() {
    neuron_ = neuron_of<Real>([&](ParameterId id) { return values_[id]; });
  }

  const ParameterView<Real> (&parameters_)[kNumParameters];
  const Real* first_[kNumParameters];
  Real values_[kNumParameters];
  bool per_step_ = false;
  Neuron<Real> neuron_;
};

// ---- forward ----

// So many blocks share a multiprocessor's 65,536 registers, 64 for each thread of 8 blocks: enough to keep the memory
// busy, and few enough that nothing is spilled (RESOURCES.md).
template <class Real, Input kInput>
constexpr int kForwardBlocks = kInput == Input::kPlain        ? 8
                               : kInput == Input::kNormalised ? 7
                               : sizeof(Real) == 4            ? 5
                                                              : 3;
template <class Real, int kLanes>
constexpr int kBackwardBlocks = sizeof(Real) == 4 && kLanes == 1 ? 4 : 3;
template <int kSteps>
constexpr int kUniformBackwardBlocks = kSteps <= 8 ? 4 : 3;

// kInput is LIFParams::input(), or kGeneral; except for kGeneral, params.only_spikes() holds.
template <class Scalar, class Model, int kLanes, Input kInput>
__global__ void __launch_bounds__(kBlockThreads, kForwardBlocks<Real_t<Scalar>, kInput>)
    lif_forward_kernel(const ForwardParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  using Lanes = Access<kLanes>;
  constexpr int kSteps = kLanes == 1 ? 8 : 4;  // that are loaded at a time
  static_assert(kCheckpointSteps % kSteps == 0);
  const int64 steps = params.shape.steps, stride = params.shape.inner;
  const Place<kLanes> place(params.shape);
  if (kLanes > 1 && !place.live) return;
  const NoiseSource source(params.noise);
  const NeuronOptions<Real> options = params.options;
  const FiringFromLeast<Real> firing(options);
  ThreadNeuron<Real, kInput> neuron(params.parameters, place.read_n);
  State<Real[kLanes]> state;
  load_state(params, State<const Real*>{}, 0, place, state);

  int64 load_element = place.element;
  const auto load_steps = [&](int64 left, Real(&x)[kSteps][kLanes]) {
    const int length = left < kSteps ? static_cast<int>(left) : kSteps;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k < length) Lanes::load(params.x_seq + load_element, x[k]);
      advance(load_element, stride);
    }
  };

  Real x[kSteps][kLanes], later_x[kSteps][kLanes];
  load_steps(steps, x);
  int64 element = place.element;
  for (int64 start = 0; start < steps; start += kSteps) {
    const int length = steps - start < kSteps ? static_cast<int>(steps - start) : kSteps;
    load_steps(steps - start - kSteps, later_x);  // on their way while these steps are computed
    const SegmentNoise<kLanes, kSteps> noise(source, place.n, start);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k < length) {
        neuron.move_to(start + k);
        Real h[kLanes], s[kLanes];
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          h[j] = Model::template charge<kInput>(x[k][j], lane(state, j), neuron.now(), options);
          s[j] = Model::fire(h[j], noise.is_analog(k, j), neuron.now(), firing);
          Model::reset(h[j], s[j], neuron.now(), lane(state, j));
        }
        if constexpr (kInput == Input::kGeneral) {
          if (params.h_seq != nullptr && place.live) Lanes::store(h, params.h_seq + element);
          if (params.v_seq != nullptr && place.live) Lanes::store(state.v, params.v_seq + element);
          if (options.scale_output) {
#pragma unroll
            for (int j = 0; j < kLanes; ++j) s[j] = s[j] * neuron.now().v_threshold;
          }
        }
        if (place.live) Lanes::store(s, params.s_seq + element);
        advance(element, stride);
      }
#pragma unroll
      for (int j = 0; j < kLanes; ++j) x[k][j] = later_x[k][j];
    }
    const int64 done = start + kSteps;
    if (exists(params.checkpoints) && done % kCheckpointSteps == 0 && done < steps && place.live) {
      store(state, (done / kCheckpointSteps - 1) * params.shape.neurons() + place.n, params.checkpoints);
    }
  }
  if (exists(params.last) && place.live) store(state, place.n, params.last);
}

// ---- sums of a parameter's gradient ----

// Neurons side by side that share a parameter's value, and their threads in this block.
struct Run {
  int64 index;
  int begin, end;
};

template <int kLanes, class Real>
__device__ __forceinline__ Run run_of(const Place<kLanes>& place, const ParameterView<Real>& parameter) {
  const int64 index = place.n / parameter.inner;
  const int64 block_n = place.n - static_cast<int64>(threadIdx.x) * kLanes;
  const int64 begin = (index * parameter.inner - block_n) / kLanes, end = begin + parameter.inner / kLanes;
  return {index, begin < 0 ? 0 : static_cast<int>(begin), end > kBlockThreads ? kBlockThreads : static_cast<int>(end)};
}

// The sum over the threads of each run goes to the run's slot of GradientPartials. All threads of the block must come
// here.
template <class Real>
__device__ __forceinline__ void store_partial(Real* slots, const Run& run, bool live, Real sum) {
  __shared__ Real first_lane[kBlockThreads / kWarpThreads];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  if (!live) sum = Real(0);
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    const Real other = __shfl_down_sync(kWholeWarp, sum, distance);
    if (lane + distance < kWarpThreads && thread + distance < run.end) sum += other;
  }
  __syncthreads();  // whoever reads the sums of the parameter before this one has done so
  if (lane == 0) first_lane[thread / kWarpThreads] = sum;
  __syncthreads();
  if (thread == run.begin && live) {
    for (int warp = thread / kWarpThreads + 1; warp * kWarpThreads < run.end; ++warp) sum += first_lane[warp];
    slots[run.index + blockIdx.x] = sum;
  }
}

// ---- backward ----

// The backward pass where params.only_spikes() and the parameters are what kInput says. The potentials of a segment of
// kSteps steps stay in registers.
template <class Scalar, class Model, int kSteps, Input kInput>
__global__ void __launch_bounds__(kBlockThreads, kUniformBackwardBlocks<kSteps>)
    lif_backward_uniform_kernel(const BackwardParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  constexpr int kLanes = 4;
  constexpr int kAhead = 2;  // steps by which a gradient is loaded before it is needed
  using Lanes = Access<kLanes>;
  const int64 steps = params.shape.steps, stride = params.shape.inner;
  const Place<kLanes> place(params.shape);
  constexpr bool kNormalised = kInput == Input::kNormalised;
  Real width_sum = 0, gain_sum = 0, bias_sum = 0;
  if (place.live) {
    const NoiseSource source(params.noise);
    const NeuronOptions<Real> options = params.options;
    const FiringFromLeast<Real> firing(options);
    const Neuron<Real> neuron = settled_neuron<kInput>(params.parameters, place.n);
    bool carried = exists(params.grad_last);
    State<Real[kLanes]> d_state;
    fill(d_state, State<Real>());
    if (carried) load(params.grad_last, place.n, d_state);

    for (int64 start = (steps - 1) / kSteps * kSteps; start >= 0; start -= kSteps) {
      const int length = steps - start < kSteps ? static_cast<int>(steps - start) : kSteps;
      int64 element = place.element + start * stride;
      Real h[kSteps][kLanes], g[kAhead][kLanes], x[kAhead][kLanes];
      State<Real[kLanes]> state;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (k < length) Lanes::load(params.x_seq + element, h[k]);
        advance(element, stride);
      }
      const auto load_gradient = [&](int k) {  // k is how far `element` is beyond the first of the segment
        advance(element, -stride);
        Real(&row)[kLanes] = g[(k + kAhead) % kAhead];
        fill(row, Real(0));
        if (k >= 0 && k < length && params.grad_s_seq != nullptr) Lanes::load(params.grad_s_seq + element, row);
        // x is loaded once more: there are no registers for it, and it is not gone from the cache.
        if (kNormalised && k >= 0 && k < length) Lanes::load(params.x_seq + element, x[(k + kAhead) % kAhead]);
      };
      load_state(params, params.checkpoints, start, place, state);
      const SegmentNoise<kLanes, kSteps> noise(source, place.n, start);
      const auto fire_lane = [&](int k, int j) { return Model::fire(h[k][j], noise.is_analog(k, j), neuron, firing); };
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (k < length) {
#pragma unroll
          for (int j = 0; j < kLanes; ++j) {
            h[k][j] = Model::template charge<kInput>(h[k][j], lane(state, j), neuron, options);
            Model::reset(h[k][j], fire_lane(k, j), neuron, lane(state, j));
          }
        }
      }
      element = place.element + (start + kSteps) * stride;
#pragma unroll
      for (int k = kSteps - 1; k >= kSteps - kAhead; --k) load_gradient(k);
#pragma unroll
      for (int k = kSteps - 1; k >= 0; --k) {
        if (k < length) {
          Real dx[kLanes];
#pragma unroll
          for (int j = 0; j < kLanes; ++j) {
            const StepGradient<Real> step = Model::step_adjoint(
                g[k % kAhead][j], NoGradient{}, h[k][j], fire_lane(k, j), carried, neuron, options, lane(d_state, j));
            width_sum += step.dy * (h[k][j] - neuron.v_threshold);
            if constexpr (kNormalised) {
              gain_sum += step.dc * (x[k % kAhead][j] - neuron.input_mean);
              bias_sum += step.dc;
            }
            dx[j] = kNormalised ? neuron.input_gain * step.dc : step.dc;
          }
          carried = true;
          if (params.grad_x_seq != nullptr) Lanes::store(dx, params.grad_x_seq + (element + (kAhead - 1) * stride));
        }
        load_gradient(k - kAhead);
      }
    }
    if (exists(params.grad_init)) store(d_state, place.n, params.grad_init);
  }
  Real* width_slots = params.partials[kWidth].data;
  if (width_slots != nullptr) store_partial(width_slots, {0, 0, kBlockThreads}, place.live, width_sum);
  if constexpr (kNormalised) {
    const auto store_sum = [&](ParameterId id, Real sum) {
      Real* slots = params.partials[id].data;
      if (slots != nullptr) store_partial(slots, run_of(place, params.parameters[id]), place.live, sum);
    };
    store_sum(kInputGain, gain_sum);
    store_sum(kInputBias, bias_sum);
  }
}

// The backward pass with everything that there is. The potentials of a segment stay in shared memory, where a loop can
// index them.
template <class Scalar, class Model, int kLanes>
__global__ void __launch_bounds__(kBlockThreads, kBackwardBlocks<Real_t<Scalar>, kLanes>)
    lif_backward_kernel(const BackwardParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  using Lanes = Access<kLanes>;
  constexpr int kSteps = kCheckpointSteps;
  constexpr int kTogether = kLanes == 1 ? 8 : 4;  // loads that are under way at a time
  struct alignas(sizeof(Real) * kLanes) Potentials {
    Real values[kLanes];
  };
  __shared__ Potentials potentials[kSteps][kBlockThreads];
  const int64 steps = params.shape.steps, stride = params.shape.inner;
  const Place<kLanes> place(params.shape);
  const NoiseSource source(params.noise);
  const NeuronOptions<Real> options = params.options;
  const FiringFromLeast<Real> firing(options);
  ThreadNeuron<Real, Input::kGeneral> neuron(params.parameters, place.read_n);
  const auto store_sum = [&](int id, int64 t, Real sum) {
    const ParameterView<Real>& parameter = params.parameters[id];
    Real* slots = params.partials[id].data + (parameter.step_stride != 0 ? t * params.partials[id].slots : 0);
    if (parameter.inner > 1) {
      store_partial(slots, run_of(place, parameter), place.live, sum);
    } else if (place.live) {
      slots[place.n + blockIdx.x] = sum;
    }
  };
  Real sums[kNumParameters] = {};
  bool carried = exists(params.grad_last);
  State<Real[kLanes]> d_state;
  fill(d_state, State<Real>());  // of {} NVRTC makes a variable in global memory, and reads it
  if (carried) load(params.grad_last, place.read_n, d_state);

  for (int64 start = (steps - 1) / kSteps * kSteps; start >= 0; start -= kSteps) {
    const int length = steps - start < kSteps ? static_cast<int>(steps - start) : kSteps;
    const int64 first_element = place.element + start * stride;
    for (int first = 0; first < length; first += kTogether) {
      Potentials x[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k < length) Lanes::load(params.x_seq + (first_element + (first + k) * stride), x[k].values);
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k < length) potentials[first + k][threadIdx.x] = x[k];
      }
    }
    Real next_g[kLanes];
    State<Real[kLanes]> first_state;
    load_state(params, params.checkpoints, start, place, first_state);
    State<Real[kLanes]> state = first_state;
    const SegmentNoise<kLanes, kSteps> noise(source, place.n, start);
    const auto fire_lane = [&](Real h, int k, int j) {
      return Model::fire(h, noise.is_analog(k, j), neuron.now(), firing);
    };
#pragma unroll 1
    for (int k = 0; k < length; ++k) {
      neuron.move_to(start + k);
      Potentials h = potentials[k][threadIdx.x];
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        h.values[j] = Model::template charge<Input::kGeneral>(h.values[j], lane(state, j), neuron.now(), options);
        Model::reset(h.values[j], fire_lane(h.values[j], k, j), neuron.now(), lane(state, j));
      }
      potentials[k][threadIdx.x] = h;
    }

    const auto load_next_gradient = [&](int k) {
      fill(next_g, Real(0));
      if (k >= 0 && params.grad_s_seq != nullptr) {
        Lanes::load(params.grad_s_seq + (first_element + k * stride), next_g);
      }
    };
    load_next_gradient(length - 1);
#pragma unroll 1
    for (int k = length - 1; k >= 0; --k) {
      const int64 t = start + k, element = first_element + k * stride;
      Real g[kLanes], gh[kLanes], x[kLanes], dx[kLanes];
      State<Real[kLanes]> before = first_state;
#pragma unroll
      for (int j = 0; j < kLanes; ++j) g[j] = next_g[j];
      load_next_gradient(k - 1);
      fill(gh, Real(0));
      fill(x, Real(0));
      if (params.grad_h_seq != nullptr) Lanes::load(params.grad_h_seq + element, gh);
      if (params.wants(kInputGain)) Lanes::load(params.x_seq + element, x);
      if (params.grad_v_seq != nullptr) {
        Real gv[kLanes];
        Lanes::load(params.grad_v_seq + element, gv);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) d_state.v[j] += gv[j];
        carried = true;
      }
      if (params.wants(kDecay) && k > 0) {
        const Potentials h_before = potentials[k - 1][threadIdx.x];
        neuron.move_to(t - 1);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const Real s_before = fire_lane(h_before.values[j], k - 1, j);
          Model::reset(h_before.values[j], s_before, neuron.now(), lane(before, j));
        }
      }
      neuron.move_to(t);
      const Potentials h = potentials[k][threadIdx.x];
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        const Real s = fire_lane(h.values[j], k, j);
        if (options.scale_output) {
          sums[kThreshold] += g[j] * s;
          g[j] = g[j] * neuron.now().v_threshold;
        }
        if (carried) sums[kReset] += Model::kResetsHard ? d_state.v[j] * s : -(d_state.v[j] * s);
        const StepGradient<Real> step =
            Model::step_adjoint(g[j], gh[j], h.values[j], s, carried, neuron.now(), options, lane(d_state, j));
        sums[kWidth] += step.dy * (h.values[j] - neuron.now().v_threshold);
        sums[kThreshold] -= step.dy * neuron.now().inverse_width;
        sums[kDecay] += step.dh * (before.v[j] - options.v_rest);
        dx[j] = neuron.now().input_gain * step.dc;
        sums[kInputGain] += step.dc * (x[j] - neuron.now().input_mean);
        sums[kInputBias] += step.dc;
        sums[kInputMean] -= dx[j];
      }
      carried = true;
      if (params.grad_x_seq != nullptr && place.live) {
        int64 stored_element = element;
        forget_origin(stored_element);  // or the compiler splits the store where elements are of a half type
        Lanes::store(dx, params.grad_x_seq + stored_element);
      }
#pragma unroll
      for (int id = 0; id < kNumParameters; ++id) {
        if (params.wants(id) && params.parameters[id].step_stride != 0) {
          store_sum(id, t, sums[id]);
          sums[id] = Real(0);
        }
      }
    }
  }
#pragma unroll
  for (int id = 0; id < kNumParameters; ++id) {
    if (params.wants(id) && params.parameters[id].step_stride == 0) store_sum(id, 0, sums[id]);
  }
  if (exists(params.grad_init) && place.live) store(d_state, place.n, params.grad_init);
}

// ---- from partial sums to the gradient ----

constexpr int kSumThreads = 512;

// One thread for each element of the gradient, or, where each has many slots, one block.
template <class Real, bool kWholeBlock>
__global__ void __launch_bounds__(kSumThreads, 2) gradient_sum_kernel(const GradientSum<Real> sum) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64 element = kWholeBlock ? blockIdx.x : static_cast<int64>(blockIdx.x) * kSumThreads + thread;
  if (element >= sum.elements()) return;
  double total = sum.sum_slots(element, kWholeBlock ? thread : 0, kWholeBlock ? kSumThreads : 1);
  if constexpr (kWholeBlock) {
    __shared__ double first_lane[kSumThreads / kWarpThreads];
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
      total += __shfl_down_sync(kWholeWarp, total, distance);
    }
    if (thread % kWarpThreads == 0) first_lane[thread / kWarpThreads] = total;
    __syncthreads();
    if (thread > 0) return;
    for (int warp = 1; warp < kSumThreads / kWarpThreads; ++warp) total += first_lane[warp];
  }
  sum.store(element, total);
}

}  // namespace asgl
