// How the CUDA kernels are launched: which kernel, how many neurons a thread, which grid. backends/neuron_kernels.py
// and normalisation_kernels.py decide the same in Python.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/normalisation_kernels.cuh"
#include "params/integrator.h"

namespace asgl::cuda {

template <class Kernel, class Params>
cudaError_t start(Kernel* kernel, int64 blocks, int threads, const Params& params, cudaStream_t stream) {
  constexpr int64 kMostBlocks = 0x7FFFFFFF;
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t error =
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, 0, stream);
  // The pending error is fetched in any case, or a later and innocent call would find it.
  const cudaError_t pending = cudaGetLastError();
  return error != cudaSuccess ? error : pending;
}

inline int64 blocks_for(int64 work, int64 per_block) { return (work + per_block - 1) / per_block; }

template <class Element>
ASGL_HOST_DEVICE bool is_aligned(const Element* first) {
  return reinterpret_cast<unsigned long>(first) % (4 * sizeof(Element)) == 0;
}
template <class Real>
ASGL_HOST_DEVICE bool is_aligned(const State<Real*>& state) {
  bool all = true;
  for_each_member([&](const Real* first) { all = all && is_aligned(first); }, state);
  return all;
}

// float64 would need two accesses of 16 bytes, and gains nothing from them.
template <class Scalar>
constexpr bool kHasFours = !std::is_same_v<Scalar, double>;

// ---- the neuron ----

// What the kernel may take for granted.
template <class Params>
Input input_of(const Params& params) {
  const bool indexed = params.shape.neurons() < kDivisible;
  return params.only_spikes() && indexed ? params.input() : Input::kGeneral;
}

// Says whether four neighbouring neurons, the first a multiple of four, always lie side by side and share all
// parameters.
template <class Scalar, class... Places>
bool groups_of_four(const LIFParams<Scalar>& params, const Places&... sequences_and_states) {
  bool shared = params.shape.inner % 4 == 0;
  for (const auto& parameter : params.parameters) {
    shared = shared && (parameter.data == nullptr || parameter.inner % 4 == 0);
  }
  return shared && is_aligned(params.x_seq) && is_aligned(params.init) && (is_aligned(sequences_and_states) && ...);
}

template <class Scalar>
bool groups_of_four(const ForwardParams<Scalar>& params) {
  return groups_of_four(params, params.s_seq, params.last, params.v_seq, params.h_seq, params.checkpoints);
}

template <class Scalar>
bool groups_of_four(const BackwardParams<Scalar>& params) {
  return groups_of_four(params, params.grad_s_seq, params.grad_last, params.grad_v_seq, params.grad_h_seq,
                        params.checkpoints, params.grad_x_seq, params.grad_init);
}

template <class Scalar>
bool groups_of_four(const IntegratorParams<Scalar>& params) {
  return groups_of_four(params, params.v_seq, params.last, params.grad_v_seq, params.grad_last, params.grad_x_seq,
                        params.grad_init);
}

// Says whether four neurons a thread pay; the others have one. The device is asked only where its size decides.
template <class Params>
cudaError_t fours_pay(const Params& params, bool* pay) {
  const bool general = input_of(params) == Input::kGeneral;
  *pay = !general && params.shape.steps <= kCheckpointSteps;
  if (*pay) return cudaSuccess;
  int device = 0, multiprocessors = 0, threads_each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&threads_each, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  }
  const int64 resident = static_cast<int64>(multiprocessors) * threads_each, neurons = params.shape.neurons();
  // In general a quarter of the threads that the device can hold is enough: each has four times the loads under way.
  // Else a thread has less to do for one neuron than for four, which is seen in a long sequence of neurons so few that
  // a scheduler has one warp.
  *pay = general ? neurons / 4 >= resident / 4 : neurons > resident / 16;
  return error;
}

template <class Scalar>
ParameterSummary summary_of(const LIFParams<Scalar>& params) {
  ParameterSummary summary{};
  if (params.shape.neurons() >= kDivisible) return summary;
  summary.alike = true;
  int64 inner = 1, count = 1;  // of the first that differs between neurons
  for (int id = 0; id < kNumParameters; ++id) {
    const auto& parameter = params.parameters[id];
    if (parameter.data != nullptr) summary.tensors |= 1u << id;
    if (parameter.is_same_for_all()) continue;
    if (count == 1) inner = parameter.inner, count = parameter.count;
    summary.alike = summary.alike && parameter.inner == inner && parameter.count == count;
    summary.strides[id] = 1;
  }
  const auto index = [](int64 inner, int64 count) { return NeuronIndex{Divisor::of(inner), Divisor::of(count)}; };
  summary.common = index(inner, count);
  for (int id = 0; id < kNumParameters && !summary.alike; ++id) {
    summary.own[id] = index(params.parameters[id].inner, params.parameters[id].count);
  }
  return summary;
}

// A tile is what a block computes: one neuron a thread, or four.
template <class Params>
cudaError_t cut_neurons(Params& params) {
  params.summary = summary_of(params);
  using Scalar = std::remove_const_t<std::remove_pointer_t<decltype(params.x_seq)>>;
  bool fours = false;
  cudaError_t error = cudaSuccess;
  if (kHasFours<Scalar> && groups_of_four(params)) error = fours_pay(params, &fours);
  params.tiles.tile = fours ? 4 * kBlockThreads : kBlockThreads;
  params.tiles.count = blocks_for(params.shape.neurons(), params.tiles.tile);
  return error;
}

// The same where parameters may want a gradient.
template <class Params>
cudaError_t cut_with_sums(Params& params) {
  const cudaError_t error = cut_neurons(params);
  for (int id = 0; id < kNumParameters; ++id) params.summary.wanted |= static_cast<uint32>(params.wants(id)) << id;
  return error;
}

template <class Scalar>
cudaError_t cut(ForwardParams<Scalar>& params) {
  return cut_neurons(params);
}

template <class Scalar>
cudaError_t cut(BackwardParams<Scalar>& params) {
  return cut_with_sums(params);
}

// Calls f(lanes, input), with the neurons a thread and the input of the kernel as constants. A thread with one neuron
// has no kernel of its own for plain input.
template <class Scalar, class Params, class F>
void with_kind(const Params& params, F&& f) {
  const auto with_lanes = [&](auto lanes) {
    const Input input = input_of(params);
    if (input == Input::kGeneral) return f(lanes, std::integral_constant<Input, Input::kGeneral>{});
    if constexpr (lanes() == 4) {
      if (input == Input::kPlain) return f(lanes, std::integral_constant<Input, Input::kPlain>{});
    }
    f(lanes, std::integral_constant<Input, Input::kNormalised>{});
  };
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.tile > kBlockThreads) return with_lanes(std::integral_constant<int, 4>{});
  }
  with_lanes(std::integral_constant<int, 1>{});
}

template <class Model, class Scalar>
cudaError_t launch(Model, const ForwardParams<Scalar>& params, cudaStream_t stream) {
  void (*kernel)(ForwardParams<Scalar>) = nullptr;
  with_kind<Scalar>(params, [&](auto lanes, auto input) {
    if constexpr (Model::kOnlyGeneral || input() == Input::kGeneral) {
      kernel = &lif_forward_kernel<Scalar, LIFByOptions, lanes(), Input::kGeneral, 0>;
    } else {
      kernel = &lif_forward_kernel<Scalar, Model, lanes(), input(), 0>;
      if constexpr (lanes() == 4) {
        if (params.shape.steps == kShortSequence) {
          kernel = &lif_forward_kernel<Scalar, Model, 4, input(), kShortSequence>;
        }
      }
    }
  });
  return start(kernel, params.tiles.count, kBlockThreads, params, stream);
}

template <class Model, class Scalar>
cudaError_t launch(Model, const BackwardParams<Scalar>& params, cudaStream_t stream) {
  void (*kernel)(BackwardParams<Scalar>) = nullptr;
  with_kind<Scalar>(params, [&](auto lanes, auto input) {
    if constexpr (Model::kOnlyGeneral || input() == Input::kGeneral) {
      kernel = &lif_backward_kernel<Scalar, lanes()>;
    } else {
      kernel = &lif_backward_settled_kernel<Scalar, Model, lanes(), input(), 0>;
      if constexpr (lanes() == 4) {
        if (params.shape.steps == kShortSequence) {
          kernel = &lif_backward_settled_kernel<Scalar, Model, 4, input(), kShortSequence>;
        }
      }
    }
  });
  return start(kernel, params.tiles.count, kBlockThreads, params, stream);
}

// The slots of one element are those of its runs; a run has as many as tiles that it touches. Where these are few, the
// threads of a block have several elements, side by side.
template <class Real>
cudaError_t cut(GradientSum<Real>& sum) {
  constexpr int64 kManySlots = 8;
  constexpr int64 kMostRunsEach = 16;
  for (int id = 0; id < sum.count; ++id) {
    GradientPart<Real>& part = sum.parts[id];
    const int64 inner = part.parameter.inner, runs = sum.shape.neurons() / (inner * part.parameter.count);
    const int64 slots = (inner + sum.tile - 2) / sum.tile + 1;  // at most
    const auto largest_power = [](int64 most) {
      int power = 1;
      while (2 * power <= most) power *= 2;
      return power;
    };
    if (slots >= kManySlots) {
      part.elements_each = 1;
      part.slots_each = largest_power(slots < kSumThreads ? slots : kSumThreads);
      part.runs_each = kSumThreads / part.slots_each;
    } else {
      part.slots_each = 1;
      part.runs_each = largest_power(runs < kMostRunsEach ? runs : kMostRunsEach);
      part.elements_each = kSumThreads / part.runs_each;
    }
    part.blocks = blocks_for(part.elements(sum.shape), part.elements_each);
  }
  return cudaSuccess;
}

template <class Real>
cudaError_t launch(const GradientSum<Real>& sum, cudaStream_t stream) {
  int64 blocks = 0;
  for (int id = 0; id < sum.count; ++id) blocks += sum.parts[id].blocks;
  return start(&gradient_sum_kernel<Real>, blocks, kSumThreads, sum, stream);
}

// ---- batch normalisation ----

// A thread has four columns where these are of one channel.
template <class Scalar>
void cut_channels(ChannelTiles& tiles, const Scalar* x_seq, const Scalar* grad_x_seq) {
  const bool fours = kHasFours<Scalar> && tiles.shape.inner % 4 == 0 && is_aligned(x_seq) && is_aligned(grad_x_seq);
  const int lanes = fours ? 4 : 1;
  tiles = ChannelTiles::cut(tiles.shape, lanes, kBlockThreads, kChannelRowsEach / lanes);
}

template <class Scalar>
cudaError_t cut(MomentsParams<Scalar>& params) {
  cut_channels(params.tiles, params.x_seq, static_cast<const Scalar*>(nullptr));
  return cudaSuccess;
}

template <class Scalar>
cudaError_t cut(InputGradientParams<Scalar>& params) {
  cut_channels(params.tiles, params.x_seq, static_cast<const Scalar*>(params.grad_x_seq));
  return cudaSuccess;
}

template <class Scalar>
cudaError_t launch(const MomentsParams<Scalar>& params, cudaStream_t stream) {
  auto* kernel = &batch_moments_kernel<Scalar, 1>;
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.lanes == 4) kernel = &batch_moments_kernel<Scalar, 4>;
  }
  return start(kernel, params.tiles.tasks(), kBlockThreads, params, stream);
}

template <class Real>
cudaError_t launch(const CoefficientsParams<Real>& params, cudaStream_t stream) {
  return start(&batch_norm_coefficients_kernel<Real>, params.channels, kBlockThreads, params, stream);
}

template <class Real>
cudaError_t launch(const RunningParams<Real>& params, cudaStream_t stream) {
  const int64 blocks = blocks_for(params.channels, kBlockThreads);
  return start(&batch_norm_running_kernel<Real>, blocks, kBlockThreads, params, stream);
}

template <class Real>
cudaError_t launch(const AdjointParams<Real>& params, cudaStream_t stream) {
  const int64 blocks = blocks_for(params.channels, kBlockThreads);
  return start(&batch_norm_adjoint_kernel<Real>, blocks, kBlockThreads, params, stream);
}

template <class Scalar>
cudaError_t launch(const InputGradientParams<Scalar>& params, cudaStream_t stream) {
  auto* kernel = &batch_norm_input_gradient_kernel<Scalar, 1>;
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.lanes == 4) kernel = &batch_norm_input_gradient_kernel<Scalar, 4>;
  }
  return start(kernel, params.tiles.tasks(), kBlockThreads, params, stream);
}

}  // namespace asgl::cuda
