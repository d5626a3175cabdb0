// How the CUDA kernels are launched: which kernel, how many neurons a thread, which grid. backends/neuron_kernels.py
// and normalisation_kernels.py decide the same in Python.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/normalisation_kernels.cuh"

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

// Says whether a quarter of the threads that the device can hold is enough. Each has four times the loads under way.
inline cudaError_t fills_device(int64 threads, bool* fills) {
  int device = 0, multiprocessors = 0, threads_each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&threads_each, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  }
  *fills = threads >= static_cast<int64>(multiprocessors) * threads_each / 4;
  return error;
}

// A tile is what a block computes: one neuron a thread, or four.
template <class Params>
cudaError_t cut_neurons(Params& params) {
  using Scalar = std::remove_const_t<std::remove_pointer_t<decltype(params.x_seq)>>;
  bool fours = false;
  cudaError_t error = cudaSuccess;
  if (kHasFours<Scalar> && groups_of_four(params)) error = fills_device(params.shape.neurons() / 4, &fours);
  params.tiles.tile = fours ? 4 * kBlockThreads : kBlockThreads;
  params.tiles.count = blocks_for(params.shape.neurons(), params.tiles.tile);
  return error;
}

template <class Scalar>
cudaError_t cut(ForwardParams<Scalar>& params) {
  return cut_neurons(params);
}

template <class Scalar>
cudaError_t cut(BackwardParams<Scalar>& params) {
  return cut_neurons(params);
}

// Calls f with the Input of the kernel as a constant; it is general for one neuron a thread.
template <class Params, class F>
void with_input(const Params& params, F&& f) {
  const Input input = params.only_spikes() ? params.input() : Input::kGeneral;
  if (input == Input::kPlain) return f(std::integral_constant<Input, Input::kPlain>{});
  if (input == Input::kNormalised) return f(std::integral_constant<Input, Input::kNormalised>{});
  f(std::integral_constant<Input, Input::kGeneral>{});
}

template <class Model, class Scalar>
cudaError_t launch(Model, const ForwardParams<Scalar>& params, cudaStream_t stream) {
  auto* kernel = &lif_forward_kernel<Scalar, Model, 1, Input::kGeneral>;
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.tile > kBlockThreads) {
      with_input(params, [&](auto input) { kernel = &lif_forward_kernel<Scalar, Model, 4, input()>; });
    }
  }
  return start(kernel, params.tiles.count, kBlockThreads, params, stream);
}

template <class Model, class Scalar>
cudaError_t launch(Model, const BackwardParams<Scalar>& params, cudaStream_t stream) {
  auto* kernel = &lif_backward_kernel<Scalar, Model, 1>;
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.tile > kBlockThreads) {
      const int64 steps = params.shape.steps;
      with_input(params, [&](auto input) {
        if constexpr (input() == Input::kGeneral) {
          kernel = &lif_backward_kernel<Scalar, Model, 4>;
        } else {
          kernel = steps <= 4   ? &lif_backward_uniform_kernel<Scalar, Model, 4, input()>
                   : steps <= 8 ? &lif_backward_uniform_kernel<Scalar, Model, 8, input()>
                                : &lif_backward_uniform_kernel<Scalar, Model, kCheckpointSteps, input()>;
        }
      });
    }
  }
  return start(kernel, params.tiles.count, kBlockThreads, params, stream);
}

template <class Real>
cudaError_t cut(GradientSum<Real>& sum) {
  constexpr int64 kManySlots = 256;
  for (int id = 0; id < sum.count; ++id) {
    GradientPart<Real>& part = sum.parts[id];
    part.block_each = part.slots(sum.shape, sum.tile) >= kManySlots;
    part.blocks = part.block_each ? part.elements(sum.shape) : blocks_for(part.elements(sum.shape), kSumThreads);
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
