// Memory layouts of tensors as kernels read them: x_seq as (outer, steps, inner), a parameter as [steps or 1, count].
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "ops/huge_pages.h"
#include "params/neuron.h"

namespace asgl::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Dims = at::DimVector;

// The type of state, arithmetic and parameters.
inline at::ScalarType real_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// The inverse of a permutation of dimensions.
inline Dims inverse_of(const Dims& order) {
  Dims inverse(order.size());
  for (size_t i = 0; i < order.size(); ++i) inverse[order[i]] = static_cast<int64_t>(i);
  return inverse;
}

// The layout of x_seq, which is contiguous or channels_last. The dimension of the channels is the second one, not
// counting time. In channels_last it is the innermost one in memory. Other tensors are checked against x_seq and
// brought to its memory order.
class Layout {
 public:
  Layout(const Tensor& x_seq, int64_t time_dim)
      : sizes_(x_seq.sizes().begin(), x_seq.sizes().end()), time_dim_(time_dim), options_(x_seq.options()) {
    const int64_t dims = x_seq.dim();
    TORCH_CHECK_VALUE(0 <= time_dim && time_dim < dims, "asgl_cuda: time_dim must be in [0, ", dims, "), got ",
                      time_dim);
    for (int64_t dim = 0; dim < dims; ++dim) order_.push_back(dim);
    if (!x_seq.is_contiguous()) {
      TORCH_CHECK_VALUE(channel_dim() < dims, "asgl_cuda: x_seq must be contiguous or channels_last");
      order_.erase(order_.begin() + channel_dim());
      order_.push_back(channel_dim());
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

  // The shape of x_seq as (outer, steps, inner).
  const SequenceShape& shape() const { return shape_; }
  const Dims& sizes() const { return sizes_; }
  // The dimensions of x_seq in memory order, outermost first.
  const Dims& order() const { return order_; }
  // The same without time.
  const Dims& neuron_order() const { return neuron_order_; }
  int64_t time_dim() const { return time_dim_; }
  // The dimension of the channels, the second one apart from time.
  int64_t channel_dim() const { return time_dim_ <= 1 ? 2 : 1; }
  // Options and type of x_seq.
  const at::TensorOptions& options() const { return options_; }
  at::ScalarType type() const { return c10::typeMetaToScalarType(options_.dtype()); }
  // Type and options of states, parameters and their gradients.
  at::ScalarType real() const { return real_type(type()); }
  at::TensorOptions real_options() const { return options_.dtype(real()); }

  // An uninitialised tensor with the shape and memory order of x_seq.
  Tensor empty_sequence(at::ScalarType type) const { return empty(sizes_, order_, options_.dtype(type)); }
  // An uninitialised tensor with the shape of x_seq without time, in the memory order of x_seq. Several states are in
  // one tensor, [num_states, ...].
  Tensor empty_state(int64_t num_states = 1) const {
    return empty(state_sizes(num_states), state_order(num_states), real_options());
  }

  // Returns the given sequence or state in the memory order of x_seq, after checks of type, device and shape. Copies it
  // only if needed. Returns an undefined tensor if none is given.
  Tensor checked_sequence(const OptionalTensor& given, at::ScalarType type, const char* name) const {
    return is_given(given) ? in_memory_order(*given, type, sizes_, order_, name) : Tensor();
  }
  Tensor checked_state(const OptionalTensor& given, const char* name, int64_t num_states = 1) const {
    if (!is_given(given)) return {};
    return in_memory_order(*given, real(), state_sizes(num_states), state_order(num_states), name);
  }

  // Throws unless the tensor has this type and is on the device of x_seq.
  void check_type_and_device(const Tensor& tensor, at::ScalarType type, const char* name) const {
    TORCH_CHECK_TYPE(tensor.scalar_type() == type, "asgl_cuda: ", name, " must have type ", type, ", got ",
                     tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.device() == options_.device(), "asgl_cuda: ", name, " must be on ", options_.device(),
                      ", got ", tensor.device());
  }
  // Throws unless the tensor has this type and these sizes, and is on the device of x_seq.
  void check(const Tensor& tensor, at::ScalarType type, at::IntArrayRef sizes, const char* name) const {
    check_type_and_device(tensor, type, name);
    TORCH_CHECK_VALUE(tensor.sizes() == sizes, "asgl_cuda: ", name, " must have shape ", sizes, ", got ",
                      tensor.sizes());
  }

 private:
  static bool is_given(const OptionalTensor& given) { return given.has_value() && given->defined(); }
  // The sizes of a tensor of states: those of x_seq without time, after num_states if there are several states.
  Dims state_sizes(int64_t num_states) const {
    Dims sizes = sizes_;
    sizes.erase(sizes.begin() + time_dim_);
    if (num_states > 1) sizes.insert(sizes.begin(), num_states);
    return sizes;
  }
  // The dimensions of a tensor of states in memory order, outermost first.
  Dims state_order(int64_t num_states) const {
    Dims order = neuron_order_;
    for (int64_t& dim : order) dim += (num_states > 1) - (dim > time_dim_);
    if (num_states > 1) order.insert(order.begin(), 0);
    return order;
  }
  // An uninitialised tensor whose dimensions are stored in `order`, outermost first. It is not a permuted view, because
  // autograd refuses detach_() and some other in-place operations on views.
  static Tensor empty(const Dims& sizes, const Dims& order, const at::TensorOptions& options) {
    return request_huge_pages(at::empty_strided(sizes, strides_of(sizes, order), options));
  }
  // The tensor in this memory order, after `check`; copied only if needed.
  Tensor in_memory_order(const Tensor& given, at::ScalarType type, const Dims& sizes, const Dims& order,
                         const char* name) const {
    check(given, type, sizes, name);
    if (given.strides() == at::IntArrayRef(strides_of(sizes, order))) return given;
    return given.permute(order).contiguous().permute(inverse_of(order));
  }
  // The strides of a dense tensor whose dimensions are stored in `order`.
  static Dims strides_of(const Dims& sizes, const Dims& order) {
    Dims strides(sizes.size());
    int64_t stride = 1;
    for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
      strides[*dim] = stride;
      stride *= std::max<int64_t>(sizes[*dim], 1);
    }
    return strides;
  }

  Dims sizes_;
  int64_t time_dim_;
  at::TensorOptions options_;
  Dims order_;         // all dimensions, outermost first
  Dims neuron_order_;  // the same without time
  SequenceShape shape_;
};

// A parameter tensor in the layout of ParameterView, [steps or 1, count]. `count` covers the dimensions of the neurons,
// in memory order, from the first to the last along which the parameter varies. If the parameter is broadcast along a
// dimension between these two, it is expanded there. A parameter of one dimension belongs to the dimension of x_seq
// that has `trailing` dimensions after it.
class ParameterTensor {
 public:
  ParameterTensor(const Tensor& tensor, const Layout& layout, int64_t trailing)
      : sizes_(tensor.sizes().begin(), tensor.sizes().end()) {
    const int64_t dims = static_cast<int64_t>(layout.sizes().size());
    TORCH_CHECK_VALUE(tensor.dim() <= dims, "asgl_cuda: a parameter must have at most ", dims,
                      " dimensions, as x_seq, got ", tensor.dim());
    TORCH_CHECK_VALUE(0 <= trailing && trailing < dims, "asgl_cuda: trailing must be in [0, ", dims, "), got ",
                      trailing);
    Dims full_sizes(dims, 1);
    std::copy(sizes_.rbegin(), sizes_.rend(), full_sizes.rbegin() + (tensor.dim() == 1 ? trailing : 0));
    for (int64_t dim = 0; dim < dims; ++dim) {
      TORCH_CHECK_VALUE(full_sizes[dim] == 1 || full_sizes[dim] == layout.sizes()[dim],
                        "asgl_cuda: a parameter of shape ", tensor.sizes(),
                        " does not broadcast against x_seq of shape ", at::IntArrayRef(layout.sizes()));
    }
    // [begin, end): the neurons' dimensions, in memory order, from the first to the last along which the parameter
    // varies. If it varies along none of them, inner_ is the number of neurons.
    const Dims& order = layout.neuron_order();
    size_t begin = order.size(), end = order.size();
    for (size_t i = 0; i < order.size(); ++i) {
      if (full_sizes[order[i]] > 1) {
        if (begin == order.size()) begin = i;
        end = i + 1;
      }
    }
    Dims expanded = full_sizes;
    for (size_t i = 0; i < order.size(); ++i) {
      if (begin <= i && i < end) {
        expanded[order[i]] = layout.sizes()[order[i]];
        count_ *= layout.sizes()[order[i]];
      } else if (i >= end) {
        inner_ *= layout.sizes()[order[i]];
      }
    }
    if (begin == order.size()) inner_ = layout.shape().neurons();
    is_per_step_ = full_sizes[layout.time_dim()] > 1;
    memory_order_.push_back(layout.time_dim());
    memory_order_.append(order);
    // The tensor keeps its own shape if no dimension is expanded and the dimensions are in memory order.
    is_stored_as_given_ = expanded == full_sizes;
    int64_t last = -1;
    for (const int64_t dim : memory_order_) {
      if (expanded[dim] == 1) continue;
      is_stored_as_given_ = is_stored_as_given_ && dim > last;
      last = dim;
    }
    data_ = is_stored_as_given_ ? tensor.contiguous()
                                : tensor.reshape(full_sizes).expand(expanded).permute(memory_order_).contiguous();
  }

  // The parameter, as kernels take it.
  template <class Real>
  ParameterView<Real> view() const {
    return {data_.const_data_ptr<Real>(), Real(0), is_per_step_ ? count_ : 0, inner_, count_};
  }

  // Whether the parameter changes over time.
  bool is_per_step() const { return is_per_step_; }

  // An uninitialised tensor [steps or 1, count] for the gradient.
  Tensor empty_gradient() const { return at::empty_like(data_); }

  // Converts a gradient [steps or 1, count] to the shape of the parameter.
  Tensor gradient_in_own_shape(const Tensor& gradient) const {
    if (is_stored_as_given_) return gradient;
    return gradient.permute(inverse_of(memory_order_)).sum_to_size(sizes_).contiguous();
  }

 private:
  Dims sizes_, memory_order_;
  int64_t inner_ = 1, count_ = 1;
  bool is_per_step_ = false;
  bool is_stored_as_given_ = false;  // the tensor itself is [steps or 1, count], with no dimension expanded or permuted
  Tensor data_;
};

}  // namespace asgl::ops
