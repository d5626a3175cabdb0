// Shared by the operators: layout, parameter views, gradients of parameters. Python checks arguments with messages for
// users; the checks here keep kernels within bounds.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "launch.h"
#include "math/adaptive.h"
#include "ops/layout.h"

namespace asgl::ops {

using OptionalTensor = std::optional<Tensor>;

template <class Scalar>
struct AtenType {
  using type = Scalar;
};
template <>
struct AtenType<Half> {
  using type = at::Half;
};
template <>
struct AtenType<BFloat16> {
  using type = at::BFloat16;
};

// Null for no tensor, or an empty one.
template <class Element>
Element* pointer(const Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return nullptr;
  return reinterpret_cast<Element*>(tensor.mutable_data_ptr<typename AtenType<Element>::type>());
}

template <class Element>
const Element* const_pointer(const OptionalTensor& tensor) {
  if (!tensor.has_value() || tensor->numel() == 0) return nullptr;
  return reinterpret_cast<const Element*>(tensor->const_data_ptr<typename AtenType<Element>::type>());
}

// At least 2 elements, so that torch.compile does not specialise on the number of steps.
inline int64_t checkpoint_elements(const SequenceShape& shape, int64_t members) {
  return members * checkpoint_stride(shape) + 2;
}

inline at::ScalarType real_type(const Tensor& x_seq) {
  return x_seq.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Throws unless the tensor has this type and is on the device of x_seq.
inline void check_type(const Tensor& tensor, at::ScalarType type, const Tensor& x_seq, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, "asgl_cuda: ", name, " must have type ", type, ", got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x_seq.device(), "asgl_cuda: ", name, " must be on ", x_seq.device(), ", got ",
                    tensor.device());
}

// Arguments of operators, in the order of the fields of Numbers and Rules in asgl_cuda/reference.py.
struct Numbers {
  double constants[kNumParameters];  // in the order of ParameterId, 0 where the parameter is a tensor
  double residual_gain, v_rest, surrogate_gain, v_min;
};
struct Rules {
  int64_t surrogate, hard_reset, strict_threshold, scale_output, detach_reset, multi_spike, periodic, floored,
      log_width, logit_decay, analog_below, levels, adaptation, time_dim;
};
struct Constants {
  Numbers numbers;
  Rules rules;
};

template <class Fields, class Element>
Fields fields_of(at::ArrayRef<Element> list, const char* name) {
  static_assert(std::is_trivially_copyable_v<Fields> && sizeof(Fields) % sizeof(Element) == 0);
  TORCH_CHECK_VALUE(list.size() == sizeof(Fields) / sizeof(Element), "asgl_cuda: expected ",
                    sizeof(Fields) / sizeof(Element), " ", name, ", got ", list.size());
  Fields fields;
  std::memcpy(&fields, list.data(), sizeof(Fields));
  return fields;
}

inline Constants constants_of(at::ArrayRef<double> numbers, at::IntArrayRef rules) {
  return {fields_of<Numbers>(numbers, "numbers"), fields_of<Rules>(rules, "rules")};
}

inline void check_noise(const Rules& rules, const OptionalTensor& rng_state, const Tensor& x_seq) {
  const int64_t below = rules.analog_below;
  TORCH_CHECK_VALUE(0 <= below && below <= kAnalogBelowInState, "asgl_cuda: analog_below must be in [0, ",
                    kAnalogBelowInState, "], got ", below);
  if ((below > 0 && below != kAlwaysAnalog) || rng_state.has_value()) {
    const int64_t elements = below == kAnalogBelowInState ? 3 : 2;
    TORCH_CHECK_VALUE(
        rng_state.has_value() && rng_state->scalar_type() == at::kLong && rng_state->numel() == elements &&
            rng_state->is_contiguous() && rng_state->device() == x_seq.device(),
        "asgl_cuda: rng_state must be a contiguous int64 tensor of ", elements, " elements on ", x_seq.device());
  }
}

inline void check_adaptation(const Rules& rules) {
  const int64_t place = rules.adaptation;
  const bool in_reset = place == kInReset || place == (kInThreshold | kInReset);
  TORCH_CHECK_VALUE(place == 0 || place == kInCurrent || place == kInThreshold || (in_reset && !rules.hard_reset),
                    "asgl_cuda: no adaptation has the number ", place, rules.hard_reset ? " with a hard reset" : "");
}

inline NoiseParams noise_of(const Rules& rules, const OptionalTensor& rng_state) {
  return {rng_state.has_value() ? reinterpret_cast<const int64*>(rng_state->const_data_ptr<int64_t>()) : nullptr,
          static_cast<uint32>(rules.analog_below)};
}

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

using Parameters = std::array<OptionalTensor, kNumParameters>;  // by ParameterId, none for a constant

// The arguments that forward and backward share, checked.
class Call {
 public:
  Call(const Tensor& x_seq, const OptionalTensor& v_init, const OptionalTensor& rng_state, const Parameters& parameters,
       const OptionalTensor& residual, const Constants& constants)
      : rules_(constants.rules),
        numbers_(constants.numbers),
        x_seq_(x_seq),
        layout_(x_seq, rules_.time_dim),
        rng_state_(rng_state) {
    TORCH_CHECK_VALUE(0 <= rules_.surrogate && rules_.surrogate < kNumSurrogates,
                      "asgl_cuda: no surrogate has the number ", rules_.surrogate);
    check_adaptation(rules_);
    TORCH_CHECK_VALUE(rules_.adaptation == 0 || rules_.surrogate != static_cast<int64_t>(Surrogate::kInteger),
                      "asgl_cuda: adaptive neurons have no integer spikes");
    v_init_ = state(v_init, "v_init");
    residual_ = sequence(residual, x_seq.scalar_type(), "residual");
    TORCH_CHECK_VALUE(0 <= rules_.levels && rules_.levels <= std::numeric_limits<uint16>::max(),
                      "asgl_cuda: levels must have 16 bits, got ", rules_.levels);
    check_noise(rules_, rng_state, x_seq);
    for (int id = 0; id < kNumParameters; ++id) {
      if (!parameters[id].has_value()) continue;
      check_type(*parameters[id], real_type(x_seq), x_seq, "a parameter");
      parameters_[id].emplace(*parameters[id], layout_);
    }
    for (const auto& [id, learned] : {std::pair(kWidth, rules_.log_width), std::pair(kDecay, rules_.logit_decay)}) {
      TORCH_CHECK_VALUE(learned == 0 || (parameters_[id].has_value() && !parameters_[id]->per_step()),
                        "asgl_cuda: a logarithm of the width and a logit of the decay are tensors without steps");
    }
    TORCH_CHECK_VALUE(rules_.adaptation == 0 || !residual.has_value(), "asgl_cuda: adaptive neurons have no residual");
  }

  const Tensor& x_seq() const { return x_seq_; }
  const Layout& layout() const { return layout_; }
  bool has_residual() const { return residual_.has_value(); }
  int64_t members() const { return rules_.adaptation == 0 ? 1 : 2; }  // of the state
  bool has_parameter(int id) const { return parameters_[id].has_value(); }
  const ParameterTensor& parameter(int id) const { return *parameters_[id]; }
  at::TensorOptions real_options() const { return x_seq_.options().dtype(real_type(x_seq_)); }

  // A given tensor, checked, in the memory order of x_seq.
  OptionalTensor state(const OptionalTensor& given, const char* name) const {
    if (!given.has_value()) return std::nullopt;
    check_type(*given, real_type(x_seq_), x_seq_, name);
    return layout_.match_state(*given, name, members());
  }
  OptionalTensor sequence(const OptionalTensor& given, at::ScalarType type, const char* name) const {
    if (!given.has_value()) return std::nullopt;
    check_type(*given, type, x_seq_, name);
    return layout_.match_sequence(*given, name);
  }

  template <class Scalar>
  void fill(LIFParams<Scalar>& params) const {
    using Real = Real_t<Scalar>;
    params.shape = layout_.shape();
    for (int id = 0; id < kNumParameters; ++id) params.parameters[id] = view<Real>(id);
    params.options = options_of<Real>(rules_, numbers_);
    params.noise = noise_of(rules_, rng_state_);
    params.x_seq = const_pointer<Scalar>(x_seq_);
    params.v_init = const_pointer<Real>(v_init_);
    params.residual = const_pointer<Scalar>(residual_);
    params.residual_gain = static_cast<Real>(numbers_.residual_gain);
  }

  template <class Real>
  ParameterView<Real> view(int id) const {
    if (parameters_[id].has_value()) return parameters_[id]->view<Real>();
    const int64 neurons = layout_.shape().neurons();
    return {nullptr, static_cast<Real>(numbers_.constants[id]), 0, neurons, 1};
  }

  // Chain-rule factor from the partial sums to the gradient of a parameter.
  Derivative derivative(int id) const {
    if (id == kWidth) return rules_.log_width != 0 ? Derivative::kOfLogWidth : Derivative::kOfWidth;
    return id == kDecay && rules_.logit_decay != 0 ? Derivative::kOfLogitDecay : Derivative::kNone;
  }

 private:
  Rules rules_;
  Numbers numbers_;
  Tensor x_seq_;
  Layout layout_;
  OptionalTensor v_init_, rng_state_, residual_;
  std::optional<ParameterTensor> parameters_[kNumParameters];
};

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

using WantedParameters = std::array<bool, kNumParameters>;

// The wanted gradients of parameter tensors, each [steps or 1, count].
class ParameterGradients {
 public:
  ParameterGradients(const Call& call, const WantedParameters& wanted) : call_(call) {
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wanted[id] || !call.has_parameter(id)) continue;
      ids_.push_back(id);
      sums_.push_back(call.parameter(id).empty_gradient());
      if (call.layout().shape().neurons() == 0) sums_.back().zero_();
    }
  }

  // Launches a backward kernel, whose params lack only the partial sums, and sums these.
  template <class Backend, class Params>
  void compute(const Backend& backend, Params& params) const {
    using Real = typename Params::Real;
    const SequenceShape& shape = params.shape;
    Real later{};  // any non-null pointer: plan_tiles() needs to know which sums are wanted
    for (const int id : ids_) params.partials[id].data = &later;
    backend.plan_tiles(params);
    int64_t elements = 0;
    for (const int id : ids_) {
      const auto& view = params.parameters[id];
      params.partials[id].slots = params.partials[id].slots_for(view.inner, shape.neurons(), params.tiles.count);
      elements += (view.step_stride != 0 ? shape.steps : 1) * params.partials[id].slots;
    }
    const Tensor partials = elements > 0 ? in_huge_pages(at::empty({elements}, call_.real_options())) : Tensor();
    Real* free = pointer<Real>(partials);
    GradientSum<Real> sum{shape, params.tiles.tile, static_cast<int>(ids_.size()), {}};
    for (size_t i = 0; i < ids_.size(); ++i) {
      const int id = ids_[i];
      const auto& view = params.parameters[id];
      params.partials[id].data = free;
      free += (view.step_stride != 0 ? shape.steps : 1) * params.partials[id].slots;
      sum.parts[i] = {params.partials[id], view, call_.derivative(id), pointer<Real>(sums_[i]), shape.neurons()};
    }
    backend.launch(params);
    if (sum.count == 0) return;
    backend.plan_tiles(sum);
    const int64_t number = sum.num_totals();
    const Tensor totals = number > 0 ? at::empty({number}, call_.real_options()) : Tensor();
    GradientSum<Real> second = sum.place_totals(pointer<Real>(totals));
    backend.launch(sum);
    if (second.count == 0) return;
    backend.plan_tiles(second);
    backend.launch(second);
  }

  void append_to(std::vector<Tensor>& results) const {
    for (size_t i = 0; i < ids_.size(); ++i) {
      results.push_back(call_.parameter(ids_[i]).gradient_in_own_shape(sums_[i]));
    }
  }

 private:
  const Call& call_;
  std::vector<int> ids_;
  std::vector<Tensor> sums_;
};

}  // namespace asgl::ops
