// The operators of batch normalisation: batch_norm_coefficients, batch_norm_update and batch_norm_backward.
#pragma once

#include "ops/call.h"

namespace asgl::ops {

static_assert(sizeof(Moments) == 3 * sizeof(double));

// The shape of x_seq as rows of channels * inner columns.
inline ChannelShape channel_shape(const Layout& layout) {
  const int64_t channel = layout.channel_dim();
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

// The sizes of a tensor with one value per channel, which broadcasts against x_seq.
inline Dims channel_sizes(const Layout& layout) {
  Dims sizes(layout.sizes().size() - layout.channel_dim(), 1);
  sizes[0] = layout.sizes()[layout.channel_dim()];
  return sizes;
}
// The sizes of the coefficients, whose rows broadcast against x_seq.
inline Dims coefficient_sizes(const Layout& layout) {
  Dims sizes = {kNumCoefficients};
  sizes.append(channel_sizes(layout));
  return sizes;
}

// Checks tensors for shape, type and device, and keeps contiguous copies alive until the kernel is launched.
class CheckedTensors {
 public:
  explicit CheckedTensors(at::Device device) : device_(device) {}

  // Points to the elements of a tensor, after the checks. Null if there is no tensor.
  template <class Element>
  const Element* checked_data(const OptionalTensor& tensor, at::IntArrayRef shape, const char* name) {
    if (!tensor.has_value()) return nullptr;
    const auto type = c10::CppTypeToScalarType<Element>::value;
    TORCH_CHECK_VALUE(tensor->sizes() == shape && tensor->scalar_type() == type && tensor->device() == device_,
                      "asgl_cuda: ", name, " must have shape ", shape, " and type ", type, " on ", device_, ", got ",
                      tensor->sizes(), ", ", tensor->scalar_type(), ", ", tensor->device());
    held_.push_back(tensor->contiguous());
    return held_.back().template const_data_ptr<Element>();
  }
  // Points to the moments in a float64 tensor [..., 3], after the checks. Null if there is no tensor.
  const Moments* checked_moments(const OptionalTensor& tensor, at::IntArrayRef shape, const char* name) {
    return reinterpret_cast<const Moments*>(checked_data<double>(tensor, shape, name));
  }

 private:
  const at::Device device_;
  std::vector<Tensor> held_;
};

// Points to the elements of a float64 tensor [..., 3] of counts, means and variances.
inline Moments* as_moments(const Tensor& tensor) {
  return reinterpret_cast<Moments*>(tensor.mutable_data_ptr<double>());
}

// The running statistics, which training updates; there are none if `mean` has no tensor.
struct RunningStatistics {
  OptionalTensor mean, variance, num_batches_tracked;
  double momentum;

  // Throws unless the tensors have the shape, type and device that kernels need.
  void check(int64_t channels, const Layout& layout) const {
    if (!mean.has_value()) return;
    const at::Device device = layout.options().device();
    for (const Tensor& each : {*mean, *variance}) {
      TORCH_CHECK_VALUE(each.sizes() == at::IntArrayRef(channels) && each.is_contiguous() &&
                            each.scalar_type() == layout.real() && each.device() == device,
                        "asgl_cuda: running statistics must be contiguous and have shape ", channels, " and type ",
                        layout.real(), " on ", device, ", got ", each.sizes(), ", ", each.scalar_type(), ", ",
                        each.device());
    }
    TORCH_CHECK_VALUE(!num_batches_tracked.has_value() ||
                          (num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1 &&
                           num_batches_tracked->device() == device),
                      "asgl_cuda: num_batches_tracked must be an int64 tensor of one element on ", device);
  }

  // Sets the fields of params for the running statistics.
  template <class Real>
  void set_params(CoefficientsParams<Real>& params) const {
    if (!mean.has_value()) return;
    params.running_mean = mean->mutable_data_ptr<Real>();
    params.running_var = variance->mutable_data_ptr<Real>();
    params.momentum = static_cast<Real>(momentum);
    if (num_batches_tracked.has_value()) {
      params.num_batches_tracked = reinterpret_cast<int64*>(num_batches_tracked->mutable_data_ptr<int64_t>());
    }
  }
};

// Returns the coefficients, and the moments [channels, 3] from which the coefficients are computed. These moments are
// those of all processes together if `statistics` has the moments of each process. Otherwise they are `mean` and
// `variance` if given, or else the moments of x_seq. Updates the running statistics, if there are any.
inline std::tuple<Tensor, Tensor> batch_norm_coefficients(const Launcher* launcher, const RunningStatistics& running,
                                                          const Tensor& x_seq, const OptionalTensor& statistics,
                                                          const OptionalTensor& mean, const OptionalTensor& variance,
                                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                                          double eps, double input_scale, int64_t time_dim) {
  const Layout layout(x_seq, time_dim);
  const ChannelShape shape = channel_shape(layout);
  TORCH_CHECK_VALUE(mean.has_value() == variance.has_value(), "asgl_cuda: mean and variance must be given together");
  running.check(shape.channels, layout);
  const Tensor coefficients = at::empty(coefficient_sizes(layout), layout.real_options());
  const at::TensorOptions wide = x_seq.options().dtype(at::kDouble);
  const Tensor total = at::empty({shape.channels, 3}, wide);
  if (shape.channels == 0) return {coefficients, total};
  with_scalar(layout.type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    CoefficientsParams<Real> params{};
    params.channels = shape.channels;
    params.slots = statistics.has_value() && statistics->dim() > 0 ? std::max<int64_t>(statistics->size(0), 1) : 1;
    CheckedTensors tensors(x_seq.device());
    params.moments = tensors.checked_moments(statistics, {params.slots, shape.channels, 3}, "statistics");
    params.mean = tensors.checked_data<Real>(mean, {shape.channels}, "mean");
    params.variance = tensors.checked_data<Real>(variance, {shape.channels}, "variance");
    params.weight = tensors.checked_data<Real>(weight, {shape.channels}, "weight");
    params.bias = tensors.checked_data<Real>(bias, {shape.channels}, "bias");
    params.options = {eps, input_scale};
    params.coefficients = coefficients.mutable_data_ptr<Real>();
    params.total = as_moments(total);
    running.set_params(params);
    const Kernels kernels(launcher, x_seq.device());
    Tensor found;
    if (!statistics.has_value() && !mean.has_value()) {
      const bool empty = shape.rows == 0 || shape.inner == 0;
      MomentsParams<Scalar> own{};
      own.x_seq = data_ptr<const Scalar>(x_seq);
      own.tiles.shape = shape;
      if (!empty) kernels.plan_tiles(own);
      params.slots = empty ? 1 : own.tiles.num_slots();
      found = at::empty({params.slots, shape.channels, 3}, wide);
      params.moments = own.moments = as_moments(found);
      if (empty) {
        found.zero_();
      } else {
        kernels.launch(own);
      }
    }
    kernels.launch(params);
  });
  return {coefficients, total};
}

// Returns the gradients of weight and bias. Writes the gradient of x_seq to grad_x_seq, unless that is empty. On entry
// grad_x_seq contains gain * dh, where dh is the gradient of the normalised input. If grad_residual is given, it
// contains dh, and the contents of grad_x_seq are not read.
inline std::tuple<Tensor, Tensor> batch_norm_backward(const Launcher* launcher, const Tensor& grad_x_seq,
                                                      const OptionalTensor& grad_residual, const Tensor& x_seq,
                                                      const Tensor& coefficients, const Tensor& statistics,
                                                      const Tensor& grad_gain, const Tensor& grad_bias,
                                                      const Tensor& total_grad_gain, const Tensor& total_grad_bias,
                                                      double eps, double input_scale, int64_t time_dim) {
  const Layout layout(x_seq, time_dim);
  const ChannelShape shape = channel_shape(layout);
  const bool wanted = grad_x_seq.numel() > 0, has_residual = wanted && grad_residual.has_value();
  const auto is_like_x_seq = [&](const Tensor& grad) {
    return grad.sizes() == x_seq.sizes() && grad.permute(layout.order()).is_contiguous() &&
           grad.scalar_type() == x_seq.scalar_type() && grad.device() == x_seq.device();
  };
  if (!wanted) layout.check_type_and_device(grad_x_seq, layout.type(), "grad_x_seq");
  TORCH_CHECK_VALUE(!wanted || (is_like_x_seq(grad_x_seq) && (!has_residual || is_like_x_seq(*grad_residual))),
                    "asgl_cuda: grad_x_seq and grad_residual must have the type and memory order of x_seq");
  const Tensor grad_weight = at::empty({shape.channels}, layout.real_options());
  const Tensor grad_shift = at::empty_like(grad_weight);
  if (shape.channels == 0) return {grad_weight, grad_shift};
  with_scalar(layout.type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    InputGradientParams<Scalar> params{};
    params.tiles.shape = wanted ? shape : ChannelShape{0, shape.channels, 1};
    params.x_seq = data_ptr<const Scalar>(x_seq);
    params.grad_x_seq = data_ptr<Scalar>(grad_x_seq);
    params.grad_residual = has_residual ? data_ptr<const Scalar>(*grad_residual) : nullptr;
    const Dims by_channel = channel_sizes(layout);
    CheckedTensors tensors(x_seq.device());
    params.coefficients = tensors.checked_data<Real>(coefficients, coefficient_sizes(layout), "coefficients");
    params.moments = tensors.checked_moments(statistics, {shape.channels, 3}, "statistics");
    params.grad_gain = tensors.checked_data<Real>(grad_gain, by_channel, "grad_gain");
    params.grad_bias = tensors.checked_data<Real>(grad_bias, by_channel, "grad_bias");
    params.total_grad_gain = tensors.checked_data<Real>(total_grad_gain, by_channel, "total_grad_gain");
    params.total_grad_bias = tensors.checked_data<Real>(total_grad_bias, by_channel, "total_grad_bias");
    params.options = {eps, input_scale};
    params.grad_weight = grad_weight.mutable_data_ptr<Real>();
    params.grad_shift = grad_shift.mutable_data_ptr<Real>();
    if (has_residual) request_huge_pages(grad_x_seq);  // still untouched
    const Kernels kernels(launcher, x_seq.device());
    kernels.plan_tiles(params);
    kernels.launch(params);
  });
  return {grad_weight, grad_shift};
}

// Registers `run` as two operators: batch_norm_coefficients, and batch_norm_update, which also updates the running
// statistics.
template <class Library, class... Arguments>
void register_coefficient_operators(Library& m, const Launcher* launcher,
                                    std::tuple<Tensor, Tensor> (*run)(const Launcher*, const RunningStatistics&,
                                                                      Arguments...)) {
  m.impl("batch_norm_coefficients", [=](Arguments... arguments) { return run(launcher, {}, arguments...); });
  m.impl("batch_norm_update", [=](const Tensor& running_mean, const Tensor& running_var,
                                  const OptionalTensor& num_batches_tracked, double momentum, Arguments... arguments) {
    return run(launcher, {running_mean, running_var, num_batches_tracked, momentum}, arguments...);
  });
}

// Registers the operators of this file. `m` is a torch::Library or has its interface.
template <class Library>
void register_batch_norm_operators(Library& m, const Launcher* launcher) {
  register_coefficient_operators(m, launcher, &batch_norm_coefficients);
  m.impl("batch_norm_backward", bind_launcher(launcher, &batch_norm_backward));
}

}  // namespace asgl::ops
