// Plans every launch. plan_tiles divides values among threads, and launch_of chooses the kernel and the number of
// blocks. This is host code that includes no CUDA header. `resident` returns the number of threads that the device can
// hold at a time. It is called only if the plan depends on this number.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/kernel.h"

namespace asgl::cuda {

// number / by, rounded up.
inline int64 ceil_div(int64 number, int64 by) { return (number + by - 1) / by; }

// Whether an array is aligned so that one access can read or write four elements; true for null.
template <class Element>
bool is_aligned_for_four(const Element* first) {
  return reinterpret_cast<unsigned long>(first) % (4 * sizeof(Element)) == 0;
}

// ---- neurons and integrators ----

// What this call allows its kernel to assume about the parameters. launch_of may choose a kernel that assumes less. The
// result is general if input_assumption() is, if outputs beyond spikes are wanted, or from kDividendLimit neurons on.
template <class Params>
Input input_of(const Params& params) {
  const bool indexed = params.shape.neurons() < kDividendLimit;
  const Input input = params.outputs_only_spikes() && indexed ? params.input_assumption() : Input::kGeneral;
  if (params.residual == nullptr) return input;
  return input == Input::kGeneral ? Input::kGeneralResidual : Input::kNormalisedResidual;
}

// Whether each group of four neurons that begins at a multiple of four shares all parameters.
template <class Scalar>
bool fours_share_parameters(const LIFParams<Scalar>& params) {
  bool shared = true;
  for (const auto& parameter : params.parameters) shared = shared && parameter.is_shared_by_four();
  return shared;
}

// Whether the parameters allow a thread to compute four neurons. They do if the four share every parameter. If the
// input is plain or normalised, the four may also differ in parameters whose values for adjacent neurons are adjacent
// and aligned in memory, because there are kernels for Input::kApart.
template <class Params>
bool parameters_fit_four_lanes(const Params& params) {
  const bool shared = fours_share_parameters(params);
  const Input input = input_of(params);
  if (shared || (input != Input::kPlain && input != Input::kNormalised)) return shared;
  bool fit = true;
  for (const auto& parameter : params.parameters) {
    const bool adjacent = parameter.inner == 1 && parameter.count % 4 == 0 && is_aligned_for_four(parameter.data);
    fit = fit && (parameter.is_shared_by_four() || adjacent);
  }
  return fit;
}

// Whether x_seq, v_init and the given tensors allow a thread to compute four neurons. In each of these tensors, the
// elements of the four neurons must be adjacent and aligned, so that one access reads or writes all four.
template <class Scalar, class... Pointers>
bool tensors_fit_four_lanes(const LIFParams<Scalar>& params, const Pointers&... sequences_and_states) {
  return params.shape.inner % 4 == 0 && is_aligned_for_four(params.x_seq) && is_aligned_for_four(params.v_init) &&
         (is_aligned_for_four(sequences_and_states) && ...);
}

// Whether a launch with four neurons per thread should be faster than with one.
template <class Params, class Resident>
bool four_lanes_are_faster(const Params& params, const Resident& resident) {
  const Input input = input_of(params);
  const bool general = input == Input::kGeneral || input == Input::kGeneralResidual;
  if (!general && params.shape.steps <= kCheckpointSteps) return true;
  const int64 threads = resident(), neurons = params.shape.neurons();
  // General kernels use four neurons per thread if such threads fill at least a quarter of the device. Fewer threads
  // then suffice, because each has more bytes in flight. kOccupancySixteenths explains the rule for other kernels.
  return general ? neurons / 4 >= threads / 4 : neurons > kOccupancySixteenths * threads / 16;
}

// The summary of the parameters, apart from `wanted`. All its fields are zero for kDividendLimit neurons or more.
// General kernels then run, and they read only `wanted`.
template <class Scalar>
ParameterSummary summary_of(const LIFParams<Scalar>& params) {
  ParameterSummary summary{};
  if (params.shape.neurons() >= kDividendLimit) return summary;
  summary.alike = true;
  int64 inner = 1, count = 1;  // those of the first parameter that differs between neurons
  for (int id = 0; id < kNumParameters; ++id) {
    const auto& parameter = params.parameters[id];
    if (parameter.data != nullptr) summary.tensors |= 1u << id;
    if (parameter.is_same_for_all()) continue;
    if (count == 1) inner = parameter.inner, count = parameter.count;
    summary.alike = summary.alike && parameter.inner == inner && parameter.count == count;
    summary.strides[id] = 1;
    if (parameter.inner == 1) summary.by_neuron |= static_cast<uint8>(1u << id);
  }
  const auto index = [](int64 inner, int64 count) { return NeuronIndex{Divisor::make(inner), Divisor::make(count)}; };
  summary.common = index(inner, count);
  for (int id = 0; id < kNumParameters && !summary.alike; ++id) {
    summary.own[id] = index(params.parameters[id].inner, params.parameters[id].count);
  }
  return summary;
}

// Sets the summary and the tiles. A block computes a tile, with one or four neurons per thread. `grouped` says whether
// four are possible.
template <class Params, class Resident>
void plan_neuron_tiles(Params& params, bool grouped, const Resident& resident) {
  params.summary = summary_of(params);
  using Scalar = std::remove_const_t<std::remove_pointer_t<decltype(params.x_seq)>>;
  const bool fours = kHasFourLanes<Scalar> && grouped && four_lanes_are_faster(params, resident);
  params.tiles.tile = fours ? 4 * kBlockThreads : kBlockThreads;
  params.tiles.count = ceil_div(params.shape.neurons(), params.tiles.tile);
}

// Plans the tiles by plan_neuron_tiles, and sets which parameters want gradients.
template <class Params, class Resident>
void plan_tiles_and_gradients(Params& params, bool grouped, const Resident& resident) {
  plan_neuron_tiles(params, grouped, resident);
  for (int id = 0; id < kNumParameters; ++id) {
    params.summary.wanted |= static_cast<uint32>(params.wants_gradient(id)) << id;
  }
}

// Sets the tiles and the summary of a call of the neuron or the integrator. The kernels of adaptive neurons have two
// states, and compute one neuron per thread. The integrator has no kernels for kApart.
template <class Scalar, class Resident>
void plan_tiles(ForwardParams<Scalar>& params, const Resident& resident) {
  const bool grouped = tensors_fit_four_lanes(params, params.residual, params.s_seq, params.v_last, params.v_seq,
                                              params.h_seq, params.checkpoints);
  plan_neuron_tiles(params, grouped && parameters_fit_four_lanes(params) && params.options.num_states() == 1, resident);
}

template <class Scalar, class Resident>
void plan_tiles(BackwardParams<Scalar>& params, const Resident& resident) {
  const bool grouped = tensors_fit_four_lanes(params, params.residual, params.grad_s_seq, params.grad_v_last,
                                              params.grad_v_seq, params.grad_h_seq, params.checkpoints,
                                              params.grad_x_seq, params.grad_v_init, params.grad_residual);
  plan_tiles_and_gradients(params, grouped && parameters_fit_four_lanes(params) && params.options.num_states() == 1,
                           resident);
}

template <class Scalar, class Resident>
void plan_tiles(IntegratorParams<Scalar>& params, const Resident& resident) {
  const bool grouped = tensors_fit_four_lanes(params, params.v_seq, params.v_last, params.grad_v_seq,
                                              params.grad_v_last, params.grad_x_seq, params.grad_v_init);
  plan_tiles_and_gradients(params, grouped && fours_share_parameters(params), resident);
}

// The number of neurons per thread that plan_tiles has chosen.
template <class Scalar>
int lanes_of(const LIFParams<Scalar>& params) {
  return kHasFourLanes<Scalar> && params.tiles.tile > kBlockThreads ? 4 : 1;
}

// The launch of a neuron's kernel. The arguments are the templates of the settled, general and adaptive kernels. With
// one neuron per thread, the settled kernel for kNormalised also computes kPlain, and the general kernel computes all
// calls with a residual.
template <class Scalar, template <class> class Params>
Launch neuron_launch(const Params<Scalar>& params, Template settled, Template general, Template adaptive) {
  Kernel kernel{settled, kTypeOf<Scalar>};
  if (params.options.has_adaptation()) {
    kernel.template_id = adaptive;
    return {kernel, params.tiles.count};
  }
  kernel.lanes = lanes_of(params);
  kernel.input = input_of(params);
  if (!kernel.is_general()) {
    if (kernel.lanes == 4) {
      if (!fours_share_parameters(params)) kernel.input = Input::kApart;
    } else {
      kernel.input = params.residual != nullptr ? Input::kGeneralResidual : Input::kNormalised;
    }
  }
  if (kernel.is_general()) {
    kernel.template_id = general;
    return {kernel, params.tiles.count};
  }
  if (kernel.lanes == 4 && params.shape.steps == kShortSequence) kernel.steps = kShortSequence;
  kernel.surrogate = params.options.surrogate;
  kernel.hard_reset = params.options.hard_reset && kernel.surrogate != Surrogate::kInteger;
  return {kernel, params.tiles.count};
}

template <class Scalar>
Launch launch_of(const ForwardParams<Scalar>& params) {
  return neuron_launch(params, Template::kForward, Template::kForward, Template::kAdaptiveForward);
}

template <class Scalar>
Launch launch_of(const BackwardParams<Scalar>& params) {
  return neuron_launch(params, Template::kSettledBackward, Template::kBackward, Template::kAdaptiveBackward);
}

template <class Scalar>
Launch launch_of(const IntegratorParams<Scalar>& params) {
  Kernel kernel{Template::kIntegrator, kTypeOf<Scalar>, lanes_of(params)};
  kernel.pass = params.requested_pass();
  return {kernel, params.tiles.count};
}

// ---- sums of gradients ----

// An element of a gradient is the sum of the slots of its runs. A run is a range of adjacent neurons that share a value
// of the parameter, and has one slot for each tile that it overlaps. If runs have few slots, a block sums several
// elements. If an element has very many runs, they are split among blocks, and a second launch adds up the totals of
// these blocks.
template <class Real, class Resident>
void plan_tiles(GradientSum<Real>& sum, const Resident&) {
  constexpr int64 kManySlots = 8;
  constexpr int64 kMaxRunsEach = 16, kFewRuns = 8, kManyThreads = 131072;
  constexpr int64 kRuns = 16, kSingleRuns = 128;  // runs of a thread if they are split; loads of single neurons overlap
  constexpr int64 kMaxSplits = 2048;
  for (int id = 0; id < sum.count; ++id) {
    GradientPart<Real>& part = sum.parts[id];
    if (part.parameter.is_interleaved_in(sum.tile)) {
      part.neurons = ceil_div(part.neurons, sum.tile) * part.parameter.count;
    }
    const int64 inner = part.parameter.inner, runs = part.neurons / (inner * part.parameter.count);
    const int64 slots = (inner + sum.tile - 2) / sum.tile + 1;  // the largest number of slots of a run
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
      const int64 enough = ceil_div(kManyThreads, part.num_elements(sum.shape));
      part.runs_each = largest_power(std::min({runs, kMaxRunsEach, enough}));
      part.elements_each = kSumThreads / part.runs_each;
      const bool single = inner == 1 && part.parameter.step_stride == 0;
      if (single && runs <= kFewRuns && part.parameter.count >= kElementsPerThread * kManyThreads) {
        part.elements_each = kElementsPerThread * kSumThreads;
      }
    }
    part.blocks = ceil_div(part.num_elements(sum.shape), part.elements_each);
    const int64 splits = ceil_div(runs, part.runs_each * (inner == 1 ? kSingleRuns : kRuns));
    part.splits = splits > 2 ? static_cast<int>(std::min(splits, kMaxSplits)) : 1;
  }
}

template <class Real>
Launch launch_of(const GradientSum<Real>& sum) {
  int64 blocks = 0;
  for (int id = 0; id < sum.count; ++id) blocks += sum.parts[id].splits * sum.parts[id].blocks;
  return {{Template::kGradientSum, kTypeOf<Real>}, blocks, kSumThreads};
}

// ---- batch normalisation ----

// Divides the channels into tiles. A thread has four columns if the type has kernels for four, and the columns belong
// to one channel and are aligned in memory. A thread with one column reads `rows_each` rows, and a thread with four
// columns a quarter as many. For very long sequences both read more (`ChannelTiles::plan`).
template <class Scalar, class... Gradients>
void plan_channels(ChannelTiles& tiles, int64 rows_each, const Scalar* x_seq, const Gradients*... gradients) {
  const bool fours = kHasFourLanes<Scalar> && tiles.shape.inner % 4 == 0 && is_aligned_for_four(x_seq) &&
                     (is_aligned_for_four(gradients) && ...);
  const int lanes = fours ? 4 : 1;
  tiles = ChannelTiles::plan(tiles.shape, lanes, kBlockThreads, rows_each / lanes);
}

template <class Scalar, class Resident>
void plan_tiles(MomentsParams<Scalar>& params, const Resident&) {
  plan_channels(params.tiles, kMomentsRowsPerThread, params.x_seq);
}

template <class Scalar, class Resident>
void plan_tiles(InputGradientParams<Scalar>& params, const Resident&) {
  plan_channels(params.tiles, kGradientRowsPerThread, params.x_seq, params.grad_x_seq, params.grad_residual);
  if (params.tiles.shape.rows == 0) params.tiles.splits = 1;  // for the gradients of weight and bias
}

template <class Scalar>
Launch launch_of(const MomentsParams<Scalar>& params) {
  return {{Template::kMoments, kTypeOf<Scalar>, static_cast<int>(params.tiles.lanes)}, params.tiles.num_tasks()};
}

template <class Real>
Launch launch_of(const CoefficientsParams<Real>& params) {
  return {{Template::kCoefficients, kTypeOf<Real>}, params.channels};
}

template <class Scalar>
Launch launch_of(const InputGradientParams<Scalar>& params) {
  Kernel kernel{Template::kInputGradient, kTypeOf<Scalar>, static_cast<int>(params.tiles.lanes)};
  kernel.residual = params.grad_residual != nullptr;
  return {kernel, params.tiles.num_tasks()};
}

}  // namespace asgl::cuda
