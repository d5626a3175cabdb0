// Arguments of the kernel that sums the parameters' gradients.
#pragma once

#include "params/neuron.h"

namespace asgl {

// Chain-rule factor still to be applied to the partial sums, gradients of 1 / width and of the decay.
enum class Derivative { kNone, kOfWidth, kOfLogWidth, kOfLogitDecay };

// From the partial sums of one parameter to its gradient.
template <class Real>
struct GradientPart {
  GradientPartials<Real> partials;
  ParameterView<Real> parameter;
  Derivative derivative;
  // Set by plan_tiles() of CUDA. Powers of two: the elements, runs of each and slots of each run that a block sums in
  // parallel.
  int elements_each, runs_each, slots_each;
  int64 blocks;
  Real* gradient;  // [T or 1, count]

  ASGL_HOST_DEVICE int64 elements(const SequenceShape& shape) const {
    return (parameter.step_stride != 0 ? shape.steps : 1) * parameter.count;
  }

  ASGL_HOST_DEVICE void store(int64 element, double total) const {
    gradient[element] =
        derivative == Derivative::kNone ? static_cast<Real>(total) : of_given(total, parameter.data[element]);
  }

 private:
  // Rounded as in autograd of exp and sigmoid.
  ASGL_HOST_DEVICE Real of_given(double total, Real given) const {
    if (derivative == Derivative::kOfLogitDecay) {
      const Real decay = sigmoid_within_bound(given);
      return (static_cast<Real>(total) * (Real(1) - decay)) * decay;
    }
    const Real width = derivative == Derivative::kOfLogWidth ? exp_within_bound(given) : given;
    const Real of_width = static_cast<Real>(gradient_of_width(total, static_cast<double>(width)));
    return derivative == Derivative::kOfLogWidth ? of_width * width : of_width;
  }
};

// The gradients of all parameters, summed in one launch.
template <class Real>
struct GradientSum {
  SequenceShape shape;
  int64 tile;  // neurons
  int count;   // number of parts
  GradientPart<Real> parts[kNumParameters];
};

}  // namespace asgl
