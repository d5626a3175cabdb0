// Checked arguments and gradients of parameters, for the operators of the neuron and of the integrator. The other
// operators use some of the functions. Python checks arguments first, with messages for users. The checks here keep
// kernels from reading and writing out of bounds.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "math/adaptive.h"
#include "ops/kernels.h"
#include "ops/layout.h"

namespace asgl::ops {

// Points to the elements of a tensor. Null if the tensor is undefined or empty.
template <class Element>
Element* data_ptr(const Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return nullptr;
  if constexpr (std::is_const_v<Element>) {
    return static_cast<Element*>(tensor.const_data_ptr());
  } else {
    return static_cast<Element*>(tensor.mutable_data_ptr());
  }
}

// The number of elements of the checkpoints of all states, and two more. Short sequences have no checkpoints. Without
// the two elements, torch.compile would specialise on the size 0 or 1, and compile again for longer sequences.
inline int64_t checkpoint_elements(const SequenceShape& shape, int64_t num_states) {
  return num_states * checkpoint_stride(shape) + 2;
}

// Arguments of operators, in the order of the fields of Numbers and Rules in asgl_cuda/reference/records.py.
struct Numbers {
  double constants[kNumParameters];  // in the order of ParameterId, 0 where the parameter is a tensor
  double residual_gain, v_rest, surrogate_gain, v_min;
};
struct Rules {
  int64_t surrogate, hard_reset, strict_threshold, scale_output, detach_reset, multi_spike, periodic, floored,
      log_width, logit_decay, analog_below, levels, adaptation, time_dim, trailing;
};
// The arguments that are not tensors.
struct Constants {
  Numbers numbers;
  Rules rules;
};

// Converts a list to a struct with one field per element. Throws if the numbers of elements and fields differ.
template <class Fields, class Element>
Fields to_struct(at::ArrayRef<Element> list, const char* name) {
  static_assert(std::is_trivially_copyable_v<Fields> && sizeof(Fields) % sizeof(Element) == 0);
  TORCH_CHECK_VALUE(list.size() == sizeof(Fields) / sizeof(Element), "asgl_cuda: expected ",
                    sizeof(Fields) / sizeof(Element), " ", name, ", got ", list.size());
  Fields fields;
  std::memcpy(&fields, list.data(), sizeof(Fields));
  return fields;
}

// Converts the arguments `numbers` and `rules` of an operator.
inline Constants constants_of(at::ArrayRef<double> numbers, at::IntArrayRef rules) {
  return {to_struct<Numbers>(numbers, "numbers"), to_struct<Rules>(rules, "rules")};
}

// Throws unless analog_below is in its range, and rng_state is given if it is needed, with the right type and size.
inline void check_noise(const Rules& rules, const OptionalTensor& rng_state, at::Device device) {
  const int64_t below = rules.analog_below;
  TORCH_CHECK_VALUE(0 <= below && below <= kAnalogBelowInState, "asgl_cuda: analog_below must be in [0, ",
                    kAnalogBelowInState, "], got ", below);
  if ((below > 0 && below != kAlwaysAnalog) || rng_state.has_value()) {
    const int64_t elements = below == kAnalogBelowInState ? 3 : 2;
    TORCH_CHECK_VALUE(rng_state.has_value() && rng_state->scalar_type() == at::kLong &&
                          rng_state->numel() == elements && rng_state->is_contiguous() && rng_state->device() == device,
                      "asgl_cuda: rng_state must be a contiguous int64 tensor of ", elements, " elements on ", device);
  }
}

// Throws unless rules.adaptation is valid. It is 0 for no adaptation, and otherwise says where the adaptation acts: on
// the current, on the threshold, on the amount of a soft reset, or on the threshold and this amount.
inline void check_adaptation(const Rules& rules) {
  const int64_t target = rules.adaptation;
  const bool in_reset = target == kAdaptsReset || target == (kAdaptsThreshold | kAdaptsReset);
  TORCH_CHECK_VALUE(
      target == 0 || target == kAdaptsCurrent || target == kAdaptsThreshold || (in_reset && !rules.hard_reset),
      "asgl_cuda: no adaptation has the number ", target, rules.hard_reset ? " with a hard reset" : "");
}

// The noise, as kernels take it. The result points to the elements of rng_state, which must outlive it.
inline NoiseParams noise_of(const Rules& rules, const OptionalTensor& rng_state) {
  return {rng_state.has_value() ? reinterpret_cast<const int64*>(rng_state->const_data_ptr<int64_t>()) : nullptr,
          static_cast<uint32>(rules.analog_below)};
}

// The options, as kernels take them.
template <class Real>
LIFByOptions<Real> options_of(const Rules& rules, const Numbers& numbers) {
  LIFByOptions<Real> options{};
  options.v_rest = static_cast<Real>(numbers.v_rest);
  options.surrogate_gain = static_cast<Real>(numbers.surrogate_gain);
  options.surrogate = static_cast<Surrogate>(rules.surrogate);
  options.hard_reset = rules.hard_reset != 0;
  options.strict_threshold = rules.strict_threshold != 0;
  options.scale_output = rules.scale_output != 0;
  options.detach_reset = rules.detach_reset != 0;
  options.log_width = rules.log_width != 0;
  options.logit_decay = rules.logit_decay != 0;
  options.levels = static_cast<uint16>(rules.levels);
  options.v_min = static_cast<Real>(numbers.v_min);
  options.multi_spike = rules.multi_spike != 0;
  options.periodic = rules.periodic != 0;
  options.floored = rules.floored != 0;
  options.adaptation = static_cast<uint8>(rules.adaptation);
  return options;
}

// The number of states of a neuron. v_init and tensors like it contain all states.
inline int64_t num_states(const Constants& constants) {
  return options_of<float>(constants.rules, constants.numbers).num_states();
}

using Parameters = std::array<OptionalTensor, kNumParameters>;  // by ParameterId; no tensor for a constant

// The checked arguments that forward and backward of the neuron, or of the integrator, share.
class NeuronCall {
 public:
  NeuronCall(const Tensor& x_seq, const OptionalTensor& v_init, const OptionalTensor& rng_state,
             const Parameters& parameters, const OptionalTensor& residual, const Constants& constants)
      : x_seq(x_seq),
        layout(x_seq, constants.rules.time_dim),
        num_states(asgl::ops::num_states(constants)),
        rules_(constants.rules),
        numbers_(constants.numbers),
        rng_state_(rng_state) {
    TORCH_CHECK_VALUE(0 <= rules_.surrogate && rules_.surrogate < kNumSurrogates,
                      "asgl_cuda: no surrogate has the number ", rules_.surrogate);
    check_adaptation(rules_);
    TORCH_CHECK_VALUE(rules_.adaptation == 0 || rules_.surrogate != static_cast<int64_t>(Surrogate::kInteger),
                      "asgl_cuda: adaptive neurons have no integer spikes");
    v_init_ = layout.checked_state(v_init, "v_init", num_states);
    residual_ = layout.checked_sequence(residual, layout.type(), "residual");
    TORCH_CHECK_VALUE(0 <= rules_.levels && rules_.levels <= std::numeric_limits<uint16>::max(),
                      "asgl_cuda: levels must be in [0, 65535], got ", rules_.levels);
    check_noise(rules_, rng_state, x_seq.device());
    for (int id = 0; id < kNumParameters; ++id) {
      if (!parameters[id].has_value()) continue;
      layout.check_type_and_device(*parameters[id], layout.real(), "a parameter");
      parameters_[id].emplace(*parameters[id], layout, rules_.trailing);
    }
    for (const auto& [id, learned] : {std::pair(kWidth, rules_.log_width), std::pair(kDecay, rules_.logit_decay)}) {
      TORCH_CHECK_VALUE(learned == 0 || (parameters_[id].has_value() && !parameters_[id]->is_per_step()),
                        "asgl_cuda: a width given as its logarithm and a decay given as its logit must be tensors "
                        "without time steps");
    }
    TORCH_CHECK_VALUE(rules_.adaptation == 0 || !has_residual(), "asgl_cuda: adaptive neurons have no residual");
  }

  bool has_residual() const { return residual_.defined(); }
  // The tensor of a parameter, or null if the parameter is a constant.
  const ParameterTensor* parameter(int id) const { return parameters_[id].has_value() ? &*parameters_[id] : nullptr; }

  // Returns Params<Scalar> with these arguments. The result points to tensors of this call, which must outlive it.
  template <template <class> class Params, class Scalar>
  Params<Scalar> params() const {
    using Real = Real_t<Scalar>;
    Params<Scalar> params{};
    params.shape = layout.shape();
    for (int id = 0; id < kNumParameters; ++id) {
      params.parameters[id] =
          parameters_[id].has_value()
              ? parameters_[id]->template view<Real>()
              : ParameterView<Real>{nullptr, static_cast<Real>(numbers_.constants[id]), 0, params.shape.neurons(), 1};
    }
    params.options = options_of<Real>(rules_, numbers_);
    params.noise = noise_of(rules_, rng_state_);
    params.x_seq = data_ptr<const Scalar>(x_seq);
    params.v_init = data_ptr<const Real>(v_init_);
    params.residual = data_ptr<const Scalar>(residual_);
    params.residual_gain = static_cast<Real>(numbers_.residual_gain);
    return params;
  }

  // How the partial sums become the gradient of what the caller passed: a width or its logarithm, a decay or its logit.
  Derivative derivative(int id) const { return derivative_of(id, rules_.log_width != 0, rules_.logit_decay != 0); }

  const Tensor x_seq;
  const Layout layout;
  const int64_t num_states;  // of a neuron, in v_init and tensors like it

 private:
  const Rules rules_;
  const Numbers numbers_;
  const OptionalTensor rng_state_;
  Tensor v_init_, residual_;
  std::optional<ParameterTensor> parameters_[kNumParameters];
};

// Calls f(Scalar{}) with the C++ type of the elements of x_seq.
template <class F>
void with_scalar(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kHalf:
      return f(Half{});
    case at::kBFloat16:
      return f(BFloat16{});
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    default:
      TORCH_CHECK_TYPE(false, "asgl_cuda: x_seq must be float16, bfloat16, float32 or float64, got ", type);
  }
}

// By ParameterId, whether a gradient is wanted.
using WantedParameters = std::array<bool, kNumParameters>;

// The wanted gradients of parameter tensors, each [steps or 1, count].
class ParameterGradients {
 public:
  ParameterGradients(const NeuronCall& call, const WantedParameters& wanted) : call_(call) {
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wanted[id] || call.parameter(id) == nullptr) continue;
      ids_.push_back(id);
      sums_.push_back(call.parameter(id)->empty_gradient());
      if (call.layout.shape().neurons() == 0) sums_.back().zero_();
    }
  }

  // Launches a backward kernel, and then the kernel that adds up the partial sums. If this kernel splits long sums, it
  // is launched twice. `params` must be complete except for the partial sums.
  template <class Params>
  void launch_backward(const Kernels& kernels, Params& params) const {
    using Real = typename Params::Real;
    const SequenceShape& shape = params.shape;
    Real placeholder{};  // a pointer that is not null tells plan_tiles() that the sums are wanted
    for (const int id : ids_) params.partials[id].data = &placeholder;
    kernels.plan_tiles(params);
    const auto elements_of = [&](int id) {
      return (params.parameters[id].step_stride != 0 ? shape.steps : 1) * params.partials[id].slots;
    };
    int64_t elements = 0;
    for (const int id : ids_) {
      auto& partials = params.partials[id];
      partials.slots = partials.num_slots(params.parameters[id].inner, shape.neurons(), params.tiles.count);
      elements += elements_of(id);
    }
    const Tensor partials = empty(elements);
    Real* free = data_ptr<Real>(partials);
    GradientSum<Real> sum{shape, params.tiles.tile, 0, {}};
    for (const int id : ids_) {
      params.partials[id].data = free;
      free += elements_of(id);
      sum.parts[sum.count] = {params.partials[id], params.parameters[id], call_.derivative(id),
                              data_ptr<Real>(sums_[sum.count]), shape.neurons()};
      ++sum.count;
    }
    kernels.launch(params);
    if (sum.count == 0) return;
    kernels.plan_tiles(sum);
    const Tensor totals = empty(sum.num_totals());
    GradientSum<Real> second = sum.place_totals(data_ptr<Real>(totals));
    kernels.launch(sum);
    if (second.count == 0) return;
    kernels.plan_tiles(second);
    kernels.launch(second);
  }

  // Appends the gradients, each in the shape of its parameter.
  void append_to(std::vector<Tensor>& results) const {
    for (size_t i = 0; i < ids_.size(); ++i) {
      results.push_back(call_.parameter(ids_[i])->gradient_in_own_shape(sums_[i]));
    }
  }

 private:
  // An uninitialised tensor in the arithmetic type; undefined for no elements.
  Tensor empty(int64_t elements) const {
    return elements > 0 ? request_huge_pages(at::empty({elements}, call_.layout.real_options())) : Tensor();
  }

  const NeuronCall& call_;
  std::vector<int> ids_;
  std::vector<Tensor> sums_;
};

}  // namespace asgl::ops
