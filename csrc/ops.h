// The operators as templates over the backend: layout, parameter views, allocation. Arguments have been checked in
// Python, with the words that a user should read; without the checks here, kernels could read or write out of bounds.
//
// A Backend is made from x_seq for the time of one call. Its backward_tiles(params) says how backward will cut the
// neurons; the partial sums are not yet allocated then. Its launch_forward(surrogate, hard_reset, params),
// launch_backward(surrogate, hard_reset, params) and launch_gradient_sum(sum) return when the work is done or queued,
// and throw where that fails.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "lif_launch.h"

namespace asgl::ops {

using at::Tensor;
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

// Null for a tensor that is not there.
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

// Two more than are written: shapes that a tracer can prove to be neither 0 nor 1 need no guard on the number of steps.
inline int64_t checkpoint_elements(const SequenceShape& shape) {
  return (shape.steps - 1) / kCheckpointSteps * shape.neurons() + 2;
}

inline at::ScalarType real_type(const Tensor& x_seq) {
  return x_seq.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Where x_seq's dimensions lie in memory: contiguous, or with the channels (the second dimension except time)
// innermost.
class Layout {
 public:
  Layout(const Tensor& x_seq, int64_t time_dim) : sizes_(x_seq.sizes().vec()), time_dim_(time_dim) {
    const int64_t dims = x_seq.dim();
    TORCH_CHECK_VALUE(0 <= time_dim && time_dim < dims, "asgl_cuda: time_dim must be in [0, ", dims, "), got ",
                      time_dim);
    for (int64_t dim = 0; dim < dims; ++dim) order_.push_back(dim);
    if (!x_seq.is_contiguous()) {
      const int64_t channel = time_dim <= 1 ? 2 : 1;
      TORCH_CHECK_VALUE(channel < dims, "asgl_cuda: x_seq must be contiguous or channels_last");
      order_.erase(order_.begin() + channel);
      order_.push_back(channel);
      TORCH_CHECK_VALUE(x_seq.permute(order_).is_contiguous(), "asgl_cuda: x_seq must be contiguous or channels_last");
    }
    shape_ = {1, x_seq.size(time_dim), 1};
    int64* extent = &shape_.outer;
    TORCH_CHECK_VALUE(shape_.steps > 0, "asgl_cuda: x_seq must have at least one time step");
    for (const int64_t dim : order_) {
      if (dim == time_dim) {
        extent = &shape_.inner;
      } else {
        *extent *= sizes_[dim];
        neuron_order_.push_back(dim);
      }
    }
  }

  const SequenceShape& shape() const { return shape_; }
  const std::vector<int64_t>& order() const { return order_; }
  const std::vector<int64_t>& neuron_order() const { return neuron_order_; }
  int64_t time_dim() const { return time_dim_; }
  const std::vector<int64_t>& sizes() const { return sizes_; }

  // A sequence whose memory is ordered as x_seq's.
  Tensor empty_sequence(const at::TensorOptions& options) const { return empty(sizes_, order_, options); }

  Tensor match_sequence(const Tensor& tensor) const {
    TORCH_CHECK_VALUE(tensor.sizes() == sizes_, "asgl_cuda: expected shape ", at::IntArrayRef(sizes_), ", got ",
                      tensor.sizes());
    return unpermute(tensor.permute(order_).contiguous(), order_);
  }

  // A tensor of x_seq's shape without time, its memory ordered as the neurons are numbered.
  Tensor empty_state(const at::TensorOptions& options) const { return empty(state_sizes(), state_order(), options); }

  Tensor match_state(const Tensor& tensor) const {
    const auto order = state_order();
    TORCH_CHECK_VALUE(tensor.sizes() == state_sizes(), "asgl_cuda: expected shape ", at::IntArrayRef(state_sizes()),
                      ", got ", tensor.sizes());
    return unpermute(tensor.permute(order).contiguous(), order);
  }

 private:
  std::vector<int64_t> state_sizes() const {
    auto sizes = sizes_;
    sizes.erase(sizes.begin() + time_dim_);
    return sizes;
  }
  std::vector<int64_t> state_order() const {
    auto order = neuron_order_;
    for (int64_t& dim : order) dim -= dim > time_dim_;
    return order;
  }
  // Its memory goes through the dimensions in `order`, outermost first. It is no view, as a permuted tensor would be:
  // autograd lets nobody change or detach a view in place.
  static Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& order,
                      const at::TensorOptions& options) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
      strides[*dim] = stride;
      stride *= std::max<int64_t>(sizes[*dim], 1);
    }
    return at::empty_strided(sizes, strides, options);
  }
  static Tensor unpermute(const Tensor& tensor, const std::vector<int64_t>& order) {
    std::vector<int64_t> inverse(order.size());
    for (size_t i = 0; i < order.size(); ++i) inverse[order[i]] = static_cast<int64_t>(i);
    return tensor.permute(inverse);
  }

  std::vector<int64_t> sizes_;
  int64_t time_dim_;
  std::vector<int64_t> order_;         // all dimensions, outermost first
  std::vector<int64_t> neuron_order_;  // the same without time
  SequenceShape shape_;
};

// A parameter tensor laid out for ParameterView: [steps or 1, count], count running over a contiguous range of the
// neurons' dimensions. Dimensions inside that range in which the parameter is broadcast are expanded.
class ParameterTensor {
 public:
  ParameterTensor(const Tensor& tensor, const Layout& layout) : sizes_(tensor.sizes().vec()) {
    const int64_t dims = static_cast<int64_t>(layout.sizes().size());
    TORCH_CHECK_VALUE(tensor.dim() <= dims, "asgl_cuda: a parameter has more dimensions than x_seq");
    const Tensor full = tensor.reshape([&] {
      std::vector<int64_t> sizes(dims - tensor.dim(), 1);
      sizes.insert(sizes.end(), sizes_.begin(), sizes_.end());
      return sizes;
    }());
    for (int64_t dim = 0; dim < dims; ++dim) {
      TORCH_CHECK_VALUE(full.size(dim) == 1 || full.size(dim) == layout.sizes()[dim],
                        "asgl_cuda: a parameter of shape ", tensor.sizes(),
                        " does not broadcast against x_seq of shape ", at::IntArrayRef(layout.sizes()));
    }
    const auto& order = layout.neuron_order();
    size_t begin = order.size(), end = order.size();
    for (size_t i = 0; i < order.size(); ++i) {
      if (full.size(order[i]) > 1) {
        if (begin == order.size()) begin = i;
        end = i + 1;
      }
    }
    expanded_ = full.sizes().vec();
    for (size_t i = 0; i < order.size(); ++i) {
      if (begin <= i && i < end) {
        expanded_[order[i]] = layout.sizes()[order[i]];
        count_ *= layout.sizes()[order[i]];
      } else if (i >= end) {
        inner_ *= layout.sizes()[order[i]];
      }
    }
    if (begin == order.size()) inner_ = layout.shape().neurons();
    per_step_ = full.size(layout.time_dim()) > 1;
    memory_order_.push_back(layout.time_dim());
    memory_order_.insert(memory_order_.end(), order.begin(), order.end());
    data_ = full.expand(expanded_).permute(memory_order_).contiguous();
  }

  template <class Real>
  ParameterView<Real> view() const {
    return {data_.const_data_ptr<Real>(), Real(0), per_step_ ? count_ : 0, inner_, count_};
  }

  Tensor empty_gradient() const { return at::empty_like(data_); }

  // From [steps or 1, count] back to the parameter's own shape.
  Tensor gradient_in_own_shape(const Tensor& gradient) const {
    std::vector<int64_t> inverse(memory_order_.size());
    for (size_t i = 0; i < memory_order_.size(); ++i) inverse[memory_order_[i]] = static_cast<int64_t>(i);
    return gradient.permute(inverse).sum_to_size(sizes_).contiguous();
  }

 private:
  std::vector<int64_t> sizes_, expanded_, memory_order_;
  int64_t inner_ = 1, count_ = 1;
  bool per_step_ = false;
  Tensor data_;
};

// asgl_cuda/reference.py packs options into lists, as the fields of its Rules and Numbers; here the same fields stand
// in the same order.
struct Rules {
  int64_t surrogate, hard_reset, strict_threshold, scale_output, detach_reset, analog_below, time_dim;
};
struct Numbers {
  double constants[kNumParameters];  // in the order of ParameterId, 0 where the parameter is a tensor
  double v_rest, surrogate_gain;
};

template <class Fields, class Element>
Fields unpacked(at::ArrayRef<Element> list, const char* name) {
  static_assert(std::is_trivially_copyable_v<Fields> && sizeof(Fields) % sizeof(Element) == 0);
  TORCH_CHECK_VALUE(list.size() == sizeof(Fields) / sizeof(Element), "asgl_cuda: expected ",
                    sizeof(Fields) / sizeof(Element), " ", name, ", got ", list.size());
  Fields fields;
  std::memcpy(&fields, list.data(), sizeof(Fields));
  return fields;
}

// Everything that forward and backward prepare in the same way.
class Call {
 public:
  Call(const Tensor& x_seq, const OptionalTensor& v_init, const OptionalTensor& rng_state,
       const c10::List<OptionalTensor>& parameters, at::ArrayRef<double> numbers, at::IntArrayRef rules)
      : rules_(unpacked<Rules>(rules, "rules")),
        numbers_(unpacked<Numbers>(numbers, "numbers")),
        x_seq_(x_seq),
        layout_(x_seq, rules_.time_dim),
        rng_state_(rng_state) {
    TORCH_CHECK_VALUE(parameters.size() == kNumParameters, "asgl_cuda: expected ", kNumParameters, " parameters, got ",
                      parameters.size());
    TORCH_CHECK_VALUE(0 <= rules_.surrogate && rules_.surrogate < kNumSurrogates,
                      "asgl_cuda: no surrogate has the number ", rules_.surrogate);
    if (v_init.has_value()) {
      check_real(*v_init, "v_init");
      v_init_ = layout_.match_state(*v_init);
    }
    const int64_t below = rules_.analog_below;
    TORCH_CHECK_VALUE(0 <= below && below <= kAnalogBelowInState, "asgl_cuda: analog_below must be in [0, ",
                      kAnalogBelowInState, "], got ", below);
    if (below > 0 && below != kAlwaysAnalog) {
      const int64_t elements = below == kAnalogBelowInState ? 3 : 2;
      TORCH_CHECK_VALUE(
          rng_state.has_value() && rng_state->scalar_type() == at::kLong && rng_state->numel() == elements &&
              rng_state->is_contiguous() && rng_state->device() == x_seq.device(),
          "asgl_cuda: rng_state must be a contiguous int64 tensor of ", elements, " elements on ", x_seq.device());
    }
    for (int id = 0; id < kNumParameters; ++id) {
      const OptionalTensor parameter = parameters.get(id);
      if (parameter.has_value()) {
        check_real(*parameter, "a parameter");
        parameters_[id].emplace(*parameter, layout_);
      }
    }
  }

  const Layout& layout() const { return layout_; }
  Surrogate surrogate() const { return static_cast<Surrogate>(rules_.surrogate); }
  bool hard_reset() const { return rules_.hard_reset != 0; }
  const ParameterTensor& parameter(int id) const { return *parameters_[id]; }
  at::TensorOptions real_options() const { return x_seq_.options().dtype(real_type(x_seq_)); }

  template <class Scalar>
  void fill(LIFParams<Scalar>& params) const {
    using Real = Real_t<Scalar>;
    params.shape = layout_.shape();
    for (int id = 0; id < kNumParameters; ++id) params.parameters[id] = view<Real>(id);
    params.options = {static_cast<Real>(numbers_.v_rest), static_cast<Real>(numbers_.surrogate_gain),
                      rules_.strict_threshold != 0, rules_.scale_output != 0, rules_.detach_reset != 0};
    params.noise = {
        rng_state_.has_value() ? reinterpret_cast<const int64*>(rng_state_->const_data_ptr<int64_t>()) : nullptr,
        static_cast<uint32>(rules_.analog_below)};
    params.x_seq = const_pointer<Scalar>(x_seq_);
    params.v_init = const_pointer<Real>(v_init_);
  }

  template <class Real>
  ParameterView<Real> view(int id) const {
    if (parameters_[id].has_value()) return parameters_[id]->view<Real>();
    const int64 neurons = layout_.shape().neurons();
    return {nullptr, static_cast<Real>(numbers_.constants[id]), 0, neurons, 1};
  }

  void check_real(const Tensor& tensor, const char* name) const {
    TORCH_CHECK_TYPE(tensor.scalar_type() == real_type(x_seq_), "asgl_cuda: ", name, " must have type ",
                     real_type(x_seq_), ", got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.device() == x_seq_.device(), "asgl_cuda: ", name, " must be on ", x_seq_.device(),
                      ", got ", tensor.device());
  }

 private:
  Rules rules_;
  Numbers numbers_;
  Tensor x_seq_;
  Layout layout_;
  OptionalTensor v_init_, rng_state_;
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

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lif_forward(const Tensor& x_seq, const OptionalTensor& v_init,
                                                               const OptionalTensor& rng_state,
                                                               const c10::List<OptionalTensor>& parameters,
                                                               at::ArrayRef<double> numbers, at::IntArrayRef rules,
                                                               std::array<bool, 4> wanted) {
  const Call call(x_seq, v_init, rng_state, parameters, numbers, rules);
  const auto [wants_v_last, wants_v_seq, wants_h_seq, wants_checkpoints] = wanted;
  const Backend backend(x_seq);
  const Layout& layout = call.layout();
  const SequenceShape& shape = layout.shape();
  const at::TensorOptions real = call.real_options();
  // An output that is not asked for is empty, and a tensor of its own: outputs of an operator may not share memory.
  const auto none = [&] { return at::empty({0}, real); };
  const Tensor s_seq = layout.empty_sequence(x_seq.options());
  const Tensor v_last = wants_v_last ? layout.empty_state(real) : none();
  const Tensor v_seq = wants_v_seq ? layout.empty_sequence(real) : none();
  const Tensor h_seq = wants_h_seq ? layout.empty_sequence(real) : none();
  const Tensor checkpoints = wants_checkpoints ? at::empty({checkpoint_elements(shape)}, real) : none();
  if (wants_checkpoints) checkpoints.narrow(0, checkpoints.numel() - 2, 2).zero_();
  if (shape.neurons() > 0) {
    with_scalar(x_seq.scalar_type(), [&](auto scalar) {
      using Scalar = decltype(scalar);
      using Real = Real_t<Scalar>;
      ForwardParams<Scalar> params{};
      call.fill(params);
      params.s_seq = pointer<Scalar>(s_seq);
      params.v_last = pointer<Real>(v_last);
      params.v_seq = pointer<Real>(v_seq);
      params.h_seq = pointer<Real>(h_seq);
      params.checkpoints = pointer<Real>(checkpoints);
      backend.launch_forward(call.surrogate(), call.hard_reset(), params);
    });
  }
  return {s_seq, v_last, v_seq, h_seq, checkpoints};
}

template <class Backend>
std::tuple<Tensor, Tensor, std::vector<Tensor>> lif_backward(const c10::List<OptionalTensor>& grads,
                                                             const Tensor& x_seq, const OptionalTensor& v_init,
                                                             const OptionalTensor& rng_state, const Tensor& checkpoints,
                                                             const c10::List<OptionalTensor>& parameters,
                                                             at::ArrayRef<double> numbers, at::IntArrayRef rules,
                                                             std::array<bool, 2 + kNumParameters> wanted) {
  const Call call(x_seq, v_init, rng_state, parameters, numbers, rules);
  TORCH_CHECK_VALUE(grads.size() == 4, "asgl_cuda: expected 4 gradients, got ", grads.size());
  const bool wants_x_seq = wanted[0], wants_v_init = wanted[1];
  const auto wants_parameter = [&](int id) { return wanted[2 + id] && parameters.get(id).has_value(); };
  const Backend backend(x_seq);
  const Layout& layout = call.layout();
  const SequenceShape& shape = layout.shape();
  const at::TensorOptions real = call.real_options();
  TORCH_CHECK_VALUE(checkpoints.scalar_type() == real_type(x_seq) && checkpoints.is_contiguous() &&
                        checkpoints.numel() == checkpoint_elements(shape),
                    "asgl_cuda: checkpoints do not belong to this x_seq");
  const auto sequence = [&](const OptionalTensor& grad, at::ScalarType type) -> OptionalTensor {
    if (!grad.has_value()) return std::nullopt;
    return layout.match_sequence(grad->to(type));
  };
  const OptionalTensor grad_s_seq = sequence(grads[0], x_seq.scalar_type());
  const OptionalTensor given_v_last = grads[1];
  const OptionalTensor grad_v_last =
      given_v_last.has_value() ? OptionalTensor(layout.match_state(given_v_last->to(real_type(x_seq)))) : std::nullopt;
  const OptionalTensor grad_v_seq = sequence(grads[2], real_type(x_seq));
  const OptionalTensor grad_h_seq = sequence(grads[3], real_type(x_seq));

  const Tensor grad_x_seq = wants_x_seq ? layout.empty_sequence(x_seq.options()) : at::empty({0}, x_seq.options());
  const Tensor grad_v_init = wants_v_init ? layout.empty_state(real) : at::empty({0}, real);
  std::vector<Tensor> grad_parameters;
  for (int id = 0; id < kNumParameters; ++id) {
    grad_parameters.push_back(wants_parameter(id) ? call.parameter(id).empty_gradient() : at::empty({0}, real));
  }
  if (shape.neurons() == 0) {
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wants_parameter(id)) continue;
      grad_parameters[id] = call.parameter(id).gradient_in_own_shape(grad_parameters[id].zero_());
    }
    return {grad_x_seq, grad_v_init, grad_parameters};
  }
  with_scalar(x_seq.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    BackwardParams<Scalar> params{};
    call.fill(params);
    params.grad_s_seq = const_pointer<Scalar>(grad_s_seq);
    params.grad_v_last = const_pointer<Real>(grad_v_last);
    params.grad_v_seq = const_pointer<Real>(grad_v_seq);
    params.grad_h_seq = const_pointer<Real>(grad_h_seq);
    params.checkpoints = const_pointer<Real>(checkpoints);
    params.grad_x_seq = pointer<Scalar>(grad_x_seq);
    params.grad_v_init = pointer<Real>(grad_v_init);
    const TilePlan plan = backend.backward_tiles(params);
    Tensor partials[kNumParameters];
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wants_parameter(id)) continue;
      const auto& view = params.parameters[id];
      const int64 slots = shape.neurons() / view.inner + plan.tiles;
      partials[id] = at::empty({view.step_stride != 0 ? shape.steps : 1, slots}, real);
      params.partials[id] = {pointer<Real>(partials[id]), slots};
    }
    backend.launch_backward(call.surrogate(), call.hard_reset(), params);
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wants_parameter(id)) continue;
      backend.launch_gradient_sum(GradientSum<Real>{params.partials[id], params.parameters[id], shape, plan.tile,
                                                    id == kWidth, pointer<Real>(grad_parameters[id])});
      grad_parameters[id] = call.parameter(id).gradient_in_own_shape(grad_parameters[id]);
    }
  });
  return {grad_x_seq, grad_v_init, grad_parameters};
}

// (seed, offset) from the default generator of the device. An operator of its own, so that a compiled graph draws the
// same numbers as eager mode. `fresh` is a newly allocated tensor, of which only type, shape and device count:
// compilers merge equal calls of an operator and leave allocations apart, and so two draws stay two.
inline Tensor draw_rng_state(const Tensor& fresh) {
  return at::randint(std::numeric_limits<int64_t>::max(), {2}, fresh.options());
}

// The schemas are in asgl_cuda/ops.py.
template <class Backend>
void implement(torch::Library& m) {
  m.impl("draw_rng_state", draw_rng_state);
  m.impl("lif_forward", lif_forward<Backend>);
  m.impl("lif_backward", lif_backward<Backend>);
}

}  // namespace asgl::ops
