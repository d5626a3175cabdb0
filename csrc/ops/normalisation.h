// The operators of batch normalisation as templates over the kernels, CpuKernels or CudaKernels.
#pragma once

#include "ops/call.h"
#include "ops/launched.h"

namespace asgl::ops {

static_assert(sizeof(Moments) == 3 * sizeof(double));

// The elements of a tensor, checked for shape, type and device; null for no tensor.
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

// The running statistics of training; none without a mean.
struct Running {
  OptionalTensor mean, variance, num_batches_tracked;
  double momentum;

  void check(int64_t channels, const Tensor& x_seq) const {
    if (!mean.has_value()) return;
    for (const Tensor& each : {*mean, *variance}) {
      TORCH_CHECK_VALUE(each.sizes() == at::IntArrayRef(channels) && each.is_contiguous() &&
                            each.scalar_type() == real_type(x_seq) && each.device() == x_seq.device(),
                        "asgl_cuda: running statistics must be contiguous and have shape ", channels, " and type ",
                        real_type(x_seq), " on ", x_seq.device(), ", got ", each.sizes(), ", ", each.scalar_type(),
                        ", ", each.device());
    }
    TORCH_CHECK_VALUE(!num_batches_tracked.has_value() ||
                          (num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1 &&
                           num_batches_tracked->device() == x_seq.device()),
                      "asgl_cuda: num_batches_tracked must be one int64 on ", x_seq.device());
  }

  template <class Real>
  void fill(CoefficientsParams<Real>& params) const {
    if (!mean.has_value()) return;
    params.running_mean = mean->mutable_data_ptr<Real>();
    params.running_var = variance->mutable_data_ptr<Real>();
    params.momentum = static_cast<Real>(momentum);
    if (num_batches_tracked.has_value()) {
      params.num_batches_tracked = reinterpret_cast<int64*>(num_batches_tracked->mutable_data_ptr<int64_t>());
    }
  }
};

template <class Kernels>
std::tuple<Tensor, Tensor> batch_norm_coefficients(const Kernels& kernels, const Running& running, const Tensor& x_seq,
                                                   const OptionalTensor& statistics, const OptionalTensor& mean,
                                                   const OptionalTensor& variance, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, double eps, double input_scale,
                                                   int64_t time_dim) {
  const Layout layout(x_seq, time_dim);
  const ChannelShape shape = channel_shape(layout);
  TORCH_CHECK_VALUE(mean.has_value() == variance.has_value(), "asgl_cuda: mean and variance come together");
  running.check(shape.channels, x_seq);
  at::DimVector sizes = {kNumCoefficients};
  sizes.append(channel_sizes(layout));
  const Tensor coefficients = at::empty(sizes, x_seq.options().dtype(real_type(x_seq)));
  const at::TensorOptions wide = x_seq.options().dtype(at::kDouble);
  const Tensor total = at::empty({shape.channels, 3}, wide);
  if (shape.channels == 0) return {coefficients, total};
  with_scalar(x_seq.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    const int64_t processes =
        statistics.has_value() && statistics->dim() > 0 ? std::max<int64_t>(statistics->size(0), 1) : 1;
    const Checked<double> given(statistics, {processes, shape.channels, 3}, x_seq, "statistics");
    const Checked<Real> given_mean(mean, {shape.channels}, x_seq, "mean");
    const Checked<Real> given_variance(variance, {shape.channels}, x_seq, "variance");
    const Checked<Real> given_weight(weight, {shape.channels}, x_seq, "weight");
    const Checked<Real> given_bias(bias, {shape.channels}, x_seq, "bias");
    const auto backend = kernels.on(x_seq);
    Tensor found;
    CoefficientsParams<Real> params{};
    if (statistics.has_value()) {
      params.moments = as_moments(given.data());
      params.slots = processes;
    } else if (!mean.has_value()) {
      const bool empty = shape.rows == 0 || shape.inner == 0;
      MomentsParams<Scalar> own{};
      own.x_seq = const_pointer<Scalar>(x_seq);
      own.tiles.shape = shape;
      if (!empty) backend.plan_tiles(own);
      params.slots = empty ? 1 : own.tiles.slots();
      found = at::empty({params.slots, shape.channels, 3}, wide);
      own.moments = as_moments(found);
      if (empty) {
        found.zero_();
      } else {
        backend.launch(own);
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
    running.fill(params);
    backend.launch(params);
  });
  return {coefficients, total};
}

template <class Kernels>
std::tuple<Tensor, Tensor> batch_norm_backward(const Kernels& kernels, const Tensor& grad_x_seq,
                                               const OptionalTensor& grad_residual, const Tensor& x_seq,
                                               const Tensor& coefficients, const Tensor& statistics,
                                               const Tensor& grad_gain, const Tensor& grad_bias,
                                               const Tensor& total_grad_gain, const Tensor& total_grad_bias, double eps,
                                               double input_scale, int64_t time_dim) {
  const Layout layout(x_seq, time_dim);
  const ChannelShape shape = channel_shape(layout);
  const bool wanted = grad_x_seq.numel() > 0, has_residual = wanted && grad_residual.has_value();
  const auto is_like_x_seq = [&](const Tensor& grad) {
    return grad.sizes() == x_seq.sizes() && grad.permute(layout.order()).is_contiguous() &&
           grad.scalar_type() == x_seq.scalar_type() && grad.device() == x_seq.device();
  };
  if (!wanted) check_type(grad_x_seq, x_seq.scalar_type(), x_seq, "grad_x_seq");
  TORCH_CHECK_VALUE(!wanted || (is_like_x_seq(grad_x_seq) && (!has_residual || is_like_x_seq(*grad_residual))),
                    "asgl_cuda: grad_x_seq and grad_residual must have the type and memory order of x_seq");
  const at::TensorOptions real = x_seq.options().dtype(real_type(x_seq));
  const Tensor grad_weight = at::empty({shape.channels}, real), grad_shift = at::empty({shape.channels}, real);
  if (shape.channels == 0) return {grad_weight, grad_shift};
  with_scalar(x_seq.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    const at::DimVector by_channel = channel_sizes(layout);
    at::DimVector sizes = {kNumCoefficients};
    sizes.append(by_channel);
    const Checked<Real> given_coefficients(coefficients, sizes, x_seq, "coefficients");
    const Checked<double> given_statistics(statistics, {shape.channels, 3}, x_seq, "statistics");
    const Checked<Real> own_gain(grad_gain, by_channel, x_seq, "grad_gain");
    const Checked<Real> own_bias(grad_bias, by_channel, x_seq, "grad_bias");
    const Checked<Real> all_gain(total_grad_gain, by_channel, x_seq, "total_grad_gain");
    const Checked<Real> all_bias(total_grad_bias, by_channel, x_seq, "total_grad_bias");
    const auto backend = kernels.on(x_seq);
    InputGradientParams<Scalar> params{};
    params.tiles.shape = wanted ? shape : ChannelShape{0, shape.channels, 1};
    params.x_seq = const_pointer<Scalar>(x_seq);
    params.grad_x_seq = pointer<Scalar>(grad_x_seq);
    params.grad_residual = has_residual ? const_pointer<Scalar>(grad_residual) : nullptr;
    params.moments = as_moments(given_statistics.data());
    params.coefficients = given_coefficients.data();
    params.grad_gain = own_gain.data();
    params.grad_bias = own_bias.data();
    params.total_grad_gain = all_gain.data();
    params.total_grad_bias = all_bias.data();
    params.options = {eps, input_scale};
    params.grad_weight = grad_weight.mutable_data_ptr<Real>();
    params.grad_shift = grad_shift.mutable_data_ptr<Real>();
    if (has_residual) in_huge_pages(grad_x_seq);  // still untouched
    backend.plan_tiles(params);
    backend.launch(params);
  });
  return {grad_weight, grad_shift};
}

// The operator without running statistics, and the one that updates them.
template <class Library, class Kernels, class... Arguments>
void implement_coefficients(Library& m, const Kernels& kernels,
                            std::tuple<Tensor, Tensor> (*run)(const Kernels&, const Running&, Arguments...)) {
  m.impl("batch_norm_coefficients", [=](Arguments... arguments) { return run(kernels, {}, arguments...); });
  m.impl("batch_norm_update", [=](const Tensor& running_mean, const Tensor& running_var,
                                  const OptionalTensor& num_batches_tracked, double momentum, Arguments... arguments) {
    return run(kernels, {running_mean, running_var, num_batches_tracked, momentum}, arguments...);
  });
}

// The schemas are in asgl_cuda/ops.py.
template <class Kernels, class Library>
void implement_batch_norm(Library& m, const Kernels& kernels) {
  implement_coefficients(m, kernels, &batch_norm_coefficients<Kernels>);
  m.impl("batch_norm_backward", on_kernels(kernels, &batch_norm_backward<Kernels>));
}

}  // namespace asgl::ops
