// The CUDA kernels of the neuron, with the equations of math/neuron.h. A thread computes one neuron, or four adjacent
// ones, for the whole sequence, with their state in registers.
//
// If there is no residual and only spikes are wanted, forward reads x and writes s, two elements per neuron and step.
// Backward computes segments of at most kCheckpointSteps steps, from the last to the first. In each segment, it
// recomputes the potentials from x and keeps them in registers or shared memory. Then it goes back in time, reads the
// gradient of s and writes dx. With x, backward then reads or writes three elements per neuron and step. For the
// gradient of input_gain, kernels for any number of steps read x a second time, from L2 if other data have not
// displaced it (docs/design/gpu.md). dx is stored with store_once, because nothing reads it before all of it is
// written.
//
// Settled kernels compute the most frequent calls, in which no parameter changes over time, v_rest is 0, multi_spike
// and v_min are not used, and neither potentials nor scaled spikes are wanted. plan.h has the exact conditions. The
// general kernels support every option at run time. One of them serves all surrogates and resets, because few calls
// need a general kernel.
#pragma once

#include "cuda/access.cuh"
#include "cuda/gradient_sum.cuh"
#include "cuda/noise.cuh"
#include "cuda/thread_neuron.cuh"
#include "params/neuron.h"

namespace asgl {

// ---- forward ----

// The number of parameter sets of a thread: one per neuron, or one that its neurons share.
template <Input kInput, int kLanes>
constexpr int kParameterSets = kInput == Input::kApart ? kLanes : 1;

// Blocks per multiprocessor: enough to keep memory busy, but few enough that no registers spill
// (tools/kernels/RESOURCES.md). With 7 blocks, a thread can have 72 of a multiprocessor's 65,536 registers.
template <class Real, Input kInput>
constexpr int kForwardBlocksPerSM = sizeof(Real) == 8                                         ? 3
                                    : kInput == Input::kGeneralResidual                       ? 4
                                    : kInput == Input::kNormalised || kInput == Input::kPlain ? 7
                                                                                              : 5;
// Blocks per multiprocessor of the general backward kernel.
template <class Real, int kLanes>
constexpr int kBackwardBlocksPerSM = sizeof(Real) == 4 && kLanes == 1 ? 4 : 3;
// Whether a model's plain backward kernels for half types spill registers at four blocks per multiprocessor. Those of
// erf do when NVRTC compiles them. Builds with nvcc also limit them to three blocks.
template <class Model>
constexpr bool kSpillsAtFourBlocks = false;
template <bool kHardReset>
constexpr bool kSpillsAtFourBlocks<LIF<Surrogate::kErf, kHardReset>> = true;
// Blocks per multiprocessor of the settled backward kernel: four, or three for kernels that would spill at four. Loads
// in float32 take twice as many registers as loads in half types, so that more of these kernels would spill.
template <class Scalar, class Model, int kLanes, Input kInput, int kExact>
constexpr int kSettledBackwardBlocksPerSM = kExact > 0 || sizeof(Scalar) == 8 ||
                                                    (kLanes == 4 && (kInput != Input::kPlain ||
                                                                     kSpillsAtFourBlocks<Model> || sizeof(Scalar) == 4))
                                                ? 3
                                                : 4;

// The forward pass. If kInput is general, Model is LIFByOptions<Real>. Otherwise LIFParams::input_assumption() allows
// kInput, and params.outputs_only_spikes() holds. The sequence has kExact steps, or any number if kExact is 0.
template <class Scalar, class Model, int kLanes, Input kInput, int kExact>
__global__ void __launch_bounds__(kBlockThreads, kForwardBlocksPerSM<Real_t<Scalar>, kInput>)
    lif_forward_kernel(const ForwardParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  using Lanes = Access<kLanes>;
  constexpr int kSteps = kExact > 0 ? kExact : kLanes == 1 ? 8 : 4;  // loaded at a time
  static_assert(kCheckpointSteps % kSteps == 0);
  const int64 steps = kExact > 0 ? kExact : params.shape.steps, stride = params.shape.inner;
  const ThreadIndex<kLanes> index(params.shape);
  if (kLanes > 1 && !index.live) return;

  int64 load_element = index.element;
  Packed<kLanes, Scalar> x[kSteps], r[kSteps];
  const auto load_step = [&](int64 left, int k) {
    if (k < left) x[k % kSteps].load(params.x_seq + load_element);
    if (kHasResidual<kInput> && k < left) r[k % kSteps].load(params.residual + load_element);
    advance(load_element, stride);
  };
  const auto load_first = [&] {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) load_step(steps, k);
  };
  if (kExact > 0) load_first();  // in flight while the parameters are read, if registers suffice
  const NoiseSource source(params.noise);
  const NeuronOptions<Real> options = params.options;
  const FiringFromLeast<Real> firing(options);
  const auto& model = Model::from_options(params.options);
  ThreadNeuron<Real, kIsGeneral<kInput>, kParameterSets<kInput, kLanes>> neuron(params, index.read_n, options);
  Real v[kLanes];
  load_v_init(params, index, v);
  if (kExact == 0) load_first();
  int64 element = index.element;
  for (int64 start = 0; start < steps; start += kSteps) {
    const int length = steps - start < kSteps ? static_cast<int>(steps - start) : kSteps;
    const SegmentNoise<kLanes, kSteps> noise(source, index.n, start, length);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k < length) {
        neuron.move_to(start + k);
        Real h[kLanes], s[kLanes], r_k[kLanes];
        x[k].unpack(h);
        if constexpr (kHasResidual<kInput>) r[k].unpack(r_k);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const Neuron<Real>& own = neuron.now(j);
          const Real c = input_current<kInput>(h[j], own, params.residual_gain, r_k[j]);
          h[j] = Model::template charge<kInput>(c, v[j], own, options);
          s[j] = model.fire(h[j], noise.is_analog(k, j), own, firing);
          v[j] = model.reset(h[j], s[j], own);
        }
        if constexpr (kIsGeneral<kInput>) {
          if (params.h_seq != nullptr && index.live) Lanes::store(h, params.h_seq + element);
          if (params.v_seq != nullptr && index.live) Lanes::store(v, params.v_seq + element);
          if (options.scale_output) {
#pragma unroll
            for (int j = 0; j < kLanes; ++j) s[j] = s[j] * neuron.now().v_threshold;
          }
        }
        if (index.live) Lanes::store(s, params.s_seq + element);
        advance(element, stride);
      }
      if (kExact == 0) load_step(steps - start, k + kSteps);  // in flight while other steps are computed
    }
    const int64 done = start + kSteps;
    if (params.checkpoints != nullptr && done % kCheckpointSteps == 0 && done < steps && index.live) {
      const int64 at = (done / kCheckpointSteps - 1) * params.shape.neurons() + index.n;
      Lanes::store(v, params.checkpoints + at);
    }
  }
  if (params.v_last != nullptr && index.live) Lanes::store(v, params.v_last + index.n);
  if (params.zeros != nullptr && index.n == 0) params.zeros[0] = params.zeros[1] = Real(0);
}

// ---- backward ----

// The parts of a step of the settled backward kernel, for the neurons of a thread.
template <class Model, Input kInput, class Real, int kLanes>
struct SettledBackwardStep {
  using Row = Real[kLanes];
  static constexpr bool kNormalised = kInput != Input::kPlain;
  static constexpr int kSets = kParameterSets<kInput, kLanes>;
  using Sums = Real[kNumParameters][kSets];

  const ThreadNeuron<Real, false, kSets>& neuron;
  const NeuronOptions<Real>& options;
  const FiringFromLeast<Real>& firing;
  Real residual_gain;

  // The spike of neuron j in step k, from the potential h.
  template <class Noise>
  __device__ __forceinline__ Real fire(Real h, const Noise& noise, int k, int j) const {
    return Model::fire(h, noise.is_analog(k, j), neuron.now(j), firing);
  }

  // Recomputes step k of forward. On entry v is the potential before the step, on return the one after it.
  template <class Noise>
  __device__ __forceinline__ void recompute(const Row& x, const Row& r, const Noise& noise, int k, Row& v,
                                            Row& h) const {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const Real c = input_current<kInput>(x[j], neuron.now(j), residual_gain, r[j]);
      h[j] = Model::template charge<kInput>(c, v[j], neuron.now(j), options);
      const Real s = fire(h[j], noise, k, j);
      v[j] = Model::reset(h[j], s, neuron.now(j));
    }
  }

  // Computes dx, du and dh, the gradients of x, of u (Model::distance of h) and of h, from ds, the gradient of s. Adds
  // this step's terms of the gradients of width, input_gain and input_bias to `sums`. Replaces dv, the gradient of v
  // after the step, by the gradient of v before it. Unless `carried`, v after the step has no gradient. On return ds
  // includes the gradient through the reset.
  __device__ __forceinline__ void backpropagate(bool carried, const Row& x, const Row& h, const Row& s, Row& ds,
                                                Row& dv, Row& du, Row& dh, Row& dx, Sums& sums) const {
    if (carried && !options.detach_reset) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        ds[j] = Model::spike_gradient(ds[j], h[j], true, neuron.now(j), dv[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const Neuron<Real>& own = neuron.now(j);
      const StepGradient<Real> step =
          Model::step_adjoint(ds[j], NoGradient{}, h[j], s[j], carried, own, options, dv[j]);
      sums[kWidth][j % kSets] += step.dy * Model::distance(h[j], own);
      if constexpr (kNormalised) {
        sums[kInputGain][j % kSets] += step.dc * (x[j] - own.input_mean);
        sums[kInputBias][j % kSets] += step.dc;
      }
      dx[j] = kNormalised ? own.input_gain * step.dc : step.dc;
      du[j] = step.dy * own.inverse_width;
      dh[j] = step.dh;
    }
  }

  // Adds a term to the gradient of the decay: dh of the next step times v after this step. h and s are those of this
  // step.
  __device__ __forceinline__ void add_decay_gradient(const Row& dh, const Row& h, const Row& s, Sums& sums) const {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const Real v_after = Model::reset(h[j], s[j], neuron.now(j));
      sums[kDecay][j % kSets] += dh[j] * v_after;
    }
  }
};

// Stores the sums of the wanted parameters whose values for adjacent neurons are adjacent in memory. For each other
// wanted parameter, adds up the sums of the thread's neurons in sums[id][0]. Returns the bits of these other
// parameters, whose sums store_block_sums can then store. Overwrites `thread_sums`. All threads of the block must call
// this.
template <class Scalar, class Real, int kSets>
__device__ __forceinline__ uint32 store_sums_by_neuron(const BackwardParams<Scalar>& params, uint32 wanted,
                                                       const ThreadIndex<kSets>& index,
                                                       Real (&sums)[kNumParameters][kSets],
                                                       ThreadSums<Real>* thread_sums) {
  constexpr int kTile = kSets * kBlockThreads;
  struct alignas(sizeof(Real) * kSets) Row {
    Real values[kSets];
  };
  uint32 others = wanted;
#pragma unroll
  for (int id = 0; id < kInputMean; ++id) {
    if (!has_bit(wanted, id)) continue;
    if (!has_bit(params.summary.by_neuron, id)) {
#pragma unroll
      for (int j = 1; j < kSets; ++j) sums[id][0] += sums[id][j];
      continue;
    }
    others ^= 1u << id;
    Real* const slots = params.partials[id].data;
    if (!params.parameters[id].is_interleaved_in(kTile)) {
      if (index.live) Access<kSets>::store(sums[id], slots + index.n);
      continue;
    }
    Row row;
#pragma unroll
    for (int j = 0; j < kSets; ++j) row.values[j] = sums[id][j];
    __syncthreads();  // earlier values have been read
    reinterpret_cast<Row*>(thread_sums)[threadIdx.x] = row;
    __syncthreads();
    const int64 first = static_cast<int64>(blockIdx.x) * kTile, left = params.shape.neurons() - first;
    store_sums_by_value(slots, params.parameters[id].count, first, left < kTile ? static_cast<int>(left) : kTile,
                        thread_sums->values, static_cast<int>(threadIdx.x), kBlockThreads);
  }
  return others;
}

// Adds up sums[id][0] of all threads, for each wanted parameter, and stores the results in the block's slots. Neurons
// with different values of the parameter have separate results. Each warp handles every kWarps-th parameter. Overwrites
// `thread_sums`. All threads of the block must call this.
template <int kLanes, int kNumSums, class Scalar, class Real, int kSets>
__device__ __forceinline__ void store_block_sums(const BackwardParams<Scalar>& params, uint32 wanted,
                                                 const Real (&sums)[kNumParameters][kSets],
                                                 ThreadSums<Real>* thread_sums) {
#pragma unroll
  for (int id = 0; id < kNumSums; ++id) {
    if (has_bit(wanted, id)) thread_sums[id].values[threadIdx.x] = sums[id][0];
  }
  __syncthreads();
  constexpr int kWarps = kBlockThreads / kWarpThreads;
  const int warp = static_cast<int>(threadIdx.x / kWarpThreads);
#pragma unroll 1
  for (uint32 left = wanted >> warp, id = warp; left != 0; left >>= kWarps, id += kWarps) {
    if (!has_bit(left, 0)) continue;
    store_partials<kLanes>(params.partials[id].data, params.parameters[id], params.shape, thread_sums[id]);
  }
}

// The settled backward pass. LIFParams::input_assumption() allows kInput, and params.outputs_only_spikes() holds. A
// sequence of kExact steps is one segment, kept in registers. If kExact is 0, the potentials of a segment are kept in
// shared memory, and a loop computes a few steps at a time. When the loop over a whole segment was unrolled instead, it
// took most of the compilation time, and left only enough registers to load two steps ahead.
template <class Scalar, class Model, int kLanes, Input kInput, int kExact>
__global__ void __launch_bounds__(kBlockThreads, kSettledBackwardBlocksPerSM<Scalar, Model, kLanes, kInput, kExact>)
    lif_backward_settled_kernel(const BackwardParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  constexpr bool kNormalised = kInput != Input::kPlain, kInRegisters = kExact > 0;
  constexpr bool kResidual = kHasResidual<kInput>;
  constexpr int kSets = kParameterSets<kInput, kLanes>;
  // Steps loaded at a time. If the neurons of a thread have parameters of their own, four loads in float32 would spill.
  constexpr int kSteps = kInRegisters ? kExact : kLanes == 1 ? 8 : kSets > 1 && sizeof(Scalar) == 4 ? 2 : 4;
  constexpr int kSegment = kInRegisters ? kExact : kCheckpointSteps;
  static_assert(kSegment % kSteps == 0);
  constexpr int kNumSums = kNormalised ? kInputMean : kInputGain;
  struct alignas(sizeof(Real) * kLanes) Potentials {
    Real values[kLanes];
  };
  // The potentials of a segment, unless they are in registers. At the end the array stores the threads' sums.
  __shared__ Potentials potentials[kInRegisters ? (kNumSums + kLanes - 1) / kLanes : kSegment][kBlockThreads];
  ThreadSums<Real>* const thread_sums = reinterpret_cast<ThreadSums<Real>*>(potentials);
  static_assert(sizeof(potentials) >= kNumSums * sizeof(ThreadSums<Real>));
  const int64 steps = kInRegisters ? kExact : params.shape.steps, stride = params.shape.inner;
  const ThreadIndex<kLanes> index(params.shape);
  const uint32 wanted = params.summary.wanted;

  Real sums[kNumParameters][kSets] = {};
  if (kLanes == 1 || index.live) {
    // Each pointer advances with its loads or stores.
    Packed<kLanes, Scalar> x[kSteps], g[kSteps], x_again[kSteps], r[kSteps];
    const Scalar *x_seq, *grad_s_seq, *x_seq_again, *residual;
    Scalar* grad_x_seq;
    int64 stored;  // element, with a residual, where either gradient may be unwanted
    const bool loads_again = kSets == 1 || has_bit(wanted, kInputGain);
    const auto load_x = [&](bool there, int k) {
      if (there) x[k].load(assume_global(x_seq));
      advance<!kInRegisters>(x_seq, stride);
      if constexpr (kResidual) {
        if (there) r[k].load_once(assume_global(residual));
        advance<!kInRegisters>(residual, stride);
      }
    };
    const auto load_gradient = [&](bool there, int k) {
      if (there) g[k].load_once(assume_global(grad_s_seq));
      advance<!kInRegisters>(grad_s_seq, -stride);
      // Loads x again, because no registers are left to keep it. Usually x is still in the L2 cache.
      if (kNormalised && !kInRegisters) {
        if (there && loads_again) x_again[k].load(assume_global(x_seq_again));
        advance(x_seq_again, -stride);
      }
    };
    // The first step of the last group of a segment. A group is up to kSteps steps that are loaded together, and the
    // last group may be shorter.
    const auto last_load = [&](int length) { return (length - 1) / kSteps * kSteps; };
    // Begins a segment: loads x of its first steps, and the gradients of its last steps.
    const auto load_ends = [&](int64 start, int length) {
      const int last = last_load(length);
      const int64 element = index.element + start * stride, last_element = element + (last + kSteps - 1) * stride;
      x_seq = params.x_seq + element;
      grad_s_seq = params.grad_s_seq + last_element;
      x_seq_again = params.x_seq + last_element;
      if constexpr (kResidual) {
        residual = params.residual + element;
        stored = last_element;
      } else {
        grad_x_seq = params.grad_x_seq + last_element;
      }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_x(k < length, k);
#pragma unroll
      for (int k = kSteps - 1; k >= 0; --k) load_gradient(k < length - last, k);
    };
    if (kInRegisters) load_ends(0, kExact);  // in flight while the parameters are read
    const NoiseSource source(params.noise);
    const NeuronOptions<Real> options = params.options;
    const FiringFromLeast<Real> firing(options);
    const ThreadNeuron<Real, false, kSets> neuron(params, index.read_n, options);
    const SettledBackwardStep<Model, kInput, Real, kLanes> step = {neuron, options, firing, params.residual_gain};
    const bool has_grad_last = params.grad_v_last != nullptr;
    Real dv[kLanes], dh[kLanes];
    fill(dv, Real(0));  // NVRTC would read {} from a variable in global memory
    if (has_grad_last) Access<kLanes>::load(params.grad_v_last + index.read_n, dv);

    for (int64 start = (steps - 1) / kCheckpointSteps * kCheckpointSteps; start >= 0; start -= kCheckpointSteps) {
      const int length = kInRegisters                       ? kExact
                         : steps - start < kCheckpointSteps ? static_cast<int>(steps - start)
                                                            : kCheckpointSteps;
      const int last_steps = start + length < steps ? 0 : 1;  // steps of the segment that no step follows
      if (!kInRegisters) load_ends(start, length);
      const SegmentNoise<kLanes, kSegment> noise(source, index.n, start, length);
      Real v[kLanes];
      load_v_before(params, start, index, v);
      Potentials h[kSteps];
#pragma unroll 1
      for (int first = 0; first < length; first += kSteps) {
        const auto few = noise.starting_at(first);
        const int left = length - first;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          if (k < left) {
            Real x_k[kLanes], r_k[kLanes];
            x[k].unpack(x_k);
            if constexpr (kResidual) r[k].unpack(r_k);
            step.recompute(x_k, r_k, few, k, v, h[k].values);
            if (!kInRegisters) potentials[first + k][threadIdx.x] = h[k];
          }
          if (!kInRegisters) load_x(k + kSteps < left, k);
        }
      }
#pragma unroll 1
      for (int first = last_load(length); first >= 0; first -= kSteps) {
        const auto few = noise.starting_at(first);
        const int left = length - first, followed = left - last_steps;
        const int carried_steps = has_grad_last ? left : followed, decay_steps = has_bit(wanted, kDecay) ? followed : 0;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          if (!kInRegisters && k < left) h[k] = potentials[first + k][threadIdx.x];
        }
#pragma unroll
        for (int k = kSteps - 1; k >= 0; --k) {
          if (k < left) {
            Real x_k[kLanes], s[kLanes], ds[kLanes], du[kLanes], dx[kLanes], dv_after[kLanes];
            if (kNormalised) (kInRegisters ? x : x_again)[k].unpack(x_k);
            g[k].unpack(ds);
            copy(dv, dv_after);
#pragma unroll
            for (int j = 0; j < kLanes; ++j) s[j] = step.fire(h[k].values[j], few, k, j);
            if (k < decay_steps) step.add_decay_gradient(dh, h[k].values, s, sums);
            const auto go_back = [&](bool carried) {
              step.backpropagate(carried, x_k, h[k].values, s, ds, dv, du, dh, dx, sums);
            };
            k < carried_steps ? go_back(true) : go_back(false);  // usually true, and then without selections
            if ((wanted & (1u << kThreshold | 1u << kReset)) != 0) {
#pragma unroll
              for (int j = 0; j < kLanes; ++j) {
                sums[kThreshold][j % kSets] -= du[j];
                if (k < carried_steps) sums[kReset][j % kSets] += Model::reset_parameter_gradient(dv_after[j], s[j]);
              }
            }
            if constexpr (kResidual) {
              if (index.live && params.grad_x_seq != nullptr)
                Access<kLanes>::store_once(dx, params.grad_x_seq + stored);
              if (index.live && params.grad_residual != nullptr) {
                Real dr[kLanes];
#pragma unroll
                for (int j = 0; j < kLanes; ++j) dr[j] = params.residual_gain * dh[j];
                Access<kLanes>::store_once(dr, params.grad_residual + stored);
              }
            } else if (index.live) {
              Access<kLanes>::store_once(dx, assume_global(grad_x_seq));
            }
          }
          if constexpr (kResidual) {
            advance<!kInRegisters>(stored, -stride);
          } else {
            advance<!kInRegisters>(grad_x_seq, -stride);
          }
          if (!kInRegisters) load_gradient(first > 0, k);
        }
      }
    }
    if (has_bit(wanted, kDecay)) {
      Real v_init[kLanes];
      load_v_init(params, index, v_init);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) sums[kDecay][j % kSets] += dh[j] * v_init[j];
    }
    if (params.grad_v_init != nullptr && index.live) Access<kLanes>::store(dv, params.grad_v_init + index.n);
  }
  uint32 others = wanted;
  if constexpr (kSets > 1) others = store_sums_by_neuron(params, wanted, index, sums, thread_sums);
  if (others == 0) return;
  if (!kInRegisters || kSets > 1) __syncthreads();  // the sums overwrite potentials and repeated sums
  store_block_sums<kLanes, kNumSums>(params, others, sums, thread_sums);
}

// Adds up the threads' sums of one parameter, and stores the results in the block's slots. Neurons with different
// values of the parameter have separate results. t is the step of the sums, or 0 if they are over all steps. Overwrites
// `thread_sums`. All threads of the block must call this.
template <int kLanes, class Scalar, class Real>
__device__ __forceinline__ void store_block_sum(const BackwardParams<Scalar>& params, int id, int64 t, Real sum,
                                                ThreadSums<Real>& thread_sums) {
  __syncthreads();  // earlier values have been read
  thread_sums.values[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarpThreads) return;
  Real* slots = params.partials[id].data + t * params.partials[id].slots;
  store_partials<kLanes>(slots, params.parameters[id], params.shape, thread_sums);
}

// The general backward pass, for every option but adaptation. The potentials of a segment are in shared memory, because
// the loops over steps are not unrolled, and registers can't be indexed at run time.
template <class Scalar, int kLanes, Input kInput>
__global__ void __launch_bounds__(kBlockThreads, kBackwardBlocksPerSM<Real_t<Scalar>, kLanes>)
    lif_backward_kernel(const BackwardParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  using Model = LIFByOptions<Real>;
  using Lanes = Access<kLanes>;
  constexpr int kSteps = kCheckpointSteps;
  constexpr int kTogether = kLanes == 1 ? 8 : 4;  // loads in flight
  struct alignas(sizeof(Real) * kLanes) Potentials {
    Real values[kLanes];
  };
  // The threads' sums reuse the row of the step computed last. In float32, with four neurons per thread, two blocks
  // take all 64 KiB of shared memory of a multiprocessor of sm_75, so that a separate array for the sums would not fit.
  __shared__ Potentials potentials[kSteps][kBlockThreads];
  const int64 steps = params.shape.steps, stride = params.shape.inner;
  const ThreadIndex<kLanes> index(params.shape);
  const NoiseSource source(params.noise);
  const NeuronOptions<Real> options = params.options;
  const FiringFromLeast<Real> firing(options);
  const auto& model = Model::from_options(params.options);
  ThreadNeuron<Real, true> neuron(params, index.read_n, options);
  const uint32 wanted = params.summary.wanted;
  Real sums[kNumParameters] = {};
  const auto store_sum = [&](int id, int64 t, int row) {
    store_block_sum<kLanes>(params, id, t, sums[id], *reinterpret_cast<ThreadSums<Real>*>(potentials[row]));
  };
  bool carried = params.grad_v_last != nullptr;
  Real dv[kLanes];
  fill(dv, Real(0));
  if (carried) Lanes::load(params.grad_v_last + index.read_n, dv);

  for (int64 start = (steps - 1) / kSteps * kSteps; start >= 0; start -= kSteps) {
    const int length = steps - start < kSteps ? static_cast<int>(steps - start) : kSteps;
    const int64 first_element = index.element + start * stride;
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
    Real next_g[kLanes], first_v[kLanes], v[kLanes];
    load_v_before(params, start, index, first_v);
    copy(first_v, v);
    const SegmentNoise<kLanes, kSteps> noise(source, index.n, start, length);
    const auto fire_lane = [&](Real h, int k, int j) {
      return model.fire(h, noise.is_analog(k, j), neuron.now(), firing);
    };
#pragma unroll 1
    for (int k = 0; k < length; ++k) {
      neuron.move_to(start + k);
      Potentials h = potentials[k][threadIdx.x];
      Real r[kLanes];
      if constexpr (kHasResidual<kInput>) Lanes::load_once(params.residual + (first_element + k * stride), r);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        const Real c = input_current<kInput>(h.values[j], neuron.now(), params.residual_gain, r[j]);
        h.values[j] = Model::template charge<kInput>(c, v[j], neuron.now(), options);
        v[j] = model.reset(h.values[j], fire_lane(h.values[j], k, j), neuron.now());
      }
      potentials[k][threadIdx.x] = h;
    }

    const auto load_next_gradient = [&](int k) {
      fill(next_g, Real(0));
      if (k >= 0 && params.grad_s_seq != nullptr) {
        Lanes::load_once(params.grad_s_seq + (first_element + k * stride), next_g);
      }
    };
    load_next_gradient(length - 1);
#pragma unroll 1
    for (int k = length - 1; k >= 0; --k) {
      const int64 t = start + k, element = first_element + k * stride;
      Real g[kLanes], gh[kLanes], x[kLanes], dx[kLanes], dr[kLanes], v_before[kLanes];
      copy(first_v, v_before);
      copy(next_g, g);
      load_next_gradient(k - 1);
      fill(gh, Real(0));
      fill(x, Real(0));
      if (params.grad_h_seq != nullptr) Lanes::load_once(params.grad_h_seq + element, gh);
      if (has_bit(wanted, kInputGain)) Lanes::load(params.x_seq + element, x);
      if (params.grad_v_seq != nullptr) {
        Real gv[kLanes];
        Lanes::load_once(params.grad_v_seq + element, gv);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) dv[j] += gv[j];
        carried = true;
      }
      if (has_bit(wanted, kDecay) && k > 0) {
        const Potentials h_before = potentials[k - 1][threadIdx.x];
        neuron.move_to(t - 1);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const Real s_before = fire_lane(h_before.values[j], k - 1, j);
          v_before[j] = model.reset(h_before.values[j], s_before, neuron.now());
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
        dv[j] = model.floor_adjoint(h.values[j], s, neuron.now(), dv[j]);
        if (carried) sums[kReset] += model.reset_parameter_gradient(dv[j], s);
        const Real ds = model.spike_gradient(g[j], h.values[j], carried && !options.detach_reset, neuron.now(), dv[j]);
        const StepGradient<Real> step =
            model.step_adjoint(ds, gh[j], h.values[j], s, carried, neuron.now(), options, dv[j]);
        sums[kWidth] += step.dy * model.distance(h.values[j], neuron.now());
        sums[kThreshold] -= step.dy * neuron.now().inverse_width;
        sums[kDecay] += step.dh * (v_before[j] - options.v_rest);
        dx[j] = neuron.now().input_gain * step.dc;
        if constexpr (kHasResidual<kInput>) dr[j] = params.residual_gain * step.dc;
        sums[kInputGain] += step.dc * (x[j] - neuron.now().input_mean);
        sums[kInputBias] += step.dc;
        sums[kInputMean] -= dx[j];
      }
      carried = true;
      if (params.grad_x_seq != nullptr && index.live) {
        int64 stored_element = element;
        hide_from_compiler(stored_element);  // otherwise the compiler splits the store for half types
        Lanes::store_once(dx, params.grad_x_seq + stored_element);
      }
      if (kHasResidual<kInput> && params.grad_residual != nullptr && index.live) {
        int64 stored_element = element;
        hide_from_compiler(stored_element);
        Lanes::store_once(dr, params.grad_residual + stored_element);
      }
#pragma unroll
      for (int id = 0; id < kNumParameters; ++id) {
        if (has_bit(wanted, id) && params.parameters[id].step_stride != 0) {
          store_sum(id, t, k);
          sums[id] = Real(0);
        }
      }
    }
    __syncthreads();  // all threads have read the sums
  }
#pragma unroll
  for (int id = 0; id < kNumParameters; ++id) {
    if (has_bit(wanted, id) && params.parameters[id].step_stride == 0) store_sum(id, 0, 0);
  }
  if (params.grad_v_init != nullptr && index.live) Lanes::store(dv, params.grad_v_init + index.n);
}

}  // namespace asgl
