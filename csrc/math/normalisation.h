// Batch normalisation: the moments of each channel, the neuron's input parameters derived from them, and the adjoint
// from the normalised input to the input. Values per channel are computed in float64, and values per element in Real.
#pragma once

#include "math/half_types.h"
#include "math/pair.h"

namespace asgl {

namespace math {

#if defined(__CUDA_ARCH__)
ASGL_HOST_DEVICE double sqrt(double x) { return ::sqrt(x); }
#else
ASGL_HOST_DEVICE double sqrt(double x) { return __builtin_sqrt(x); }
#endif

}  // namespace math

// Moments of a subset of a channel's values, with the biased variance.
struct Moments {
  double count, mean, variance;
};

// The moments of the union of two subsets (Chan, Golub, LeVeque 1979).
ASGL_HOST_DEVICE Moments merge_moments(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0) return a;
  const double share = b.count / count, distance = b.mean - a.mean;
  return {count, a.mean + share * distance,
          (1 - share) * a.variance + share * b.variance + share * (1 - share) * (distance * distance)};
}

// Moments from the sums of x - shift and (x - shift)^2. If the shift is one of the values, offset^2 is at most `count`
// times the variance. The subtraction then loses at most about as many digits as `count` has, which float64 can spare
// and float32 cannot.
ASGL_HOST_DEVICE Moments moments_from_shifted_sums(double count, double shift, double sum, double squares) {
  if (count == 0) return {0, 0, 0};
  const double offset = sum / count, variance = squares / count - offset * offset;
  return {count, shift + offset, variance < 0 ? 0 : variance};  // NaN stays NaN
}

struct NormalisationOptions {
  double eps;
  double input_scale;  // factor of the normalised input, see Coefficients

  // 1 / sqrt(variance + eps)
  ASGL_HOST_DEVICE double inverse_deviation(const Moments& moments) const {
    return 1 / math::sqrt(moments.variance + eps);
  }
};

// Rows of a tensor [kNumCoefficients, channels].
enum Coefficient { kCoefficientMean, kCoefficientGain, kCoefficientBias, kCoefficientVariance };
constexpr int kNumCoefficients = 4;

// The neuron's input parameters of a channel. The neuron computes the normalised input
//   c = input_scale * (weight * (x - mean) / sqrt(variance + eps) + shift)
// as c = gain * (x - rounded_mean) + bias, where the bias corrects the rounding of the mean. gain * x + bias would lose
// digits to cancellation.
template <class Real>
struct Coefficients {
  Real mean, gain, bias;
  Real variance;  // unbiased

  ASGL_HOST_DEVICE Coefficients(const Moments& moments, double weight, double shift,
                                const NormalisationOptions& options) {
    const double exact_gain = options.input_scale / math::sqrt(moments.variance + options.eps) * weight;
    mean = static_cast<Real>(moments.mean);
    gain = static_cast<Real>(exact_gain);
    bias = static_cast<Real>(-exact_gain * (moments.mean - static_cast<double>(mean)) + options.input_scale * shift);
    variance = static_cast<Real>(moments.variance * (moments.count / (moments.count - 1)));
  }
};

// The sums over a channel of dh * (x - rounded_mean) and of dh, the gradient of c.
struct GradientSums {
  double gain, bias;
};

// With S = sum dh xhat, xhat = (x - mean) / sqrt(variance + eps), M values in all:
//   d weight = input_scale * S,   d shift = input_scale * sum dh
//   dx = gain * (dh - sum dh / M - xhat * S / M) = gain * dh + slope * (x - rounded_mean) + offset
template <class Real>
struct NormalisationAdjoint {
  Real slope, offset;

  ASGL_HOST_DEVICE NormalisationAdjoint(const Moments& moments, double rounded_mean, double gain,
                                        const GradientSums& total, const NormalisationOptions& options) {
    const double exact_slope =
        -gain * options.inverse_deviation(moments) * sum_dh_xhat(moments, rounded_mean, total, options) / moments.count;
    slope = static_cast<Real>(exact_slope);
    offset = static_cast<Real>(-gain * total.bias / moments.count - exact_slope * (moments.mean - rounded_mean));
  }

  // S = sum dh xhat, from the sums of dh * (x - rounded_mean) and of dh.
  static ASGL_HOST_DEVICE double sum_dh_xhat(const Moments& moments, double rounded_mean, const GradientSums& sums,
                                             const NormalisationOptions& options) {
    return (sums.gain - (moments.mean - rounded_mean) * sums.bias) * options.inverse_deviation(moments);
  }
};

// dx, from gain * dh and x, with the channel's slope and offset of NormalisationAdjoint.
template <class Real>
ASGL_HOST_DEVICE Real normalisation_adjoint(Real gain_dh, Real x, Real mean, Real slope, Real offset) {
  return gain_dh + (slope * (x - mean) + offset);
}

}  // namespace asgl
