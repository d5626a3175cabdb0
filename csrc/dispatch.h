// Run-time values to template arguments: each function calls a generic lambda with a compile-time constant or a type
// tag.
#pragma once

#include <type_traits>

#include "surrogate_math.h"

namespace asgl {

template <class F>
auto with_bool(bool value, F&& f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

template <Surrogate kSurrogate>
using SurrogateConstant = std::integral_constant<Surrogate, kSurrogate>;

// The caller has checked that the value is one of the seven.
template <class F>
auto with_surrogate(Surrogate surrogate, F&& f) {
  switch (surrogate) {
    case Surrogate::kTriangle:
      return f(SurrogateConstant<Surrogate::kTriangle>{});
    case Surrogate::kSigmoid:
      return f(SurrogateConstant<Surrogate::kSigmoid>{});
    case Surrogate::kArctan:
      return f(SurrogateConstant<Surrogate::kArctan>{});
    case Surrogate::kErf:
      return f(SurrogateConstant<Surrogate::kErf>{});
    case Surrogate::kFastSigmoid:
      return f(SurrogateConstant<Surrogate::kFastSigmoid>{});
    case Surrogate::kLaplace:
      return f(SurrogateConstant<Surrogate::kLaplace>{});
    case Surrogate::kRectangle:
      break;
  }
  return f(SurrogateConstant<Surrogate::kRectangle>{});
}

}  // namespace asgl
