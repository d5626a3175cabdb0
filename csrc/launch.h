// The launchers, the bridge between operators and kernels. cut(params) says how the values are cut among tasks;
// launch(params) runs a kernel: the type of params is the kernel. They check nothing, since ops.h has.
#pragma once

#include <type_traits>
#include <utility>

#include "params/integrator.h"
#include "params/neuron.h"
#include "params/normalisation.h"
#if defined(ASGL_WITH_CUDA)
#include <cuda_runtime.h>
#endif

namespace asgl {

// Calls f(LIF<...>{}) or f(LIFByOptions{}), the model that the options name. The caller has checked that there is such
// a surrogate.
template <class Real, class F, int... kIds>
void with_model(const NeuronOptions<Real>& options, F&& f, std::integer_sequence<int, kIds...>) {
  const auto call = [&](auto id) {
    constexpr auto kSurrogate = static_cast<Surrogate>(id());
    if (options.surrogate != kSurrogate) return;
    options.hard_reset ? f(LIF<kSurrogate, true>{}) : f(LIF<kSurrogate, false>{});
  };
  (call(std::integral_constant<int, kIds>{}), ...);
}
template <class Real, class F>
void with_model(const AllOptions<Real>& options, F&& f) {
  if (options.has_optional_rules()) return f(LIFByOptions{});
  with_model(options, f, std::make_integer_sequence<int, kNumSurrogates>{});
}

// Calls f with the pass as a constant.
template <class F>
void with_pass(Pass pass, F&& f) {
  if (pass == Pass::kForward) return f(std::integral_constant<Pass, Pass::kForward>{});
  if (pass == Pass::kBackward) return f(std::integral_constant<Pass, Pass::kBackward>{});
  f(std::integral_constant<Pass, Pass::kSums>{});
}

namespace cpu {

template <class Scalar>
void cut(LIFParams<Scalar>& params);
template <class Real>
void cut(GradientSum<Real>& params);
template <class Scalar>
void cut(MomentsParams<Scalar>& params);
template <class Scalar>
void cut(InputGradientParams<Scalar>& params);

template <class Scalar>
void launch(const ForwardParams<Scalar>& params);
template <class Scalar>
void launch(const BackwardParams<Scalar>& params);
template <class Real>
void launch(const GradientSum<Real>& params);
template <class Scalar>
void launch(const IntegratorParams<Scalar>& params);
template <class Scalar>
void launch(const MomentsParams<Scalar>& params);
template <class Real>
void launch(const CoefficientsParams<Real>& params);
template <class Real>
void launch(const RunningParams<Real>& params);
template <class Real>
void launch(const AdjointParams<Real>& params);
template <class Scalar>
void launch(const InputGradientParams<Scalar>& params);

int num_threads();

}  // namespace cpu

#if defined(ASGL_WITH_CUDA)
// A call returns the error of its own launch.
namespace cuda {

template <class Scalar>
cudaError_t cut(ForwardParams<Scalar>& params);
template <class Scalar>
cudaError_t cut(BackwardParams<Scalar>& params);
template <class Real>
cudaError_t cut(GradientSum<Real>& params);
template <class Scalar>
cudaError_t cut(IntegratorParams<Scalar>& params);
template <class Scalar>
cudaError_t cut(MomentsParams<Scalar>& params);
template <class Scalar>
cudaError_t cut(InputGradientParams<Scalar>& params);

template <class Scalar>
cudaError_t launch(const ForwardParams<Scalar>& params, cudaStream_t stream);
template <class Scalar>
cudaError_t launch(const BackwardParams<Scalar>& params, cudaStream_t stream);
template <class Real>
cudaError_t launch(const GradientSum<Real>& params, cudaStream_t stream);
template <class Scalar>
cudaError_t launch(const IntegratorParams<Scalar>& params, cudaStream_t stream);
template <class Scalar>
cudaError_t launch(const MomentsParams<Scalar>& params, cudaStream_t stream);
template <class Real>
cudaError_t launch(const CoefficientsParams<Real>& params, cudaStream_t stream);
template <class Real>
cudaError_t launch(const RunningParams<Real>& params, cudaStream_t stream);
template <class Real>
cudaError_t launch(const AdjointParams<Real>& params, cudaStream_t stream);
template <class Scalar>
cudaError_t launch(const InputGradientParams<Scalar>& params, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace asgl
