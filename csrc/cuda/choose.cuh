// How the CUDA kernels are launched: which kernel, how many neurons a thread, which grid.
#pragma once

#include <type_traits>

#include "lif_cuda.h"
#include "lif_kernels.cuh"

namespace asgl::cuda {

template <class Kernel, class Params>
cudaError_t launch(Kernel* kernel, int64 blocks, int threads, const Params& params, cudaStream_t stream) {
  constexpr int64 kMostBlocks = 0x7FFFFFFF;
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t error =
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, 0, stream);
  // Asked for in any case, lest it be found by a later and innocent call.
  const cudaError_t pending = cudaGetLastError();
  return error != cudaSuccess ? error : pending;
}

inline int64 blocks_for(int64 work, int64 per_block) { return (work + per_block - 1) / per_block; }

template <class Element>
bool is_aligned(const Element* first) {
  return reinterpret_cast<unsigned long>(first) % (4 * sizeof(Element)) == 0;
}

// Whether four neighbouring neurons, the first a multiple of four, always lie side by side and share all parameters.
template <class Scalar, class... Elements>
bool groups_of_four(const LIFParams<Scalar>& params, const Elements*... sequences_and_states) {
  bool shared = params.shape.inner % 4 == 0;
  for (const auto& parameter : params.parameters) {
    shared = shared && (parameter.data == nullptr || parameter.inner % 4 == 0);
  }
  return shared && is_aligned(params.x_seq) && is_aligned(params.v_init) && (is_aligned(sequences_and_states) && ...);
}

// Whether a quarter of the threads that the device can hold is enough. Each has four times the loads under way.
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

template <class Scalar, class... Elements>
cudaError_t choose_lanes(const LIFParams<Scalar>& params, int* lanes, const Elements*... sequences_and_states) {
  *lanes = 1;
  // float64 would need two accesses of 16 bytes, and gains nothing from them.
  if (std::is_same_v<Scalar, double> || !groups_of_four(params, sequences_and_states...)) return cudaSuccess;
  bool fills = false;
  const cudaError_t error = fills_device(params.shape.neurons() / 4, &fills);
  if (fills) *lanes = 4;
  return error;
}

template <class Scalar>
cudaError_t choose_lanes(const ForwardParams<Scalar>& params, int* lanes) {
  return choose_lanes(params, lanes, params.s_seq, params.v_last, params.v_seq, params.h_seq, params.checkpoints);
}

template <class Scalar>
cudaError_t choose_lanes(const BackwardParams<Scalar>& params, int* lanes) {
  return choose_lanes(params, lanes, params.grad_s_seq, params.grad_v_last, params.grad_v_seq, params.grad_h_seq,
                      params.checkpoints, params.grad_x_seq, params.grad_v_init);
}

template <class Scalar>
cudaError_t backward_tiles(const BackwardParams<Scalar>& params, TilePlan* plan) {
  int lanes = 1;
  const cudaError_t error = choose_lanes(params, &lanes);
  const int64 tile = int64{lanes} * kBlockThreads;
  *plan = {tile, blocks_for(params.shape.neurons(), tile)};
  return error;
}

// The kInput of the kernels, as far as it is the same for both.
template <class Scalar>
Input input_of(const LIFParams<Scalar>& params, int lanes) {
  return lanes == 4 && !params.options.scale_output ? params.input() : Input::kGeneral;
}

template <Surrogate kSurrogate, bool kHardReset, class Scalar>
cudaError_t launch_forward(const ForwardParams<Scalar>& params, cudaStream_t stream) {
  int lanes = 1;
  const cudaError_t error = choose_lanes(params, &lanes);
  if (error != cudaSuccess) return error;
  const int64 blocks = blocks_for(params.shape.neurons(), int64{lanes} * kBlockThreads);
  auto* kernel = &lif_forward_kernel<Scalar, kSurrogate, kHardReset, 1, Input::kGeneral>;
  if constexpr (!std::is_same_v<Scalar, double>) {
    if (lanes == 4) {
      const bool only_spikes = params.v_seq == nullptr && params.h_seq == nullptr;
      const Input input = only_spikes ? input_of(params, lanes) : Input::kGeneral;
      kernel = input == Input::kPlain ? &lif_forward_kernel<Scalar, kSurrogate, kHardReset, 4, Input::kPlain>
               : input == Input::kNormalised
                   ? &lif_forward_kernel<Scalar, kSurrogate, kHardReset, 4, Input::kNormalised>
                   : &lif_forward_kernel<Scalar, kSurrogate, kHardReset, 4, Input::kGeneral>;
    }
  }
  return launch(kernel, blocks, kBlockThreads, params, stream);
}

template <class Scalar, Surrogate kSurrogate, bool kHardReset, Input kInput>
auto* plain_backward_kernel(int64 steps) {
  return steps <= 4   ? &lif_backward_plain_kernel<Scalar, kSurrogate, kHardReset, 4, kInput>
         : steps <= 8 ? &lif_backward_plain_kernel<Scalar, kSurrogate, kHardReset, 8, kInput>
                      : &lif_backward_plain_kernel<Scalar, kSurrogate, kHardReset, kCheckpointSteps, kInput>;
}

template <Surrogate kSurrogate, bool kHardReset, class Scalar>
cudaError_t launch_backward(const BackwardParams<Scalar>& params, cudaStream_t stream) {
  int lanes = 1;
  const cudaError_t error = choose_lanes(params, &lanes);
  if (error != cudaSuccess) return error;
  const int64 blocks = blocks_for(params.shape.neurons(), int64{lanes} * kBlockThreads);
  auto* kernel = &lif_backward_kernel<Scalar, kSurrogate, kHardReset, 1>;
  if constexpr (!std::is_same_v<Scalar, double>) {
    if (lanes == 4) {
      const bool general =
          params.grad_v_seq != nullptr || params.grad_h_seq != nullptr || wants_other_than_width_and_input(params);
      const Input input = general ? Input::kGeneral : input_of(params, lanes);
      const int64 steps = params.shape.steps;
      kernel = input == Input::kPlain ? plain_backward_kernel<Scalar, kSurrogate, kHardReset, Input::kPlain>(steps)
               : input == Input::kNormalised
                   ? plain_backward_kernel<Scalar, kSurrogate, kHardReset, Input::kNormalised>(steps)
                   : &lif_backward_kernel<Scalar, kSurrogate, kHardReset, 4>;
    }
  }
  return launch(kernel, blocks, kBlockThreads, params, stream);
}

template <class Real>
cudaError_t launch_gradient_sum(const GradientSum<Real>& sum, cudaStream_t stream) {
  constexpr int64 kManySlots = 256;
  if (sum.slots() >= kManySlots) {
    return launch(&gradient_sum_kernel<Real, true>, sum.elements(), kSumThreads, sum, stream);
  }
  return launch(&gradient_sum_kernel<Real, false>, blocks_for(sum.elements(), kSumThreads), kSumThreads, sum, stream);
}

}  // namespace asgl::cuda
