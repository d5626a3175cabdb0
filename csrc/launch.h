// The choice of a model, and the CPU's launchers; launch_of in cuda/plan.h chooses a CUDA kernel. Arguments are checked
// in ops.
#pragma once

#include <type_traits>
#include <utility>

#include "params/gradient.h"
#include "params/integrator.h"
#include "params/normalisation.h"

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

// plan_tiles(params) divides values into tiles, and launch(params) runs the kernel for params: ForwardParams,
// BackwardParams, GradientSum, IntegratorParams, MomentsParams, CoefficientsParams and InputGradientParams.
// They are instantiated where they are defined, as overloads of plan_on and launch_on.
namespace cpu {

template <class Params>
void plan_tiles(Params& params);
template <class Params>
void launch(const Params& params);

int num_threads();

}  // namespace cpu

}  // namespace asgl
