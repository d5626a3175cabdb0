// Sums with about 48 bits of precision, by float32 arithmetic on pairs of floats. On many GPUs float64 runs at 1/64 of
// the rate of float32.
#pragma once

#include "math/host_device.h"

namespace asgl {

namespace math {

#if defined(__CUDA_ARCH__)
ASGL_HOST_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ASGL_HOST_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
ASGL_HOST_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
ASGL_HOST_DEVICE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

// The value with only the first 16 bits of its significand, the others being 0. A double is returned as it is.
ASGL_HOST_DEVICE float shortened_significand(float x) { return bit_cast<float>(bit_cast<uint32>(x) & 0xFFFFFF00u); }
ASGL_HOST_DEVICE double shortened_significand(double x) { return x; }

}  // namespace math

// The unevaluated sum high + low, where |low| is at most half an ulp of high.
struct Pair {
  float high, low;

  // a + b, exactly (Knuth 1969).
  static ASGL_HOST_DEVICE Pair two_sum(float a, float b) {
    const float high = a + b, rest = high - a;
    return {high, (a - (high - rest)) + (b - rest)};
  }
  // a + b, exactly, for |a| >= |b| (Dekker 1971).
  static ASGL_HOST_DEVICE Pair fast_two_sum(float a, float b) {
    const float high = a + b;
    return {high, b - (high - a)};
  }
};

ASGL_HOST_DEVICE Pair operator+(const Pair& a, float b) {
  const Pair sum = Pair::two_sum(a.high, b);
  return Pair::fast_two_sum(sum.high, sum.low + a.low);
}
ASGL_HOST_DEVICE Pair operator+(const Pair& a, const Pair& b) {
  const Pair sum = Pair::two_sum(a.high, b.high);
  return Pair::fast_two_sum(sum.high, sum.low + (a.low + b.low));
}
ASGL_HOST_DEVICE Pair operator*(float a, const Pair& b) {
  const float high = a * b.high;
  return Pair::fast_two_sum(high, math::fma(a, b.high, -high) + a * b.low);
}
ASGL_HOST_DEVICE Pair operator*(const Pair& a, const Pair& b) {
  const float high = a.high * b.high;
  return Pair::fast_two_sum(high, math::fma(a.high, b.high, -high) + (a.high * b.low + a.low * b.high));
}

// a - b, exact for float.
ASGL_HOST_DEVICE Pair difference(float a, float b) { return Pair::two_sum(a, -b); }
ASGL_HOST_DEVICE double difference(double a, double b) { return a - b; }

ASGL_HOST_DEVICE double as_double(const Pair& a) { return static_cast<double>(a.high) + static_cast<double>(a.low); }
ASGL_HOST_DEVICE double as_double(double a) { return a; }

// The type in which long sums of values of type Real are added up.
template <class Real>
struct LongSum {
  using Type = Pair;
};
template <>
struct LongSum<double> {
  using Type = double;
};
template <class Real>
using LongSum_t = typename LongSum<Real>::Type;

}  // namespace asgl
