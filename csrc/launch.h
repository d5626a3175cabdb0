// The launchers, between operators and kernels. plan_tiles(params) divides values into tiles; launch(params) runs the
// kernel for the type of params. Arguments are checked in ops.
#pragma once

#include <type_traits>
#include <utility>

#include "params/gradient.h"
#include "params/integrator.h"
#include "params/normalisation.h"
#if defined(ASGL_WITH_CUDA)
#include <cuda_runtime.h>
#endif

namespace asgl {

// Calls f(model) with the model that the options select, LIF<...> or LIFByOptions<Real>. The caller has checked that
// the surrogate exists.
template <class Real, class F, int... kIds>
void with_model(const NeuronOptions<Real>& options, F&& f, std::integer_sequence<int, kIds...>) {
  const auto call = [&](auto id) {
    constexpr auto kSurrogate = static_cast<Surrogate>(id());
    if (options.surrogate != kSurrogate) return;
    if constexpr (kSurrogate != Surrogate::kInteger) {
      if (options.hard_reset) return f(LIF<kSurrogate, true>{});
    }
    f(LIF<kSurrogate, false>{});
  };
  (call(std::integral_constant<int, kIds>{}), ...);
}
template <class Real, class F>
void with_model(const LIFByOptions<Real>& options, F&& f) {
  if (options.has_optional_rules()) return f(options);
  with_model(options, f, std::make_integer_sequence<int, kNumSurrogates>{});
}

// Calls f(pass) with the pass as a constant.
template <class F>
void with_pass(Pass pass, F&& f) {
  if (pass == Pass::kForward) return f(std::integral_constant<Pass, Pass::kForward>{});
  if (pass == Pass::kBackward) return f(std::integral_constant<Pass, Pass::kBackward>{});
  f(std::integral_constant<Pass, Pass::kSums>{});
}

// Both devices have the kernels of all params: ForwardParams, BackwardParams, GradientSum, IntegratorParams,
// MomentsParams, CoefficientsParams, RunningParams, AdjointParams and InputGradientParams. The launchers are
// instantiated where they are defined, as overloads of plan_on and launch_on.
namespace cpu {

template <class Params>
void plan_tiles(Params& params);
template <class Params>
void launch(const Params& params);

int num_threads();

}  // namespace cpu

#if defined(ASGL_WITH_CUDA)
// Calls return the error of their own launch.
namespace cuda {

template <class Params>
cudaError_t plan_tiles(Params& params);
template <class Params>
cudaError_t launch(const Params& params, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace asgl
