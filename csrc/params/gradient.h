// Arguments of the kernel that sums the parameters' gradients.
#pragma once

#include "params/neuron.h"

namespace asgl {

constexpr int kSumThreads = 512;       // threads of a CUDA block
constexpr int kElementsPerThread = 4;  // elements of a thread, if there are many elements and few runs

// How the sum of the partial sums becomes the gradient of a stored parameter. The partial sums are gradients of the
// decay and of 1 / width. Stored are the decay or its logit, and the width or its logarithm.
enum class Derivative { kNone, kOfWidth, kOfLogWidth, kOfLogitDecay };

// The Derivative for parameter `id`, given how width and decay are stored.
ASGL_HOST_DEVICE Derivative derivative_of(int id, bool log_width, bool logit_decay) {
  if (id == kWidth) return log_width ? Derivative::kOfLogWidth : Derivative::kOfWidth;
  return id == kDecay && logit_decay ? Derivative::kOfLogitDecay : Derivative::kNone;
}

// Multiplies the total of the partial sums by the chain-rule factor. `stored` is the width or decay as stored. The
// result is rounded as autograd of exp and sigmoid rounds it.
template <class Real>
ASGL_HOST_DEVICE Real apply_chain_rule(Derivative derivative, double total, Real stored) {
  if (derivative == Derivative::kOfLogitDecay) {
    const Real decay = sigmoid_within_bound(stored);
    return (static_cast<Real>(total) * (Real(1) - decay)) * decay;
  }
  const Real width = derivative == Derivative::kOfLogWidth ? exp_within_bound(stored) : stored;
  const Real width_gradient = static_cast<Real>(gradient_of_width(total, static_cast<double>(width)));
  return derivative == Derivative::kOfLogWidth ? width_gradient * width : width_gradient;
}

// The gradient of one parameter, to be summed from its partial sums.
template <class Real>
struct GradientPart {
  GradientPartials<Real> partials;
  ParameterView<Real> parameter;
  Derivative derivative;
  Real* gradient;  // [T or 1, count]
  int64 neurons;   // slots of a row, if a run is one neuron
  // plan_tiles() of CUDA sets these three powers of two: how many elements a block sums, how many runs of each element
  // at a time, and how many slots of each run at a time.
  int elements_each, runs_each, slots_each;
  int splits;    // of the runs; if there are several, each stores a total, and a second launch sums the totals
  int64 blocks;  // blocks of a split
  Real* totals;  // [splits, T or 1, count], set by place_totals()

  // The number of elements of the gradient.
  ASGL_HOST_DEVICE int64 num_elements(const SequenceShape& shape) const {
    return (parameter.step_stride != 0 ? shape.steps : 1) * parameter.count;
  }

  // Stores an element of the gradient, from the total of its partial sums.
  ASGL_HOST_DEVICE void store(int64 element, double total) const {
    gradient[element] = derivative == Derivative::kNone ? static_cast<Real>(total)
                                                        : apply_chain_rule(derivative, total, parameter.data[element]);
  }

  // The number of totals that the first launch stores: none unless runs are split.
  ASGL_HOST_DEVICE int64 num_totals(const SequenceShape& shape) const {
    return splits > 1 ? splits * num_elements(shape) : 0;
  }

  // The part of the second launch that computes this gradient. Its slots are the totals of the first launch.
  ASGL_HOST_DEVICE GradientPart second_launch_part(const SequenceShape& shape) const {
    const int64 number = num_totals(shape);
    return {{totals, number}, {parameter.data, 0, 0, 1, num_elements(shape)}, derivative, gradient, number};
  }
};

// The gradients of all parameters, summed in one launch, or two if runs are split.
template <class Real>
struct GradientSum {
  SequenceShape shape;
  int64 tile;  // neurons per tile
  int count;   // the number of parts
  GradientPart<Real> parts[kNumParameters];

  // The number of totals of all parts.
  ASGL_HOST_DEVICE int64 num_totals() const {
    int64 number = 0;
    for (int id = 0; id < count; ++id) number += parts[id].num_totals(shape);
    return number;
  }

  // Lets the first launch store its totals in `memory`. Returns the arguments of the second launch, which have no parts
  // if no runs are split.
  ASGL_HOST_DEVICE GradientSum place_totals(Real* memory) {
    GradientSum second{shape, /*tile=*/1, /*count=*/0, {}};  // one total per tile, so that no value repeats in a tile
    for (int id = 0; id < count; ++id) {
      if (parts[id].splits <= 1) continue;
      parts[id].totals = memory;
      memory += parts[id].num_totals(shape);
      second.parts[second.count++] = parts[id].second_launch_part(shape);
    }
    return second;
  }
};

}  // namespace asgl
