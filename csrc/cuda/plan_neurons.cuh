// The division of neurons among threads, for neuron and integrator. backends/neuron_kernels.py decides the same in
// Python.
#pragma once

#include "cuda/access.cuh"
#include "cuda/start.cuh"

namespace asgl::cuda {

// The kernel's assumption about its input.
template <class Params>
Input input_of(const Params& params) {
  const bool indexed = params.shape.neurons() < kDivisible;
  const Input input = params.only_spikes() && indexed ? params.input() : Input::kGeneral;
  if (params.residual == nullptr) return input;
  return input == Input::kGeneral ? Input::kGeneralResidual : Input::kNormalisedResidual;
}

// Whether four neurons, from any multiple of four on, share all parameters.
template <class Scalar>
bool share_parameters(const LIFParams<Scalar>& params) {
  bool shared = true;
  for (const auto& parameter : params.parameters) shared = shared && parameter.is_shared_by_four();
  return shared;
}

// Whether they do, or kernels for kApart may run: those parameters that they do not share are the neuron's own,
// adjacent and aligned.
template <class Params>
bool fit_parameters(const Params& params) {
  const bool shared = share_parameters(params);
  const Input input = input_of(params);
  if (shared || (input != Input::kPlain && input != Input::kNormalised)) return shared;
  bool fit = true;
  for (const auto& parameter : params.parameters) {
    const bool adjacent = parameter.inner == 1 && parameter.count % 4 == 0 && is_aligned(parameter.data);
    fit = fit && (parameter.is_shared_by_four() || adjacent);
  }
  return fit;
}

// Whether four neurons, from any multiple of four on, are adjacent and aligned in memory.
template <class Scalar, class... Pointers>
bool groups_of_four(const LIFParams<Scalar>& params, const Pointers&... sequences_and_states) {
  return params.shape.inner % 4 == 0 && is_aligned(params.x_seq) && is_aligned(params.v_init) &&
         (is_aligned(sequences_and_states) && ...);
}

// Whether four neurons a thread are faster. Queries the device only if its size decides.
template <class Params>
cudaError_t fours_pay(const Params& params, bool* pay) {
  const Input input = input_of(params);
  const bool general = input == Input::kGeneral || input == Input::kGeneralResidual;
  *pay = !general && params.shape.steps <= kCheckpointSteps;
  if (*pay) return cudaSuccess;
  int device = 0, multiprocessors = 0, threads_each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&threads_each, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  }
  const int64 resident = static_cast<int64>(multiprocessors) * threads_each, neurons = params.shape.neurons();
  // General kernels: a quarter of the resident threads suffices, as each has four times the loads in flight.
  *pay = general ? neurons / 4 >= resident / 4 : neurons > kFewSixteenths * resident / 16;
  return error;
}

template <class Scalar>
ParameterSummary summary_of(const LIFParams<Scalar>& params) {
  ParameterSummary summary{};
  if (params.shape.neurons() >= kDivisible) return summary;
  summary.alike = true;
  int64 inner = 1, count = 1;  // of the first parameter that differs between neurons
  for (int id = 0; id < kNumParameters; ++id) {
    const auto& parameter = params.parameters[id];
    if (parameter.data != nullptr) summary.tensors |= 1u << id;
    if (parameter.is_same_for_all()) continue;
    if (count == 1) inner = parameter.inner, count = parameter.count;
    summary.alike = summary.alike && parameter.inner == inner && parameter.count == count;
    summary.strides[id] = 1;
    if (parameter.inner == 1) summary.by_neuron |= static_cast<uint8>(1u << id);
  }
  const auto index = [](int64 inner, int64 count) { return NeuronIndex{Divisor::of(inner), Divisor::of(count)}; };
  summary.common = index(inner, count);
  for (int id = 0; id < kNumParameters && !summary.alike; ++id) {
    summary.own[id] = index(params.parameters[id].inner, params.parameters[id].count);
  }
  return summary;
}

// A tile is the neurons of a block: one a thread, or four if `grouped` and faster.
template <class Params>
cudaError_t plan_neurons(Params& params, bool grouped) {
  params.summary = summary_of(params);
  using Scalar = std::remove_const_t<std::remove_pointer_t<decltype(params.x_seq)>>;
  bool fours = false;
  cudaError_t error = cudaSuccess;
  if (kHasFours<Scalar> && grouped) error = fours_pay(params, &fours);
  params.tiles.tile = fours ? 4 * kBlockThreads : kBlockThreads;
  params.tiles.count = blocks_for(params.shape.neurons(), params.tiles.tile);
  return error;
}

// plan_neurons, where parameters may want gradients.
template <class Params>
cudaError_t plan_with_sums(Params& params, bool grouped) {
  const cudaError_t error = plan_neurons(params, grouped);
  for (int id = 0; id < kNumParameters; ++id) params.summary.wanted |= static_cast<uint32>(params.wants(id)) << id;
  return error;
}

}  // namespace asgl::cuda
