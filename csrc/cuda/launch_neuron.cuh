// The launchers of the neuron, which name every kernel for nvcc. launch_*.cu instantiate them,
// one file a type, so that they compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include "cuda/adaptive_kernels.cuh"
#include "cuda/start.cuh"
#include "launch.h"

namespace asgl::cuda {

// Calls f(lanes) with the kernel's as a constant.
template <class Scalar, class F>
void with_lanes(const Kernel& kernel, F&& f) {
  if (kernel.lanes == 1) return f(std::integral_constant<int, 1>{});
  if constexpr (kHasFours<Scalar>) f(std::integral_constant<int, 4>{});
}

// Kernels of one model.
template <class Scalar, class Model>
cudaError_t launch_settled(Model, const Start& start) {
  const Kernel& kernel = start.launch.kernel;
  cudaError_t error = cudaErrorInvalidValue;
  const auto try_kernel = [&](auto lanes, auto input, auto steps) {
    if (kernel.lanes != lanes() || kernel.input != input() || kernel.steps != steps()) return;
    if (kernel.of == Template::kForward) {
      error = start(&lif_forward_kernel<Scalar, Model, lanes(), input(), steps()>);
    } else {
      error = start(&lif_backward_settled_kernel<Scalar, Model, lanes(), input(), steps()>);
    }
  };
  const std::integral_constant<int, 0> any{};
  const std::integral_constant<Input, Input::kNormalised> normalised{};
  try_kernel(std::integral_constant<int, 1>{}, normalised, any);
  if constexpr (kHasFours<Scalar>) {
    const auto try_input = [&](auto input) {
      try_kernel(std::integral_constant<int, 4>{}, input, any);
      try_kernel(std::integral_constant<int, 4>{}, input, std::integral_constant<int, kShortSequence>{});
    };
    try_input(normalised);
    try_input(std::integral_constant<Input, Input::kPlain>{});
    try_input(std::integral_constant<Input, Input::kNormalisedResidual>{});
    try_input(std::integral_constant<Input, Input::kApart>{});
  }
  return error;
}

template <class Scalar>
cudaError_t launch_general(const Start& start) {
  const Kernel& kernel = start.launch.kernel;
  cudaError_t error = cudaErrorInvalidValue;
  with_lanes<Scalar>(kernel, [&](auto lanes) {
    const auto start_kernel = [&](auto input) {
      if (kernel.of == Template::kForward) {
        error = start(&lif_forward_kernel<Scalar, LIFByOptions<Real_t<Scalar>>, lanes(), input(), 0>);
      } else {
        error = start(&lif_backward_kernel<Scalar, lanes(), input()>);
      }
    };
    if (kernel.input == Input::kGeneral) return start_kernel(std::integral_constant<Input, Input::kGeneral>{});
    start_kernel(std::integral_constant<Input, Input::kGeneralResidual>{});
  });
  return error;
}

template <class Scalar>
cudaError_t launch_adaptive(const Start& start) {
  if (start.launch.kernel.of == Template::kAdaptiveForward) return start(&adaptive_forward_kernel<Scalar>);
  return start(&adaptive_backward_kernel<Scalar>);
}

template <class Scalar>
cudaError_t launch_neuron(const Start& start) {
  const Kernel& kernel = start.launch.kernel;
  if (kernel.is_general()) return launch_general<Scalar>(start);
  NeuronOptions<float> options{};
  options.surrogate = kernel.surrogate;
  options.hard_reset = kernel.hard_reset;
  cudaError_t error = cudaErrorInvalidValue;
  const auto launch = [&](auto model) { error = launch_settled<Scalar>(model, start); };
  with_model(options, launch, std::make_integer_sequence<int, kNumSurrogates>{});
  return error;
}

}  // namespace asgl::cuda
