// Chooses between the settled and the general kernels (cpu/neuron.h), sums the gradients of parameters over tiles, and
// instantiates the general kernels for neurons without adaptation.
#include "cpu/neuron.h"

#include <vector>

#include "cpu/models.h"

namespace asgl::cpu {
namespace {

// Whether the settled kernels have all inputs and outputs that a call needs. In forward, they do not return v_seq or
// h_seq. In backward, they do not take gradients of v_seq or h_seq, and do not compute the gradient of v_reset.
// is_settled checks the other conditions.
template <class Scalar>
bool settled_suffices(const ForwardParams<Scalar>& params) {
  return params.v_seq == nullptr && params.h_seq == nullptr;
}
template <class Scalar>
bool settled_suffices(const BackwardParams<Scalar>& params) {
  return params.grad_v_seq == nullptr && params.grad_h_seq == nullptr &&
         !(params.wants_gradient(kReset) && params.options.hard_reset);
}

// Whether no parameter wants a gradient, except the width, input_gain and input_bias. Always true in forward.
template <class Scalar>
bool wants_only_input_and_width(const BackwardParams<Scalar>& params) {
  return !params.wants_gradient(kDecay) && !params.wants_gradient(kThreshold) && !params.wants_gradient(kReset) &&
         !params.wants_gradient(kInputMean);
}
bool wants_only_input_and_width(const auto&) { return true; }

// Whether the settled kernels compute the call. If the input has a gain, bias or mean, the other parameters must be
// uniform, and only width, gain and bias may want gradients. The settled and the general kernels add the terms of the
// gradients of gain and bias in different orders, so the last bits of these gradients depend on the kernel.
template <class Params>
bool is_settled(const Params& params) {
  if (params.options.has_optional_rules()) return false;
  if (!params.is_input_plain()) {
    return wants_only_input_and_width(params) && settled_suffices(params) && !params.options.scale_output &&
           params.input_assumption() == Input::kNormalised && all_uniform(params.parameters, kInputGain);
  }
  return !is_per_step(params) && settled_suffices(params) && params.options.v_rest == 0 && !params.options.scale_output;
}

// Runs the fastest kernel that can compute the call, for the model that the options select.
template <class Params>
void run_kernel(Params params) {
  params.noise = params.noise.resolved();
  if (params.options.has_adaptation()) return run_adaptive_kernel(params);
  if constexpr (std::is_same_v<typename Params::Real, float>) {
    if (is_settled(params)) return run_settled_kernel(params);
  }
  with_model(params.options, [&](auto model) { run_general_pass<decltype(model)>(params); });
}

// Computes and stores the gradient of a parameter whose values repeat within a tile, as one value per channel does in
// channels_last. Adds the partial sums in memory order.
template <class Real>
void sum_interleaved(const GradientSum<Real>& sum, const GradientPart<Real>& part) {
  const int64 count = part.parameter.count;
  std::vector<double> totals(static_cast<size_t>(count), 0.0);
  for (int64 index = 0; index < num_tiles(sum.shape); ++index) {
    const Tile tile(sum.shape, index);
    const Real* slots = part.partials.data + tile.first;
    const int64 used = std::min(count, tile.length), turn = tile.first % count,
                before_turn = std::min(used, count - turn);
    run<AddLoop<Real>>({slots, totals.data() + turn, before_turn});
    run<AddLoop<Real>>({slots + before_turn, totals.data(), used - before_turn});
  }
  for (int64 element = 0; element < count; ++element) part.store(element, totals[static_cast<size_t>(element)]);
}

// Computes and stores `length` adjacent elements of a parameter's gradient, from `element` on. These are at most kTile
// elements, all of one step. For each element, adds the partial sums in memory order: run by run, and within a run tile
// by tile.
template <class Real>
void sum_runs(const GradientSum<Real>& sum, const GradientPart<Real>& part, int64 element, int64 length) {
  const ParameterView<Real>& parameter = part.parameter;
  const int64 inner = parameter.inner, step = element / parameter.count, first = element % parameter.count;
  const Real* slots = part.partials.data + step * part.partials.slots;
  std::array<double, kTile> totals{};
  for (int64 run = first; run * inner < sum.shape.neurons(); run += parameter.count) {
    if (inner == 1) {
      asgl::cpu::run<AddLoop<Real>>({slots + run, totals.data(), length});
      continue;
    }
    int64 tile = run * inner / sum.tile;
    for (int64 i = 0; i < length; ++i) {
      const int64 end = (run + i + 1) * inner;
      totals[i] += static_cast<double>(slots[run + i + tile]);
      for (; (tile + 1) * sum.tile < end; ++tile) totals[i] += static_cast<double>(slots[run + i + tile + 1]);
      tile += (tile + 1) * sum.tile == end;
    }
  }
  for (int64 i = 0; i < length; ++i) part.store(element + i, totals[i]);
}

}  // namespace

template <class Real>
void plan_tiles_on(Device, GradientSum<Real>&) {}

template <class Scalar>
void launch_kernel(Device, const ForwardParams<Scalar>& params) {
  if (params.zeros != nullptr) std::fill_n(params.zeros, 2, Real_t<Scalar>(0));
  run_kernel(params);
}

template <class Scalar>
void launch_kernel(Device, const BackwardParams<Scalar>& params) {
  run_kernel(params);
}

// Computes and stores each parameter's gradient from its partial sums.
template <class Real>
void launch_kernel(Device, const GradientSum<Real>& sum) {
  for (int id = 0; id < sum.count; ++id) {
    const GradientPart<Real>& part = sum.parts[id];
    if (is_interleaved(part.parameter)) {
      sum_interleaved(sum, part);
      continue;
    }
    at::parallel_for(0, part.num_elements(sum.shape), 2048, [&](int64_t begin, int64_t end) {
      const int64 count = part.parameter.count;
      for (int64 element = begin; element < end;) {
        const int64 length = std::min({kTile, end - element, count - element % count});
        sum_runs(sum, part, element, length);
        element += length;
      }
    });
  }
}

template void plan_tiles(ForwardParams<Half>&);
template void plan_tiles(ForwardParams<BFloat16>&);
template void plan_tiles(ForwardParams<float>&);
template void plan_tiles(ForwardParams<double>&);
template void plan_tiles(BackwardParams<Half>&);
template void plan_tiles(BackwardParams<BFloat16>&);
template void plan_tiles(BackwardParams<float>&);
template void plan_tiles(BackwardParams<double>&);
template void launch(const ForwardParams<Half>&);
template void launch(const ForwardParams<BFloat16>&);
template void launch(const ForwardParams<float>&);
template void launch(const ForwardParams<double>&);
template void launch(const BackwardParams<Half>&);
template void launch(const BackwardParams<BFloat16>&);
template void launch(const BackwardParams<float>&);
template void launch(const BackwardParams<double>&);
template void plan_tiles(GradientSum<float>&);
template void plan_tiles(GradientSum<double>&);
template void launch(const GradientSum<float>&);
template void launch(const GradientSum<double>&);

}  // namespace asgl::cpu
