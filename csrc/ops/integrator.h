// The operators of the leaky integrator.
#pragma once

#include "ops/call.h"

namespace asgl::ops {

// The checked arguments that forward and backward share.
inline NeuronCall integrator_call(const Tensor& x_seq, const OptionalTensor& v_init, const OptionalTensor& decay,
                                  const OptionalTensor& input_gain, at::ArrayRef<double> numbers,
                                  at::IntArrayRef rules) {
  Parameters parameters;
  parameters[kDecay] = decay;
  parameters[kInputGain] = input_gain;
  return {x_seq, v_init, std::nullopt, parameters, std::nullopt, constants_of(numbers, rules)};
}

// Returns v_seq, and v_last if wanted. v_seq has the potential after each step, or before each step with `delay`.
inline std::vector<Tensor> integrator_forward(const Launcher* launcher, const Tensor& x_seq,
                                              const OptionalTensor& v_init, const OptionalTensor& decay,
                                              const OptionalTensor& input_gain, at::ArrayRef<double> numbers,
                                              at::IntArrayRef rules, bool delay, bool wants_v_last) {
  const NeuronCall call = integrator_call(x_seq, v_init, decay, input_gain, numbers, rules);
  const Layout& layout = call.layout;
  const Kernels kernels(launcher, x_seq.device());
  std::vector<Tensor> results = {layout.empty_sequence(layout.type())};
  if (wants_v_last) results.push_back(layout.empty_state());
  if (layout.shape().neurons() == 0) return results;
  with_scalar(layout.type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    auto params = call.params<IntegratorParams, Scalar>();
    params.delay = delay;
    params.v_seq = data_ptr<Scalar>(results[0]);
    if (wants_v_last) params.v_last = data_ptr<Real_t<Scalar>>(results[1]);
    kernels.plan_tiles(params);
    kernels.launch(params);
  });
  return results;
}

// Returns the wanted gradients. `delay` is that of forward. The gradient of decay needs v_seq, and the gradient of
// input_gain needs x_seq.
inline std::vector<Tensor> integrator_backward(const Launcher* launcher, const Tensor& grad_v_seq,
                                               const OptionalTensor& grad_v_last, const OptionalTensor& v_seq,
                                               const OptionalTensor& x_seq, const OptionalTensor& v_init,
                                               const OptionalTensor& decay, const OptionalTensor& input_gain,
                                               at::ArrayRef<double> numbers, at::IntArrayRef rules, bool delay,
                                               std::array<bool, 4> wanted) {
  const NeuronCall call = integrator_call(grad_v_seq, v_init, decay, input_gain, numbers, rules);
  const auto [wants_x_seq, wants_v_init, wants_decay, wants_input_gain] = wanted;
  const Layout& layout = call.layout;
  TORCH_CHECK_VALUE((v_seq.has_value() || !wants_decay) && (x_seq.has_value() || !wants_input_gain),
                    "asgl_cuda: the gradient of decay needs v_seq, and the gradient of input_gain needs x_seq");
  const Tensor potentials = layout.checked_sequence(v_seq, layout.type(), "v_seq");
  const Tensor inputs = layout.checked_sequence(x_seq, layout.type(), "x_seq");
  const Tensor grad_last = layout.checked_state(grad_v_last, "grad_v_last");
  const Kernels kernels(launcher, grad_v_seq.device());
  std::vector<Tensor> results;
  if (wants_x_seq) results.push_back(layout.empty_sequence(layout.type()));
  if (wants_v_init) results.push_back(layout.empty_state());
  WantedParameters wants_parameters{};
  wants_parameters[kDecay] = wants_decay;
  wants_parameters[kInputGain] = wants_input_gain;
  const ParameterGradients gradients(call, wants_parameters);
  if (layout.shape().neurons() > 0) {
    with_scalar(layout.type(), [&](auto scalar) {
      using Scalar = decltype(scalar);
      using Real = Real_t<Scalar>;
      auto params = call.params<IntegratorParams, Scalar>();
      params.x_seq = wants_input_gain ? data_ptr<const Scalar>(inputs) : nullptr;
      params.delay = delay;
      params.v_seq = wants_decay ? const_cast<Scalar*>(data_ptr<const Scalar>(potentials)) : nullptr;  // only read
      params.grad_v_seq = data_ptr<const Scalar>(grad_v_seq);
      params.grad_v_last = data_ptr<const Real>(grad_last);
      if (wants_x_seq) params.grad_x_seq = data_ptr<Scalar>(results.front());
      if (wants_v_init) params.grad_v_init = data_ptr<Real>(results.back());
      gradients.launch_backward(kernels, params);
    });
  }
  gradients.append_to(results);
  return results;
}

// Registers the operators of this file. `m` is a torch::Library or has its interface.
template <class Library>
void register_integrator_operators(Library& m, const Launcher* launcher) {
  m.impl("integrator_forward", bind_launcher(launcher, &integrator_forward));
  m.impl("integrator_backward", bind_launcher(launcher, &integrator_backward));
}

}  // namespace asgl::ops
