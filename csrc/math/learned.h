// A learned width is stored as its logarithm, a learned decay as its logit. Kernels convert stored values where they
// read them, so that the conversion needs no launch of its own. The operations are those of
// asgl_cuda/reference/learned.py, for equal bits.
#pragma once

#include "math/float_math.h"

namespace asgl {

constexpr int kLearnedBound = 15;  // of the absolute value of the logarithm and the logit

// Clamps a stored value to the bound, because a step of an optimizer may move it beyond. NaN stays NaN.
template <class Real>
ASGL_HOST_DEVICE Real clamp_to_bound(Real x) {
  const Real from_below = x < Real(-kLearnedBound) ? Real(-kLearnedBound) : x;
  return from_below > Real(kLearnedBound) ? Real(kLearnedBound) : from_below;
}

// e^x of the clamped x.
ASGL_HOST_DEVICE float exp_within_bound(float x) { return float_math::exp(clamp_to_bound(x)); }

// e^x of the clamped x, with the range reduction of float_math::exp. The power series ends with r^13 / 13!, and its
// remainder is below 5e-18. One factor 2^n suffices, because x is bounded.
ASGL_HOST_DEVICE double exp_within_bound(double given) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  const double x = clamp_to_bound(given);
  const double shifted = x * 1.4426950408889634 + kShift;
  const double n = shifted - kShift;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double factorial = 6227020800.0, q = 1.0 / factorial;
  for (int k = 13; k > 2; --k) {
    factorial /= k;
    q = q * r + 1.0 / factorial;
  }
  const double p = 1.0 + (r + (r * r) * q);
  return p * bit_cast<double>((bit_cast<uint64>(shifted) - bit_cast<uint64>(kShift) + 1023) << 52);
}

// The sigmoid of the clamped x.
template <class Real>
ASGL_HOST_DEVICE Real sigmoid_within_bound(Real x) {
  return Real(1) / (Real(1) + exp_within_bound(-x));
}

}  // namespace asgl
