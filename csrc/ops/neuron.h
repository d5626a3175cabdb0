// The operators of the neuron: lif_forward, lif_backward and draw_rng_state.
#pragma once

#include "ops/call.h"

namespace asgl::ops {

// Returns s_seq and the other wanted outputs.
inline std::vector<Tensor> neuron_forward(const Launcher* launcher, const NeuronCall& call,
                                          std::array<bool, 4> wanted) {
  const auto [wants_v_last, wants_v_seq, wants_h_seq, wants_checkpoints] = wanted;
  const Kernels kernels(launcher, call.x_seq.device());
  const Layout& layout = call.layout;
  std::vector<Tensor> results;
  const auto keep = [&](Tensor result) {
    results.push_back(result);
    return result;
  };
  const Tensor s_seq = keep(layout.empty_sequence(layout.type()));
  const Tensor v_last = wants_v_last ? keep(layout.empty_state(call.num_states)) : Tensor();
  const Tensor v_seq = wants_v_seq ? keep(layout.empty_sequence(layout.real())) : Tensor();
  const Tensor h_seq = wants_h_seq ? keep(layout.empty_sequence(layout.real())) : Tensor();
  const int64_t elements = checkpoint_elements(layout.shape(), call.num_states);
  const Tensor checkpoints =
      wants_checkpoints ? keep(request_huge_pages(at::empty({elements}, layout.real_options()))) : Tensor();
  if (layout.shape().neurons() == 0) {
    if (wants_checkpoints) checkpoints.zero_();
    return results;
  }
  with_scalar(layout.type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    auto params = call.params<ForwardParams, Scalar>();
    params.s_seq = data_ptr<Scalar>(s_seq);
    params.v_last = data_ptr<Real>(v_last);
    params.v_seq = data_ptr<Real>(v_seq);
    params.h_seq = data_ptr<Real>(h_seq);
    params.checkpoints = data_ptr<Real>(checkpoints);
    if (wants_checkpoints) params.zeros = params.checkpoints + elements - 2;
    kernels.plan_tiles(params);
    kernels.launch(params);
  });
  return results;
}

// The gradients of the results of forward. A gradient without a tensor is zero.
struct OutputGradients {
  OptionalTensor s_seq, v_last, v_seq, h_seq;
};
// Which gradients of the arguments of forward are wanted.
struct WantedGradients {
  bool x_seq, v_init;
  WantedParameters parameters;
  bool residual;
};

// Returns the wanted gradients in the order x_seq, v_init, parameters by ParameterId, residual.
inline std::vector<Tensor> neuron_backward(const Launcher* launcher, const NeuronCall& call,
                                           const OutputGradients& grads, const Tensor& checkpoints,
                                           const WantedGradients& wanted) {
  const Layout& layout = call.layout;
  layout.check_type_and_device(checkpoints, layout.real(), "checkpoints");
  TORCH_CHECK_VALUE(
      checkpoints.is_contiguous() && checkpoints.numel() == checkpoint_elements(layout.shape(), call.num_states),
      "asgl_cuda: checkpoints must be those that forward returned for this x_seq");
  const Tensor grad_s_seq = layout.checked_sequence(grads.s_seq, layout.type(), "grad_s_seq");
  const Tensor grad_v_last = layout.checked_state(grads.v_last, "grad_v_last", call.num_states);
  const Tensor grad_v_seq = layout.checked_sequence(grads.v_seq, layout.real(), "grad_v_seq");
  const Tensor grad_h_seq = layout.checked_sequence(grads.h_seq, layout.real(), "grad_h_seq");

  const Kernels kernels(launcher, call.x_seq.device());
  const Tensor grad_x_seq = wanted.x_seq ? layout.empty_sequence(layout.type()) : Tensor();
  const Tensor grad_v_init = wanted.v_init ? layout.empty_state(call.num_states) : Tensor();
  const bool wants_residual = wanted.residual && call.has_residual();
  const Tensor grad_residual = wants_residual ? layout.empty_sequence(layout.type()) : Tensor();
  std::vector<Tensor> results;
  if (wanted.x_seq) results.push_back(grad_x_seq);
  if (wanted.v_init) results.push_back(grad_v_init);
  const ParameterGradients gradients(call, wanted.parameters);
  if (layout.shape().neurons() > 0) {
    with_scalar(layout.type(), [&](auto scalar) {
      using Scalar = decltype(scalar);
      using Real = Real_t<Scalar>;
      auto params = call.params<BackwardParams, Scalar>();
      params.grad_s_seq = data_ptr<const Scalar>(grad_s_seq);
      params.grad_v_last = data_ptr<const Real>(grad_v_last);
      params.grad_v_seq = data_ptr<const Real>(grad_v_seq);
      params.grad_h_seq = data_ptr<const Real>(grad_h_seq);
      params.checkpoints = data_ptr<const Real>(checkpoints);
      params.grad_x_seq = data_ptr<Scalar>(grad_x_seq);
      params.grad_v_init = data_ptr<Real>(grad_v_init);
      params.grad_residual = data_ptr<Scalar>(grad_residual);
      gradients.launch_backward(kernels, params);
    });
  }
  gradients.append_to(results);
  if (wants_residual) results.push_back(grad_residual);
  return results;
}

// The operators lif_forward and lif_backward. asgl_cuda/backends/ops.py has their schemas.
inline std::vector<Tensor> lif_forward(const Launcher* launcher, const Tensor& x_seq, const OptionalTensor& v_init,
                                       const OptionalTensor& rng_state, const OptionalTensor& width,
                                       const OptionalTensor& decay, const OptionalTensor& v_threshold,
                                       const OptionalTensor& reset, const OptionalTensor& input_gain,
                                       const OptionalTensor& input_bias, const OptionalTensor& input_mean,
                                       const OptionalTensor& residual, at::ArrayRef<double> numbers,
                                       at::IntArrayRef rules, std::array<bool, 4> wanted) {
  const Parameters parameters = {width, decay, v_threshold, reset, input_gain, input_bias, input_mean};
  return neuron_forward(
      launcher, NeuronCall(x_seq, v_init, rng_state, parameters, residual, constants_of(numbers, rules)), wanted);
}

inline std::vector<Tensor> lif_backward(const Launcher* launcher, const OptionalTensor& grad_s_seq,
                                        const OptionalTensor& grad_v_last, const OptionalTensor& grad_v_seq,
                                        const OptionalTensor& grad_h_seq, const Tensor& x_seq,
                                        const OptionalTensor& v_init, const OptionalTensor& rng_state,
                                        const Tensor& checkpoints, const OptionalTensor& width,
                                        const OptionalTensor& decay, const OptionalTensor& v_threshold,
                                        const OptionalTensor& reset, const OptionalTensor& input_gain,
                                        const OptionalTensor& input_bias, const OptionalTensor& input_mean,
                                        const OptionalTensor& residual, at::ArrayRef<double> numbers,
                                        at::IntArrayRef rules, std::array<bool, 3 + kNumParameters> wanted) {
  const Parameters parameters = {width, decay, v_threshold, reset, input_gain, input_bias, input_mean};
  const NeuronCall call(x_seq, v_init, rng_state, parameters, residual, constants_of(numbers, rules));
  WantedGradients gradients{wanted[0], wanted[1], {}, wanted.back()};
  std::copy_n(wanted.begin() + 2, kNumParameters, gradients.parameters.begin());
  return neuron_backward(launcher, call, {grad_s_seq, grad_v_last, grad_v_seq, grad_h_seq}, checkpoints, gradients);
}

// Draws (seed, offset) from the default generator of the device. It is an operator, so that compiled graphs draw as
// eager mode does. Only the options of `fresh` are used. Callers allocate `fresh` for each call, because a compiler
// would merge two calls with the same tensor.
inline constexpr auto draw_rng_state = [](const Tensor& fresh) {
  return at::randint(std::numeric_limits<int64_t>::max(), {2}, fresh.options());
};

// Registers the operators of this file. `m` is a torch::Library or has its interface.
template <class Library>
void register_neuron_operators(Library& m, const Launcher* launcher) {
  m.impl("draw_rng_state", draw_rng_state);
  m.impl("lif_forward", bind_launcher(launcher, &lif_forward));
  m.impl("lif_backward", bind_launcher(launcher, &lif_backward));
}

}  // namespace asgl::ops
