// The launchers of the neuron and of its gradient sums. backends/neuron_kernels.py decides the same in Python.
// launch_*.cu instantiate them, one file a type, so that they compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/adaptive_kernels.cuh"
#include "cuda/plan_neurons.cuh"
#include "launch.h"

namespace asgl::cuda {

template <class Scalar>
cudaError_t plan_on(Device, ForwardParams<Scalar>& params) {
  const bool grouped = groups_of_four(params, params.residual, params.s_seq, params.v_last, params.v_seq, params.h_seq,
                                      params.checkpoints);
  return plan_neurons(params, grouped && fit_parameters(params) && !params.options.adapts());
}

template <class Scalar>
cudaError_t plan_on(Device, BackwardParams<Scalar>& params) {
  const bool grouped = groups_of_four(params, params.residual, params.grad_s_seq, params.grad_v_last, params.grad_v_seq,
                                      params.grad_h_seq, params.checkpoints, params.grad_x_seq, params.grad_v_init,
                                      params.grad_residual);
  return plan_with_sums(params, grouped && fit_parameters(params) && !params.options.adapts());
}

// Calls f(lanes, input), with the neurons a thread and the input of the kernel as constants. With one neuron a thread,
// the normalised kernel computes plain input, too, and the general one any with a residual.
template <class Scalar, class Params, class F>
void with_kind(const Params& params, F&& f) {
  const auto with_lanes = [&](auto lanes) {
    const Input input = input_of(params);
    if (input == Input::kGeneral) return f(lanes, std::integral_constant<Input, Input::kGeneral>{});
    if constexpr (lanes() == 4) {
      if (!share_parameters(params)) return f(lanes, std::integral_constant<Input, Input::kApart>{});
      if (input == Input::kPlain) return f(lanes, std::integral_constant<Input, Input::kPlain>{});
      if (input == Input::kNormalisedResidual) {
        return f(lanes, std::integral_constant<Input, Input::kNormalisedResidual>{});
      }
    }
    if (params.residual != nullptr) return f(lanes, std::integral_constant<Input, Input::kGeneralResidual>{});
    f(lanes, std::integral_constant<Input, Input::kNormalised>{});
  };
  if constexpr (kHasFours<Scalar>) {
    if (params.tiles.tile > kBlockThreads) return with_lanes(std::integral_constant<int, 4>{});
  }
  with_lanes(std::integral_constant<int, 1>{});
}

// The input of the general kernel that runs in place of another.
template <Input kInput>
constexpr Input kAnyInput = kHasResidual<kInput> ? Input::kGeneralResidual : Input::kGeneral;

template <class Model, class Scalar>
cudaError_t launch(Model, const ForwardParams<Scalar>& params, cudaStream_t stream) {
  void (*kernel)(ForwardParams<Scalar>) = nullptr;
  with_kind<Scalar>(params, [&](auto lanes, auto input) {
    if constexpr (Model::kOnlyGeneral || kIsGeneral<input()>) {
      kernel = &lif_forward_kernel<Scalar, LIFByOptions<Real_t<Scalar>>, lanes(), kAnyInput<input()>, 0>;
    } else {
      kernel = &lif_forward_kernel<Scalar, Model, lanes(), input(), 0>;
      if constexpr (lanes() == 4) {
        if (params.shape.steps == kShortSequence) {
          kernel = &lif_forward_kernel<Scalar, Model, 4, input(), kShortSequence>;
        }
      }
    }
  });
  return start(kernel, params.tiles.count, kBlockThreads, params, stream);
}

template <class Model, class Scalar>
cudaError_t launch(Model, const BackwardParams<Scalar>& params, cudaStream_t stream) {
  void (*kernel)(BackwardParams<Scalar>) = nullptr;
  with_kind<Scalar>(params, [&](auto lanes, auto input) {
    if constexpr (Model::kOnlyGeneral || kIsGeneral<input()>) {
      kernel = &lif_backward_kernel<Scalar, lanes(), kAnyInput<input()>>;
    } else {
      kernel = &lif_backward_settled_kernel<Scalar, Model, lanes(), input(), 0>;
      if constexpr (lanes() == 4) {
        if (params.shape.steps == kShortSequence) {
          kernel = &lif_backward_settled_kernel<Scalar, Model, 4, input(), kShortSequence>;
        }
      }
    }
  });
  return start(kernel, params.tiles.count, kBlockThreads, params, stream);
}

template <class Scalar>
cudaError_t launch_on(Device, const ForwardParams<Scalar>& params, cudaStream_t stream) {
  if (params.options.adapts()) {
    return start(&adaptive_forward_kernel<Scalar>, params.tiles.count, kBlockThreads, params, stream);
  }
  cudaError_t error = cudaErrorInvalidValue;
  with_model(params.options, [&](auto model) { error = launch(model, params, stream); });
  return error;
}

template <class Scalar>
cudaError_t launch_on(Device, const BackwardParams<Scalar>& params, cudaStream_t stream) {
  if (params.options.adapts()) {
    return start(&adaptive_backward_kernel<Scalar>, params.tiles.count, kBlockThreads, params, stream);
  }
  cudaError_t error = cudaErrorInvalidValue;
  with_model(params.options, [&](auto model) { error = launch(model, params, stream); });
  return error;
}

// An element is the sum of its runs' slots, one for each tile that a run overlaps. If a run has few slots, a block sums
// several elements. Runs are split where a second launch takes less time than a thread for all of its runs.
template <class Real>
cudaError_t plan_on(Device, GradientSum<Real>& sum) {
  constexpr int64 kManySlots = 8;
  constexpr int64 kMostRunsEach = 16, kFewRuns = 8, kManyThreads = 131072;
  constexpr int64 kRuns = 16, kSingleRuns = 128;  // a thread's where split; loads of single neurons overlap
  constexpr int64 kMostSplits = 2048;
  for (int id = 0; id < sum.count; ++id) {
    GradientPart<Real>& part = sum.parts[id];
    if (part.parameter.repeats_in(sum.tile)) part.neurons = blocks_for(part.neurons, sum.tile) * part.parameter.count;
    const int64 inner = part.parameter.inner, runs = part.neurons / (inner * part.parameter.count);
    const int64 slots = (inner + sum.tile - 2) / sum.tile + 1;  // most slots of a run
    const auto largest_power = [](int64 most) {
      int power = 1;
      while (2 * power <= most) power *= 2;
      return power;
    };
    if (slots >= kManySlots) {
      part.elements_each = 1;
      part.slots_each = largest_power(slots < kSumThreads ? slots : kSumThreads);
      part.runs_each = kSumThreads / part.slots_each;
    } else {
      part.slots_each = 1;
      const int64 enough = blocks_for(kManyThreads, part.elements(sum.shape));
      part.runs_each = largest_power(std::min({runs, kMostRunsEach, enough}));
      part.elements_each = kSumThreads / part.runs_each;
      const bool single = inner == 1 && part.parameter.step_stride == 0;
      if (single && runs <= kFewRuns && part.parameter.count >= kElementsEach * kManyThreads) {
        part.elements_each = kElementsEach * kSumThreads;
      }
    }
    part.blocks = blocks_for(part.elements(sum.shape), part.elements_each);
    const int64 splits = blocks_for(runs, part.runs_each * (inner == 1 ? kSingleRuns : kRuns));
    part.splits = splits > 2 ? static_cast<int>(std::min(splits, kMostSplits)) : 1;
  }
  return cudaSuccess;
}

template <class Real>
cudaError_t launch_on(Device, const GradientSum<Real>& sum, cudaStream_t stream) {
  int64 blocks = 0;
  for (int id = 0; id < sum.count; ++id) blocks += sum.parts[id].splits * sum.parts[id].blocks;
  return start(&gradient_sum_kernel<Real>, blocks, kSumThreads, sum, stream);
}

}  // namespace asgl::cuda
