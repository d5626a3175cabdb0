// The launchers, the bridge between operators and kernels. They check nothing: ops.h has.
#pragma once

#include "lif_params.h"

namespace asgl {

// How a backend cuts the neurons into tiles, which fixes the size of GradientPartials.
struct TilePlan {
  int64 tile;   // neurons a tile
  int64 tiles;  // in all
};

namespace cpu {

int num_threads();

TilePlan backward_tiles(const SequenceShape& shape);

template <class Scalar>
void launch_forward(Surrogate surrogate, bool hard_reset, const ForwardParams<Scalar>& params);

template <class Scalar>
void launch_backward(Surrogate surrogate, bool hard_reset, const BackwardParams<Scalar>& params);

template <class Real>
void launch_gradient_sum(const GradientSum<Real>& sum);

}  // namespace cpu
}  // namespace asgl
