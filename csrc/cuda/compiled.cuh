// The kernels of kernels_of that nvcc compiles for one type, and which of them a launch starts. compiled_*.cu
// instantiate this, one file a type, so that they compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include <unordered_map>
#include <utility>

#include "cuda/adaptive_kernels.cuh"
#include "cuda/integrator_kernels.cuh"
#include "cuda/normalisation_kernels.cuh"
#include "cuda/start.cuh"

namespace asgl::cuda {

template <class Scalar>
inline constexpr Kernels kKernels = kernels_of(kTypeOf<Scalar>);

// Starts the kernel with this index in kKernels.
template <class Scalar, size_t kIndex>
cudaError_t start_kernel(const Start& start) {
  constexpr Kernel kKernel = kKernels<Scalar>.all[kIndex];
  constexpr int kLanes = kKernel.lanes, kSteps = kKernel.steps;
  constexpr Input kInput = kKernel.input;
  using Model =
      std::conditional_t<kIsGeneral<kInput>, LIFByOptions<Real_t<Scalar>>, LIF<kKernel.surrogate, kKernel.hard_reset>>;
  if constexpr (kKernel.of == Template::kForward) {
    return start(&lif_forward_kernel<Scalar, Model, kLanes, kInput, kSteps>);
  } else if constexpr (kKernel.of == Template::kSettledBackward) {
    return start(&lif_backward_settled_kernel<Scalar, Model, kLanes, kInput, kSteps>);
  } else if constexpr (kKernel.of == Template::kBackward) {
    return start(&lif_backward_kernel<Scalar, kLanes, kInput>);
  } else if constexpr (kKernel.of == Template::kAdaptiveForward) {
    return start(&adaptive_forward_kernel<Scalar>);
  } else if constexpr (kKernel.of == Template::kAdaptiveBackward) {
    return start(&adaptive_backward_kernel<Scalar>);
  } else if constexpr (kKernel.of == Template::kIntegrator) {
    return start(&integrator_kernel<Scalar, kLanes, kKernel.pass>);
  } else if constexpr (kKernel.of == Template::kGradientSum) {
    return start(&gradient_sum_kernel<Scalar>);
  } else if constexpr (kKernel.of == Template::kMoments) {
    return start(&batch_moments_kernel<Scalar, kLanes>);
  } else if constexpr (kKernel.of == Template::kCoefficients) {
    return start(&batch_norm_coefficients_kernel<Scalar>);
  } else {
    return start(&batch_norm_input_gradient_kernel<Scalar, kLanes, kKernel.residual>);
  }
}

// Maps the key of each kernel to its compiled function.
template <class Scalar, size_t... kIndices>
std::unordered_map<uint32, cudaError_t (*)(const Start&)> all_functions(std::index_sequence<kIndices...>) {
  return {{kKernels<Scalar>.all[kIndices].key(), &start_kernel<Scalar, kIndices>}...};
}

// Starts the kernel of the launch; cudaErrorInvalidValue if it was not compiled.
template <class Scalar>
cudaError_t start_compiled(const Start& start) {
  static const auto functions = all_functions<Scalar>(std::make_index_sequence<kKernels<Scalar>.count>{});
  const auto found = functions.find(start.launch.kernel.key());
  return found == functions.end() ? cudaErrorInvalidValue : found->second(start);
}

}  // namespace asgl::cuda
