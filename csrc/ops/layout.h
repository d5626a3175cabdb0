// Memory layouts of tensors as kernels see them: x_seq as (outer, steps, inner), a parameter as [steps or 1, count].
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "ops/huge_pages.h"
#include "params/neuron.h"
#include "params/normalisation.h"

namespace asgl::ops {

using at::Tensor;

// x_seq is contiguous or channels_last: the channels, the second non-time dimension, innermost.
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

  // A sequence in the memory order of x_seq.
  Tensor empty_sequence(const at::TensorOptions& options) const { return empty(sizes_, order_, options); }

  Tensor match_sequence(const Tensor& tensor, const char* name) const {
    check_sizes(tensor, sizes_, name);
    return dense(tensor, order_);
  }

  // A tensor of x_seq's shape without time, stored in the order of the neurons; a state of several members has them
  // in front.
  Tensor empty_state(const at::TensorOptions& options, int64_t members = 1) const {
    return empty(state_sizes(members), state_order(members), options);
  }

  Tensor match_state(const Tensor& tensor, const char* name, int64_t members = 1) const {
    check_sizes(tensor, state_sizes(members), name);
    return dense(tensor, state_order(members));
  }

 private:
  std::vector<int64_t> state_sizes(int64_t members) const {
    auto sizes = sizes_;
    sizes.erase(sizes.begin() + time_dim_);
    if (members > 1) sizes.insert(sizes.begin(), members);
    return sizes;
  }
  std::vector<int64_t> state_order(int64_t members) const {
    auto order = neuron_order_;
    for (int64_t& dim : order) dim += (members > 1) - (dim > time_dim_);
    if (members > 1) order.insert(order.begin(), 0);
    return order;
  }
  // Stored with the dimensions in `order`, outermost first. Not a permuted view: autograd refuses to change or detach a
  // view in place.
  static Tensor empty(at::IntArrayRef sizes, const std::vector<int64_t>& order, const at::TensorOptions& options) {
    return in_huge_pages(at::empty_strided(sizes, strides_of(sizes, order), options));
  }
  static void check_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes, const char* name) {
    TORCH_CHECK_VALUE(tensor.sizes() == sizes, "asgl_cuda: ", name, " must have shape ", at::IntArrayRef(sizes),
                      ", got ", tensor.sizes());
  }
  static Tensor dense(const Tensor& tensor, const std::vector<int64_t>& order) {
    if (tensor.strides() == strides_of(tensor.sizes(), order)) return tensor;
    std::vector<int64_t> inverse(order.size());
    for (size_t i = 0; i < order.size(); ++i) inverse[order[i]] = static_cast<int64_t>(i);
    return tensor.permute(order).contiguous().permute(inverse);
  }
  static at::DimVector strides_of(at::IntArrayRef sizes, const std::vector<int64_t>& order) {
    at::DimVector strides(sizes.size());
    int64_t stride = 1;
    for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
      strides[*dim] = stride;
      stride *= std::max<int64_t>(sizes[*dim], 1);
    }
    return strides;
  }

  std::vector<int64_t> sizes_;
  int64_t time_dim_;
  std::vector<int64_t> order_;         // all dimensions, outermost first
  std::vector<int64_t> neuron_order_;  // the same without time
  SequenceShape shape_;
};

// x_seq as rows of channels * inner columns.
inline ChannelShape channel_shape(const Layout& layout) {
  const int64_t channel = layout.time_dim() <= 1 ? 2 : 1;
  TORCH_CHECK_VALUE(channel < static_cast<int64_t>(layout.sizes().size()),
                    "asgl_cuda: x_seq must have a dimension of channels, got shape ", at::IntArrayRef(layout.sizes()));
  ChannelShape shape = {1, layout.sizes()[channel], 1};
  int64* extent = &shape.rows;
  for (const int64_t dim : layout.order()) {
    if (dim == channel) {
      extent = &shape.inner;
    } else {
      *extent *= layout.sizes()[dim];
    }
  }
  return shape;
}

// The shape of one value a channel, to broadcast against x_seq.
inline at::DimVector channel_sizes(const Layout& layout) {
  const size_t channel = layout.time_dim() <= 1 ? 2 : 1;
  at::DimVector sizes(layout.sizes().size() - channel, 1);
  sizes[0] = layout.sizes()[channel];
  return sizes;
}

// A parameter tensor laid out for ParameterView: [steps or 1, count], count running over a contiguous range of the
// neurons' dimensions. Dimensions inside that range in which the parameter is broadcast are expanded.
class ParameterTensor {
 public:
  ParameterTensor(const Tensor& tensor, const Layout& layout) : sizes_(tensor.sizes().vec()) {
    const int64_t dims = static_cast<int64_t>(layout.sizes().size()), missing = dims - tensor.dim();
    TORCH_CHECK_VALUE(missing >= 0, "asgl_cuda: a parameter has more dimensions than x_seq");
    full_sizes_.assign(missing, 1);
    full_sizes_.insert(full_sizes_.end(), sizes_.begin(), sizes_.end());
    for (int64_t dim = 0; dim < dims; ++dim) {
      TORCH_CHECK_VALUE(full_sizes_[dim] == 1 || full_sizes_[dim] == layout.sizes()[dim],
                        "asgl_cuda: a parameter of shape ", tensor.sizes(),
                        " does not broadcast against x_seq of shape ", at::IntArrayRef(layout.sizes()));
    }
    const auto& order = layout.neuron_order();
    size_t begin = order.size(), end = order.size();
    for (size_t i = 0; i < order.size(); ++i) {
      if (full_sizes_[order[i]] > 1) {
        if (begin == order.size()) begin = i;
        end = i + 1;
      }
    }
    std::vector<int64_t> expanded = full_sizes_;
    for (size_t i = 0; i < order.size(); ++i) {
      if (begin <= i && i < end) {
        expanded[order[i]] = layout.sizes()[order[i]];
        count_ *= layout.sizes()[order[i]];
      } else if (i >= end) {
        inner_ *= layout.sizes()[order[i]];
      }
    }
    if (begin == order.size()) inner_ = layout.shape().neurons();
    per_step_ = full_sizes_[layout.time_dim()] > 1;
    memory_order_.push_back(layout.time_dim());
    memory_order_.insert(memory_order_.end(), order.begin(), order.end());
    as_it_is_ = expanded == full_sizes_;
    int64_t last = -1;
    for (const int64_t dim : memory_order_) {
      if (expanded[dim] == 1) continue;
      as_it_is_ = as_it_is_ && dim > last;
      last = dim;
    }
    data_ = as_it_is_ ? tensor.contiguous()
                      : tensor.reshape(full_sizes_).expand(expanded).permute(memory_order_).contiguous();
  }

  template <class Real>
  ParameterView<Real> view() const {
    return {data_.const_data_ptr<Real>(), Real(0), per_step_ ? count_ : 0, inner_, count_};
  }

  bool per_step() const { return per_step_; }

  Tensor empty_gradient() const { return at::empty_like(data_); }

  // From [steps or 1, count] back to the parameter's own shape.
  Tensor gradient_in_own_shape(const Tensor& gradient) const {
    if (as_it_is_) return gradient;
    std::vector<int64_t> inverse(memory_order_.size());
    for (size_t i = 0; i < memory_order_.size(); ++i) inverse[memory_order_[i]] = static_cast<int64_t>(i);
    return gradient.permute(inverse).sum_to_size(sizes_).contiguous();
  }

 private:
  std::vector<int64_t> sizes_, full_sizes_, memory_order_;
  int64_t inner_ = 1, count_ = 1;
  bool per_step_ = false;
  bool as_it_is_ = false;  // the tensor itself is [steps or 1, count], with no dimension expanded or permuted
  Tensor data_;
};

}  // namespace asgl::ops
