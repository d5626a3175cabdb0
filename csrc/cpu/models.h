// Chooses the neuron model for the options of a call on the CPU. The counterpart for CUDA kernels is launch_of in
// cuda/plan.h.
#pragma once

#include <type_traits>
#include <utility>

#include "math/lif_by_options.h"

namespace asgl {

// Calls f(model) with the LIF of the surrogate and the reset that the options select. The caller has checked that the
// surrogate exists.
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
// Calls f(model) with LIFByOptions if the options have rules that LIF does not have, else with the LIF for the options.
template <class Real, class F>
void with_model(const LIFByOptions<Real>& options, F&& f) {
  if (options.has_optional_rules()) return f(options);
  with_model(options, f, std::make_integer_sequence<int, kNumSurrogates>{});
}

}  // namespace asgl
