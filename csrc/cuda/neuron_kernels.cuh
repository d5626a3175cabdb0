// The CUDA kernels. A thread owns one neuron, or four neighbouring ones, for the whole sequence; their potentials stay
// in its registers. The equations are those of lif_math.h, the noise is that of philox.h.
//
// Forward reads x and writes s: two element sizes a neuron and step. Backward goes through segments of at most
// kCheckpointSteps steps from the last to the first: it computes the potentials of a segment again from x and keeps
// them on chip, then walks back over them reading the gradient and writing dx: three element sizes.
//
// Four neurons share a block of noise and, where they lie side by side, an access to memory, of 16 bytes in float32.
// lif_cuda.cuh says when a thread gets four; both cases are the same source.
#pragma once

#include "lif_params.h"
#include "philox.h"

namespace asgl {

constexpr int kBlockThreads = 128;
constexpr int kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr int kNoiseGroup = 4;  // neurons that a block of noise serves, for two steps

// ---- neighbouring elements in memory ----

template <int kLanes>
struct Access;

template <>
struct Access<1> {
  template <class Element>
  static __device__ __forceinline__ void load(const Element* from, Real_t<Element> (&to)[1]) {
    to[0] = to_real(*from);
  }
  template <class Element>
  static __device__ __forceinline__ void store(const Real_t<Element> (&from)[1], Element* to) {
    *to = from_real<Element>(from[0]);
  }
};

template <>
struct Access<4> {
  static __device__ __forceinline__ void load(const float* from, float (&to)[4]) {
    const float4 values = *reinterpret_cast<const float4*>(from);
    to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
  }
  static __device__ __forceinline__ void store(const float (&from)[4], float* to) {
#if defined(__CUDA_ARCH__)  // left to itself, the compiler splits some of these stores
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]),
                 "f"(from[3])
                 : "memory");
#else
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
#endif
  }
  // Half and BFloat16
  template <class Element>
  static __device__ __forceinline__ void load(const Element* from, float (&to)[4]) {
    const uint2 pairs = *reinterpret_cast<const uint2*>(from);
    unpack<Element>(pairs.x, to[0], to[1]);
    unpack<Element>(pairs.y, to[2], to[3]);
  }
  template <class Element>
  static __device__ __forceinline__ void store(const float (&from)[4], Element* to) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack<Element>(from[0], from[1]), pack<Element>(from[2], from[3]));
  }
};

template <int kLanes, class Real>
__device__ __forceinline__ void fill(Real (&values)[kLanes], Real value) {
#pragma unroll
  for (int j = 0; j < kLanes; ++j) values[j] = value;
}

// Lest the compiler compute the addresses of all steps beforehand, and run out of registers for them.
__device__ __forceinline__ void advance(int64& element, int64 stride) {
  element += stride;
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(element));
#endif
}

// ---- who computes what ----

// The neurons n, n + 1, ... of a thread. Where others count on it at shuffles and barriers, a thread beyond the last
// neuron goes through the motions on neuron 0 and stores nothing.
template <int kLanes>
struct Place {
  int64 n;
  bool live;
  int64 read_n;   // n where there is such a neuron
  int64 element;  // its element at step 0; each step lies `inner` elements further

  __device__ __forceinline__ explicit Place(const SequenceShape& shape)
      : n((static_cast<int64>(blockIdx.x) * kBlockThreads + threadIdx.x) * kLanes),
        live(n < shape.neurons()),
        read_n(live ? n : 0),
        element(shape.outer == 1 ? read_n : shape.element(read_n, 0)) {}
};

// The parameters of a thread's neurons, which share them. But for kGeneral they are the same at all steps.
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
    neuron_ = {values_[kDecay],     values_[kThreshold], values_[kReset],    Real(1) / values_[kWidth],
               values_[kInputGain], values_[kInputBias], values_[kInputMean]};
  }

  const ParameterView<Real> (&parameters_)[kNumParameters];
  const Real* first_[kNumParameters];
  Real values_[kNumParameters];
  bool per_step_ = false;
  Neuron<Real> neuron_;
};

// The potential before step `start`, the first of a segment.
template <int kLanes, class Scalar, class Real>
__device__ __forceinline__ void load_potential(const LIFParams<Scalar>& params, const Real* checkpoints, int64 start,
                                               const Place<kLanes>& place, Real (&v)[kLanes]) {
  if (start > 0) {
    const int64 kept = start / kCheckpointSteps - 1;
    Access<kLanes>::load(checkpoints + (kept * params.shape.neurons() + place.read_n), v);
  } else if (params.v_init != nullptr) {
    Access<kLanes>::load(params.v_init + place.read_n, v);
  } else {
    fill(v, params.options.v_rest);
  }
}

// ---- noise ----

class NoiseSource {
 public:
  __device__ __forceinline__ explicit NoiseSource(const NoiseParams& params) {
    const NoiseParams noise = params.settled();
    drawn_ = noise.drawn();
    key_ = drawn_ ? noise_key(noise.rng_state) : NoiseKey{};
    limit_ = drawn_ ? noise.analog_below << 16 : static_cast<uint32>(noise.analog_below > 0);
  }

  // Lest the compiler keep the keys of all ten rounds in registers while they are not needed.
  __device__ __forceinline__ void forget_origin() {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(key_.seed_low), "+r"(key_.seed_high));
#endif
  }
  __device__ __forceinline__ bool drawn() const { return drawn_; }
  __device__ __forceinline__ bool always() const { return !drawn_ && limit_ > 0; }

  // Where nothing needs to be drawn every draw is 0, and so below a limit of 1.
  __device__ __forceinline__ NoiseBlock draw(int64 n, int64 step_pair) const {
    if (!drawn_) return {};
    return noise_block(static_cast<uint64>(n) / kNoiseGroup, static_cast<uint32>(step_pair), key_);
  }

  // The 16 bits of neuron j are compared at the upper end of a word, where those of odd neurons are already.
  __device__ __forceinline__ bool is_analog(const NoiseBlock& block, int odd_step, int j) const {
    const uint32 word = static_cast<uint32>(block.draws[odd_step] >> (32 * (j / 2)));
    return (j % 2 == 1 ? word : word << 16) < limit_;
  }

 private:
  bool drawn_;
  NoiseKey key_;
  uint32 limit_;
};

// Whether neuron n + j is analog at step start + k, for the neurons of a thread and the steps of a segment.
template <int kLanes, int kSteps>
class SegmentNoise;

template <int kSteps>
class SegmentNoise<1, kSteps> {
 public:
  // Four threads share a group: each draws every fourth pair of steps for all four, then they tell each other.
  __device__ __forceinline__ SegmentNoise(const NoiseSource& source, int64 n, int64 start) {
    static_assert(kSteps == 8 || kSteps == 16);
    const int rank = static_cast<int>(threadIdx.x) % kNoiseGroup;
    uint32 drawn = 0;  // a byte for each pair of steps, in it two bits, even and odd step, for each neuron
#pragma unroll
    for (int i = 0; i < kSteps / 8; ++i) {
      const NoiseBlock block = source.draw(n, start / 2 + 4 * i + rank);
#pragma unroll
      for (int j = 0; j < kNoiseGroup; ++j) {
        drawn |= static_cast<uint32>(source.is_analog(block, 0, j)) << (8 * i + 2 * j);
        drawn |= static_cast<uint32>(source.is_analog(block, 1, j)) << (8 * i + 2 * j + 1);
      }
    }
#pragma unroll
    for (int other = 0; other < kNoiseGroup; ++other) {
      const uint32 told = __shfl_sync(kWholeWarp, drawn, other, kNoiseGroup) >> (2 * rank);
#pragma unroll
      for (int i = 0; i < kSteps / 8; ++i) bits_ |= (told >> (8 * i) & 3u) << (8 * i + 2 * other);
    }
  }

  __device__ __forceinline__ bool is_analog(int k, int) const { return bits_ >> k & 1u; }

 private:
  uint32 bits_ = 0;
};

template <int kSteps>
class SegmentNoise<4, kSteps> {
 public:
  __device__ __forceinline__ SegmentNoise(const NoiseSource& source, int64 n, int64 start) {
    static_assert(kSteps == 8 || kSteps == 16);
    steps_0_to_7_ = eight_steps(source, n, start);
    if constexpr (kSteps > 8) steps_8_to_15_ = eight_steps(source, n, start + 8);
  }

  __device__ __forceinline__ bool is_analog(int k, int j) const {
    return (k < 8 ? steps_0_to_7_ : steps_8_to_15_) >> (4 * (k % 8) + j) & 1u;
  }

 private:
  static __device__ __forceinline__ uint32 eight_steps(const NoiseSource& source, int64 n, int64 start) {
    if (!source.drawn()) return source.always() ? 0xFFFFFFFFu : 0u;
    NoiseSource local = source;
    local.forget_origin();
    uint32 bits = 0;
#pragma unroll 2
    for (int pair = 0; pair < 4; ++pair) {
      const NoiseBlock block = local.draw(n, start / 2 + pair);
      uint32 byte = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) byte |= static_cast<uint32>(source.is_analog(block, i / 4, i % 4)) << i;
      bits |= byte << (8 * pair);
    }
    return bits;
  }

  uint32 steps_0_to_7_, steps_8_to_15_ = 0;
};

// So few that the draws themselves can be kept, which saves packing and unpacking.
template <>
class SegmentNoise<4, 4> {
 public:
  __device__ __forceinline__ SegmentNoise(const NoiseSource& source, int64 n, int64 start)
      : source_(source), blocks_{source.draw(n, start / 2), source.draw(n, start / 2 + 1)} {}

  __device__ __forceinline__ bool is_analog(int k, int j) const { return source_.is_analog(blocks_[k / 2], k % 2, j); }

 private:
  const NoiseSource& source_;
  NoiseBlock blocks_[2];
};

// ---- forward ----

// How many blocks are to share a multiprocessor's registers: enough to keep the memory busy, and few enough that
// nothing is spilled (RESOURCES.md).
template <class Real, Input kInput>
constexpr int kForwardBlocks = kInput == Input::kPlain        ? 8
                               : kInput == Input::kNormalised ? 7
                               : sizeof(Real) == 4            ? 5
                                                              : 3;
template <class Real, int kLanes>
constexpr int kBackwardBlocks = sizeof(Real) == 4 && kLanes == 1 ? 4 : 3;
template <int kSteps>
constexpr int kPlainBackwardBlocks = kSteps <= 8 ? 4 : 3;

// kInput is that of LIFParams::input(), or kGeneral; with another, only spikes, v_last and checkpoints are wanted, the
// spikes unscaled.
template <class Scalar, Surrogate kSurrogate, bool kHardReset, int kLanes, Input kInput>
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
  const LeastSpike<Real> least_spike(options.strict_threshold);
  ThreadNeuron<Real, kInput> neuron(params.parameters, place.read_n);
  Real v[kLanes];
  load_potential(params, static_cast<const Real*>(nullptr), 0, place, v);

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
          h[j] = charge<kInput>(x[k][j], v[j], neuron.now(), options.v_rest);
          s[j] = fire<kSurrogate>(h[j], noise.is_analog(k, j), neuron.now(), least_spike);
          v[j] = reset<kHardReset>(h[j], s[j], neuron.now());
        }
        if constexpr (kInput == Input::kGeneral) {
          if (params.h_seq != nullptr && place.live) Lanes::store(h, params.h_seq + element);
          if (params.v_seq != nullptr && place.live) Lanes::store(v, params.v_seq + element);
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
    if (params.checkpoints != nullptr && done % kCheckpointSteps == 0 && done < steps && place.live) {
      Lanes::store(v, params.checkpoints + ((done / kCheckpointSteps - 1) * params.shape.neurons() + place.n));
    }
  }
  if (params.v_last != nullptr && place.live) Lanes::store(v, params.v_last + place.n);
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

// Adds up over the threads of each run and stores the sum in the run's slot of GradientPartials. All threads of the
// block must come here.
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

// For what kInput of lif_forward_kernel allows, where only the gradients of x, v_init and width are wanted and, with
// kNormalised, those of input_gain and input_bias. The potentials of a segment of kSteps steps stay in registers.
template <class Scalar, Surrogate kSurrogate, bool kHardReset, int kSteps, Input kInput>
__global__ void __launch_bounds__(kBlockThreads, kPlainBackwardBlocks<kSteps>)
    lif_backward_plain_kernel(const BackwardParams<Scalar> params) {
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
    const LeastSpike<Real> least_spike(options.strict_threshold);
    const Neuron<Real> neuron = settled_neuron<kInput>(params.parameters, place.n);
    bool carried = params.grad_v_last != nullptr;
    Real dv[kLanes];
    fill(dv, Real(0));
    if (carried) Lanes::load(params.grad_v_last + place.n, dv);

    for (int64 start = (steps - 1) / kSteps * kSteps; start >= 0; start -= kSteps) {
      const int length = steps - start < kSteps ? static_cast<int>(steps - start) : kSteps;
      int64 element = place.element + start * stride;
      Real h[kSteps][kLanes], g[kAhead][kLanes], x[kAhead][kLanes], v[kLanes];
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
        // Once more: there are no registers for it, and it is not gone from the cache.
        if (kNormalised && k >= 0 && k < length) Lanes::load(params.x_seq + element, x[(k + kAhead) % kAhead]);
      };
      load_potential(params, params.checkpoints, start, place, v);
      const SegmentNoise<kLanes, kSteps> noise(source, place.n, start);
      const auto fire_lane = [&](int k, int j) {
        return fire<kSurrogate>(h[k][j], noise.is_analog(k, j), neuron, least_spike);
      };
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (k < length) {
#pragma unroll
          for (int j = 0; j < kLanes; ++j) {
            h[k][j] = charge<kInput>(h[k][j], v[j], neuron, options.v_rest);
            v[j] = reset<kHardReset>(h[k][j], fire_lane(k, j), neuron);
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
            const StepGradient<Real> step = step_adjoint<kSurrogate, kHardReset>(
                g[k % kAhead][j], NoGradient{}, dv[j], h[k][j], fire_lane(k, j), carried, neuron, options);
            width_sum += step.dy * (h[k][j] - neuron.v_threshold);
            if constexpr (kNormalised) {
              gain_sum += step.dh * (x[k % kAhead][j] - neuron.input_mean);
              bias_sum += step.dh;
            }
            dx[j] = kNormalised ? neuron.input_gain * step.dh : step.dh;
            dv[j] = neuron.decay * step.dh;
          }
          carried = true;
          if (params.grad_x_seq != nullptr) Lanes::store(dx, params.grad_x_seq + (element + (kAhead - 1) * stride));
        }
        load_gradient(k - kAhead);
      }
    }
    if (params.grad_v_init != nullptr) Lanes::store(dv, params.grad_v_init + place.n);
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

// Everything that there is. The potentials of a segment stay in shared memory, where a loop can index them.
template <class Scalar, Surrogate kSurrogate, bool kHardReset, int kLanes>
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
  const LeastSpike<Real> least_spike(options.strict_threshold);
  ThreadNeuron<Real, Input::kGeneral> neuron(params.parameters, place.read_n);
  const auto wanted = [&](int id) { return params.partials[id].data != nullptr; };
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
  bool carried = params.grad_v_last != nullptr;
  Real dv[kLanes];
  fill(dv, Real(0));
  if (carried) Lanes::load(params.grad_v_last + place.read_n, dv);

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
    Real v_start[kLanes], v[kLanes], next_g[kLanes];
    load_potential(params, params.checkpoints, start, place, v_start);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) v[j] = v_start[j];
    const SegmentNoise<kLanes, kSteps> noise(source, place.n, start);
    const auto fire_lane = [&](Real h, int k, int j) {
      return fire<kSurrogate>(h, noise.is_analog(k, j), neuron.now(), least_spike);
    };
#pragma unroll 1
    for (int k = 0; k < length; ++k) {
      neuron.move_to(start + k);
      Potentials h = potentials[k][threadIdx.x];
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        h.values[j] = charge<Input::kGeneral>(h.values[j], v[j], neuron.now(), options.v_rest);
        v[j] = reset<kHardReset>(h.values[j], fire_lane(h.values[j], k, j), neuron.now());
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
      Real g[kLanes], gh[kLanes], x[kLanes], dx[kLanes], v_before[kLanes];
#pragma unroll
      for (int j = 0; j < kLanes; ++j) g[j] = next_g[j], v_before[j] = v_start[j];
      load_next_gradient(k - 1);
      fill(gh, Real(0));
      fill(x, Real(0));
      if (params.grad_h_seq != nullptr) Lanes::load(params.grad_h_seq + element, gh);
      if (wanted(kInputGain)) Lanes::load(params.x_seq + element, x);
      if (params.grad_v_seq != nullptr) {
        Real gv[kLanes];
        Lanes::load(params.grad_v_seq + element, gv);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) dv[j] += gv[j];
        carried = true;
      }
      if (wanted(kDecay) && k > 0) {
        const Potentials h_before = potentials[k - 1][threadIdx.x];
        neuron.move_to(t - 1);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const Real s_before = fire_lane(h_before.values[j], k - 1, j);
          v_before[j] = reset<kHardReset>(h_before.values[j], s_before, neuron.now());
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
        if (carried) sums[kReset] += kHardReset ? dv[j] * s : -(dv[j] * s);
        const StepGradient<Real> step =
            step_adjoint<kSurrogate, kHardReset>(g[j], gh[j], dv[j], h.values[j], s, carried, neuron.now(), options);
        sums[kWidth] += step.dy * (h.values[j] - neuron.now().v_threshold);
        sums[kThreshold] -= step.dy * neuron.now().inverse_width;
        sums[kDecay] += step.dh * (v_before[j] - options.v_rest);
        dx[j] = neuron.now().input_gain * step.dh;
        sums[kInputGain] += step.dh * (x[j] - neuron.now().input_mean);
        sums[kInputBias] += step.dh;
        sums[kInputMean] -= dx[j];
        dv[j] = neuron.now().decay * step.dh;
      }
      carried = true;
      if (params.grad_x_seq != nullptr && place.live) Lanes::store(dx, params.grad_x_seq + element);
#pragma unroll
      for (int id = 0; id < kNumParameters; ++id) {
        if (wanted(id) && params.parameters[id].step_stride != 0) {
          store_sum(id, t, sums[id]);
          sums[id] = Real(0);
        }
      }
    }
  }
#pragma unroll
  for (int id = 0; id < kNumParameters; ++id) {
    if (wanted(id) && params.parameters[id].step_stride == 0) store_sum(id, 0, sums[id]);
  }
  if (params.grad_v_init != nullptr && place.live) Lanes::store(dv, params.grad_v_init + place.n);
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
