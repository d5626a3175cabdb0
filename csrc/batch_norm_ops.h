// The operators of batch normalisation are templates over the backend like the operators of ops.h, which says who
// checks arguments.
//
// A Backend has channel_tiles(shape, x_seq, grad_x_seq), which says how the values will be cut, and launch_moments,
// launch_coefficients, launch_adjoint and launch_input_gradient, each of its parameters.
#pragma once

#include "batch_norm_launch.h"
#include "ops.h"

namespace asgl::ops {

static_assert(sizeof(Moments) == 3 * sizeof(double));

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

// The elements of a tensor that must have this shape, or null where there is none.
template <class Element>
class Checked {
 public:
  Checked(const OptionalTensor& tensor, at::IntArrayRef shape, const Tensor& x_seq, const char* name) {
    if (!tensor.has_value()) return;
    const auto type = c10::CppTypeToScalarType<Element>::value;
    TORCH_CHECK_VALUE(tensor->sizes() == shape && tensor->scalar_type() == type && tensor->device() == x_seq.device(),
                      "asgl_cuda: ", name, " must have shape ", shape, " and type ", type, " on ", x_seq.device(),
                      ", got ", tensor->sizes(), ", ", tensor->scalar_type(), ", ", tensor->device());
    tensor_ = tensor->contiguous();
  }

  const Element* data() const { return tensor_.defined() ? tensor_.template const_data_ptr<Element>() : nullptr; }

 private:
  Tensor tensor_;
};

inline const Moments* as_moments(const double* numbers) { return reinterpret_cast<const Moments*>(numbers); }
inline Moments* as_moments(const Tensor& tensor) {
  return reinterpret_cast<Moments*>(tensor.mutable_data_ptr<double>());
}

template <class Backend>
std::tuple<Tensor, Tensor> batch_norm_coefficients(const Tensor& x_seq, const OptionalTensor& statistics,
                                                   const OptionalTensor& mean, const OptionalTensor& variance,
                                                   const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                   double input_scale, int64_t time_dim) {
  const Layout layout(x_seq, time_dim);
  const ChannelShape shape = channel_shape(layout);
  TORCH_CHECK_VALUE(mean.has_value() == variance.has_value(), "asgl_cuda: mean and variance come together");
  const Backend backend(x_seq);
  const Tensor coefficients = at::empty({kNumCoefficients, shape.channels}, x_seq.options().dtype(real_type(x_seq)));
  const at::TensorOptions wide = x_seq.options().dtype(at::kDouble);
  const Tensor total = at::empty({shape.channels, 3}, wide);
  if (shape.channels == 0) return {coefficients, total};
  with_scalar(x_seq.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    const int64_t processes = statistics.has_value() ? statistics->size(0) : 0;
    const Checked<double> given(statistics, {processes, shape.channels, 3}, x_seq, "statistics");
    const Checked<Real> given_mean(mean, {shape.channels}, x_seq, "mean");
    const Checked<Real> given_variance(variance, {shape.channels}, x_seq, "variance");
    const Checked<Real> given_weight(weight, {shape.channels}, x_seq, "weight");
    const Checked<Real> given_bias(bias, {shape.channels}, x_seq, "bias");
    Tensor found;
    CoefficientsParams<Real> params{};
    if (statistics.has_value()) {
      params.moments = as_moments(given.data());
      params.slots = processes;
    } else if (!mean.has_value()) {
      const bool empty = shape.rows == 0 || shape.inner == 0;
      MomentsParams<Scalar> own{};
      own.x_seq = const_pointer<Scalar>(x_seq);
      if (!empty) own.tiles = backend.channel_tiles(shape, own.x_seq, static_cast<const Scalar*>(nullptr));
      params.slots = empty ? 1 : own.tiles.slots();
      found = at::empty({params.slots, shape.channels, 3}, wide);
      own.moments = as_moments(found);
      if (empty) {
        found.zero_();
      } else {
        backend.launch_moments(own);
      }
      params.moments = own.moments;
    }
    params.channels = shape.channels;
    params.mean = given_mean.data();
    params.variance = given_variance.data();
    params.weight = given_weight.data();
    params.bias = given_bias.data();
    params.options = {eps, input_scale};
    params.coefficients = coefficients.mutable_data_ptr<Real>();
    params.total = as_moments(total);
    backend.launch_coefficients(params);
  });
  return {coefficients, total};
}

template <class Backend>
std::tuple<Tensor, Tensor> batch_norm_backward(const Tensor& grad_x_seq, const Tensor& x_seq,
                                               const Tensor& coefficients, const Tensor& statistics,
                                               const Tensor& grad_gain, const Tensor& grad_bias,
                                               const Tensor& total_grad_gain, const Tensor& total_grad_bias, double eps,
                                               double input_scale, int64_t time_dim) {
  const Layout layout(x_seq, time_dim);
  const ChannelShape shape = channel_shape(layout);
  const bool wanted = grad_x_seq.numel() > 0;
  TORCH_CHECK_VALUE(
      !wanted || (grad_x_seq.sizes() == x_seq.sizes() && grad_x_seq.permute(layout.order()).is_contiguous() &&
                  grad_x_seq.scalar_type() == x_seq.scalar_type() && grad_x_seq.device() == x_seq.device()),
      "asgl_cuda: grad_x_seq must lie in memory as x_seq does");
  const Backend backend(x_seq);
  const at::TensorOptions real = x_seq.options().dtype(real_type(x_seq));
  const Tensor grad_weight = at::empty({shape.channels}, real), grad_shift = at::empty({shape.channels}, real);
  if (shape.channels == 0) return {grad_weight, grad_shift};
  with_scalar(x_seq.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    const Checked<Real> given_coefficients(coefficients, {kNumCoefficients, shape.channels}, x_seq, "coefficients");
    const Checked<double> given_statistics(statistics, {shape.channels, 3}, x_seq, "statistics");
    const Checked<Real> own_gain(grad_gain, {shape.channels}, x_seq, "grad_gain");
    const Checked<Real> own_bias(grad_bias, {shape.channels}, x_seq, "grad_bias");
    const Checked<Real> all_gain(total_grad_gain, {shape.channels}, x_seq, "total_grad_gain");
    const Checked<Real> all_bias(total_grad_bias, {shape.channels}, x_seq, "total_grad_bias");
    const Tensor adjoint = at::empty({2, shape.channels}, real);
    AdjointParams<Real> params{};
    params.moments = as_moments(given_statistics.data());
    params.coefficients = given_coefficients.data();
    params.channels = shape.channels;
    params.grad_gain = own_gain.data();
    params.grad_bias = own_bias.data();
    params.total_grad_gain = all_gain.data();
    params.total_grad_bias = all_bias.data();
    params.options = {eps, input_scale};
    params.grad_weight = grad_weight.mutable_data_ptr<Real>();
    params.grad_shift = grad_shift.mutable_data_ptr<Real>();
    params.adjoint = adjoint.mutable_data_ptr<Real>();
    backend.launch_adjoint(params);
    if (!wanted) return;
    InputGradientParams<Scalar> pass{};
    pass.x_seq = const_pointer<Scalar>(x_seq);
    pass.grad_x_seq = pointer<Scalar>(grad_x_seq);
    pass.tiles = backend.channel_tiles(shape, pass.x_seq, static_cast<const Scalar*>(pass.grad_x_seq));
    pass.mean = params.coefficients + kCoefficientMean * shape.channels;
    pass.adjoint = params.adjoint;
    backend.launch_input_gradient(pass);
  });
  return {grad_weight, grad_shift};
}

// The schemas are in asgl_cuda/ops.py.
template <class Backend>
void implement_batch_norm(torch::Library& m) {
  m.impl("batch_norm_coefficients", batch_norm_coefficients<Backend>);
  m.impl("batch_norm_backward", batch_norm_backward<Backend>);
}

}  // namespace asgl::ops
