// Compiles all kernels of a type with nvcc, and starts the one that a launch names. Each compiled_*.cu instantiates
// start_compiled for one type, so that the types compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include <unordered_map>
#include <utility>

#include "cuda/adaptive_kernels.cuh"
#include "cuda/integrator_kernels.cuh"
#include "cuda/normalisation_kernels.cuh"
#include "cuda/start.cuh"

namespace asgl::cuda {

// The kernels that nvcc compiles for this type.
template <class Scalar>
inline constexpr KernelList kKernelList = kernels_of(kTypeOf<Scalar>);

// Starts the kernel with this index in kKernelList, and returns the error of the launch.
template <class Scalar, size_t kIndex>
cudaError_t start_kernel(const KernelStarter& starter) {
  constexpr Kernel kKernel = kKernelList<Scalar>.all[kIndex];
  constexpr int kLanes = kKernel.lanes, kSteps = kKernel.steps;
  constexpr Input kInput = kKernel.input;
  using Model =
      std::conditional_t<kIsGeneral<kInput>, LIFByOptions<Real_t<Scalar>>, LIF<kKernel.surrogate, kKernel.hard_reset>>;
  if constexpr (kKernel.template_id == Template::kForward) {
    return starter(&lif_forward_kernel<Scalar, Model, kLanes, kInput, kSteps>);
  } else if constexpr (kKernel.template_id == Template::kSettledBackward) {
    return starter(&lif_backward_settled_kernel<Scalar, Model, kLanes, kInput, kSteps>);
  } else if constexpr (kKernel.template_id == Template::kBackward) {
    return starter(&lif_backward_kernel<Scalar, kLanes, kInput>);
  } else if constexpr (kKernel.template_id == Template::kAdaptiveForward) {
    return starter(&adaptive_forward_kernel<Scalar>);
  } else if constexpr (kKernel.template_id == Template::kAdaptiveBackward) {
    return starter(&adaptive_backward_kernel<Scalar>);
  } else if constexpr (kKernel.template_id == Template::kIntegrator) {
    return starter(&integrator_kernel<Scalar, kLanes, kKernel.pass>);
  } else if constexpr (kKernel.template_id == Template::kGradientSum) {
    return starter(&gradient_sum_kernel<Scalar>);
  } else if constexpr (kKernel.template_id == Template::kMoments) {
    return starter(&batch_moments_kernel<Scalar, kLanes>);
  } else if constexpr (kKernel.template_id == Template::kCoefficients) {
    return starter(&batch_norm_coefficients_kernel<Scalar>);
  } else {
    return starter(&batch_norm_input_gradient_kernel<Scalar, kLanes, kKernel.residual>);
  }
}

// Maps the key of each kernel to the function that starts it.
template <class Scalar, size_t... kIndices>
std::unordered_map<uint32, cudaError_t (*)(const KernelStarter&)> functions_by_key(std::index_sequence<kIndices...>) {
  return {{kKernelList<Scalar>.all[kIndices].key(), &start_kernel<Scalar, kIndices>}...};
}

// Starts the kernel of `starter.launch`, and returns the error of the launch. Returns cudaErrorInvalidValue if the
// kernel was not compiled.
template <class Scalar>
cudaError_t start_compiled(const KernelStarter& starter) {
  static const auto functions = functions_by_key<Scalar>(std::make_index_sequence<kKernelList<Scalar>.count>{});
  const auto found = functions.find(starter.launch.kernel.key());
  return found == functions.end() ? cudaErrorInvalidValue : found->second(starter);
}

}  // namespace asgl::cuda
