// The launcher of the kernels that nvcc compiled for one type. launch_*.cu instantiate it, so that they compile in
// parallel.
#pragma once

#include "cuda/launch_neuron.cuh"
#include "cuda/launch_normalisation.cuh"

namespace asgl::cuda {

template <class Scalar>
cudaError_t launch_for(const Start& start) {
  switch (start.launch.kernel.of) {
    case Template::kForward:
    case Template::kSettledBackward:
    case Template::kBackward:
      return launch_neuron<Scalar>(start);
    case Template::kAdaptiveForward:
    case Template::kAdaptiveBackward:
      return launch_adaptive<Scalar>(start);
    case Template::kIntegrator:
      return launch_integrator<Scalar>(start);
    case Template::kMoments:
      return launch_moments<Scalar>(start);
    case Template::kInputGradient:
      return launch_input_gradient<Scalar>(start);
    case Template::kGradientSum:
      if constexpr (std::is_same_v<Scalar, Real_t<Scalar>>) return start(&gradient_sum_kernel<Scalar>);
      break;
    case Template::kCoefficients:
      if constexpr (std::is_same_v<Scalar, Real_t<Scalar>>) return start(&batch_norm_coefficients_kernel<Scalar>);
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace asgl::cuda
