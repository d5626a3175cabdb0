// The surrogates of width 1: cumulative functions F and their slopes f = F'. asgl_cuda/reference/surrogates.py defines
// them in PyTorch. docs/design/maintainers.md says how to add a surrogate.
#pragma once

#include "math/float_math.h"
#include "math/host_device.h"

namespace asgl {

// kInteger counts spikes: F(y) = clamp(y, 0, levels), y = h / width, and the hard value is F(y) rounded.
enum class Surrogate : int { kRectangle, kTriangle, kSigmoid, kArctan, kErf, kFastSigmoid, kLaplace, kInteger, kCount };
constexpr int kNumSurrogates = static_cast<int>(Surrogate::kCount);

namespace math {

#if defined(__CUDA_ARCH__)
ASGL_HOST_DEVICE double exp_of_nonpositive(double x) { return ::exp(x); }
ASGL_HOST_DEVICE double erf(double x) { return ::erf(x); }
ASGL_HOST_DEVICE double atan(double x) { return ::atan(x); }
ASGL_HOST_DEVICE double trunc(double x) { return ::trunc(x); }
ASGL_HOST_DEVICE float trunc(float x) { return ::truncf(x); }
ASGL_HOST_DEVICE double abs(double x) { return ::fabs(x); }
ASGL_HOST_DEVICE float abs(float x) { return ::fabsf(x); }
#else
ASGL_HOST_DEVICE double exp_of_nonpositive(double x) { return __builtin_exp(x); }
ASGL_HOST_DEVICE double erf(double x) { return __builtin_erf(x); }
ASGL_HOST_DEVICE double atan(double x) { return __builtin_atan(x); }
ASGL_HOST_DEVICE double trunc(double x) { return __builtin_trunc(x); }
ASGL_HOST_DEVICE float trunc(float x) { return __builtin_truncf(x); }
ASGL_HOST_DEVICE double abs(double x) { return __builtin_fabs(x); }
ASGL_HOST_DEVICE float abs(float x) { return __builtin_fabsf(x); }
#endif

// With ASGL_HOST_FUNCTIONS the device computes the host's float32 functions, to test that nothing else differs.
#if defined(__CUDA_ARCH__) && !defined(ASGL_HOST_FUNCTIONS)
#define ASGL_DEVICE_FUNCTIONS
#endif

#if defined(ASGL_DEVICE_FUNCTIONS)
ASGL_HOST_DEVICE float exp_of_nonpositive(float x) { return ::expf(x); }
ASGL_HOST_DEVICE float erf(float x) { return ::erff(x); }
ASGL_HOST_DEVICE float atan(float x) { return ::atanf(x); }
#else
ASGL_HOST_DEVICE float exp_of_nonpositive(float x) { return float_math::exp_of_nonpositive(x); }
ASGL_HOST_DEVICE float erf(float x) { return float_math::erf(x); }
ASGL_HOST_DEVICE float atan(float x) { return float_math::atan(x); }
#endif

// Clamps to [0, 1] by comparisons, since fmin and fmax lose NaN.
template <class Real>
ASGL_HOST_DEVICE Real clamp_to_unit_interval(Real x) {
  const Real from_below = x < Real(0) ? Real(0) : x;
  return x > Real(1) ? Real(1) : from_below;
}

// Clamps to [0, most].
template <class Real>
ASGL_HOST_DEVICE Real clamp_from_zero(Real x, Real most) {
  const Real from_below = x < Real(0) ? Real(0) : x;
  return x > most ? most : from_below;
}

// Rounds to the nearest integer, ties to even, for 0 <= x < 2^22: the sum has no bits for a fraction.
ASGL_HOST_DEVICE float round_half_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
ASGL_HOST_DEVICE double round_half_even(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

// 1 / x, for x >= 1. In float32 on a GPU the error is up to 1 ulp.
template <class Real>
ASGL_HOST_DEVICE Real reciprocal(Real x) {
  return Real(1) / x;
}

#if defined(ASGL_DEVICE_FUNCTIONS)
ASGL_HOST_DEVICE float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
ASGL_HOST_DEVICE float clamp_to_unit_interval(float x) {
  float from_below, clamped;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(from_below) : "f"(x));
  asm("min.NaN.f32 %0, %1, 0f3F800000;" : "=f"(clamped) : "f"(from_below));
  return clamped;
}
#endif

// Whether 0 <= x <= 1, false for NaN. A CPU compares twice, because clamping takes it four instructions.
template <class Real>
ASGL_HOST_DEVICE bool is_in_unit_interval(Real x) {
#if defined(__CUDA_ARCH__)
  return clamp_to_unit_interval(x) == x;
#else
  return (x >= Real(0)) & (x <= Real(1));
#endif
}

}  // namespace math

template <Surrogate kind>
struct SurrogateMath;

// cumulative is F(y). With the gradient da of F(y), the gradient of y is da * slope(y), or adjoint(y, da) for
// surrogates whose slope is hardly more than a comparison.
//
// Rectangle and triangle do the operations of PyTorch's autograd on the reference in the same order, for equal bits.
// There is one exception, which saves three operations: triangle computes one product where autograd adds two halves.
// In float32 the halves of gradients under 1e-37 may be subnormal, and then round differently.

template <>
struct SurrogateMath<Surrogate::kRectangle> {
  template <class Real>
  static ASGL_HOST_DEVICE Real cumulative(Real y) {
    return math::clamp_to_unit_interval(y + Real(0.5));
  }
  template <class Real>
  static ASGL_HOST_DEVICE Real adjoint(Real y, Real da) {
    return math::is_in_unit_interval(y + Real(0.5)) ? da : Real(0);
  }
};

template <>
struct SurrogateMath<Surrogate::kTriangle> {
  // 1 - |y|
  template <class Real>
  static ASGL_HOST_DEVICE Real distance_to_edge(Real y) {
    return y < Real(0) ? y + Real(1) : Real(1) - y;
  }
  template <class Real>
  static ASGL_HOST_DEVICE Real cumulative(Real y) {
    const Real edge = distance_to_edge(y);
    const Real inside = edge < Real(0) ? Real(0) : edge;
    const Real tail = Real(0.5) * inside * inside;
    return y < Real(0) ? tail : Real(1) - tail;
  }
  template <class Real>
  static ASGL_HOST_DEVICE Real adjoint(Real y, Real da) {
    const Real edge = distance_to_edge(y);
    return edge >= Real(0) ? da * edge : Real(0);
  }
};

// With e = exp(-|y|): F = e / (1 + e) for y < 0, else 1 / (1 + e), and slope = e / (1 + e)^2. Unlike F * (1 - F), this
// slope loses nothing to cancellation.
template <>
struct SurrogateMath<Surrogate::kSigmoid> {
  template <class Real>
  static ASGL_HOST_DEVICE Real cumulative(Real y) {
    const Real e = math::exp_of_nonpositive(-math::abs(y)), inverse = math::reciprocal(Real(1) + e);
    return y < Real(0) ? e * inverse : inverse;
  }
  template <class Real>
  static ASGL_HOST_DEVICE Real slope(Real y) {
    const Real e = math::exp_of_nonpositive(-math::abs(y)), inverse = math::reciprocal(Real(1) + e);
    return e * inverse * inverse;
  }
};

template <>
struct SurrogateMath<Surrogate::kArctan> {
  template <class Real>
  static ASGL_HOST_DEVICE Real cumulative(Real y) {
    return math::atan(y * Real(1.57079632679489661923)) * Real(0.318309886183790671538) + Real(0.5);
  }
  template <class Real>
  static ASGL_HOST_DEVICE Real slope(Real y) {
    const Real scaled = y * Real(1.57079632679489661923);
    return Real(0.5) * math::reciprocal(Real(1) + scaled * scaled);
  }
};

template <>
struct SurrogateMath<Surrogate::kErf> {
  template <class Real>
  static ASGL_HOST_DEVICE Real cumulative(Real y) {
    return (Real(1) + math::erf(y)) * Real(0.5);
  }
  template <class Real>
  static ASGL_HOST_DEVICE Real slope(Real y) {
    return math::exp_of_nonpositive(-(y * y)) * Real(0.564189583547756286948);
  }
};

template <>
struct SurrogateMath<Surrogate::kFastSigmoid> {
  template <class Real>
  static ASGL_HOST_DEVICE Real cumulative(Real y) {
    const Real tail = Real(0.5) * math::reciprocal(Real(1) + math::abs(y));
    return y < Real(0) ? tail : Real(1) - tail;
  }
  template <class Real>
  static ASGL_HOST_DEVICE Real slope(Real y) {
    const Real denominator = Real(1) + math::abs(y);
    return Real(0.5) * math::reciprocal(denominator * denominator);
  }
};

template <>
struct SurrogateMath<Surrogate::kLaplace> {
  template <class Real>
  static ASGL_HOST_DEVICE Real cumulative(Real y) {
    const Real tail = Real(0.5) * math::exp_of_nonpositive(-math::abs(y));
    return y < Real(0) ? tail : Real(1) - tail;
  }
  template <class Real>
  static ASGL_HOST_DEVICE Real slope(Real y) {
    return Real(0.5) * math::exp_of_nonpositive(-math::abs(y));
  }
};

template <>
struct SurrogateMath<Surrogate::kInteger> {
  template <class Real>
  static ASGL_HOST_DEVICE Real cumulative(Real y, Real levels) {
    return math::clamp_from_zero(y, levels);
  }
  template <class Real>
  static ASGL_HOST_DEVICE Real adjoint(Real y, Real da, Real levels) {
    return math::clamp_from_zero(y, levels) == y ? da : Real(0);  // edges included, NaN excluded
  }
};

// Whether SurrogateMath has a slope. Slopes take long to compute, so that a kernel may store them.
template <Surrogate kSurrogate>
constexpr bool kHasSlope = kSurrogate >= Surrogate::kSigmoid && kSurrogate <= Surrogate::kLaplace;

// F(y). Only kInteger has levels.
template <Surrogate kSurrogate, class Real>
ASGL_HOST_DEVICE Real surrogate_value(Real levels, Real y) {
  if constexpr (kSurrogate == Surrogate::kInteger) {
    return SurrogateMath<kSurrogate>::cumulative(y, levels);
  } else {
    return SurrogateMath<kSurrogate>::cumulative(y);
  }
}

// The gradient of y, from the gradient da of F(y).
template <Surrogate kSurrogate, class Real>
ASGL_HOST_DEVICE Real surrogate_adjoint(Real levels, Real y, Real da) {
  if constexpr (kSurrogate == Surrogate::kInteger) {
    return SurrogateMath<kSurrogate>::adjoint(y, da, levels);
  } else if constexpr (kHasSlope<kSurrogate>) {
    return da * SurrogateMath<kSurrogate>::slope(y);
  } else {
    return SurrogateMath<kSurrogate>::adjoint(y, da);
  }
}

// surrogate_value and surrogate_adjoint, for a surrogate that is known only at run time.
template <int kId = 0, class Real>
ASGL_HOST_DEVICE Real any_surrogate_value(Surrogate given, Real levels, Real y) {
  if constexpr (kId + 1 < kNumSurrogates) {
    if (static_cast<int>(given) != kId) return any_surrogate_value<kId + 1>(given, levels, y);
  }
  return surrogate_value<static_cast<Surrogate>(kId)>(levels, y);
}
template <int kId = 0, class Real>
ASGL_HOST_DEVICE Real any_surrogate_adjoint(Surrogate given, Real levels, Real y, Real da) {
  if constexpr (kId + 1 < kNumSurrogates) {
    if (static_cast<int>(given) != kId) return any_surrogate_adjoint<kId + 1>(given, levels, y, da);
  }
  return surrogate_adjoint<static_cast<Surrogate>(kId)>(levels, y, da);
}

}  // namespace asgl
