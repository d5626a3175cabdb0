// The operators of the leaky integrator as templates over the kernels, CpuKernels or CudaKernels.
#pragma once

#include "ops/call.h"
#include "ops/launched.h"

namespace asgl::ops {

inline Call integrator_call(const Tensor& x_seq, const OptionalTensor& v_init, const OptionalTensor& decay,
                            const OptionalTensor& input_gain, at::ArrayRef<double> numbers, at::IntArrayRef rules) {
  Parameters parameters;
  parameters[kDecay] = decay;
  parameters[kInputGain] = input_gain;
  return {x_seq, v_init, std::nullopt, parameters, std::nullopt, constants_of(numbers, rules)};
}

// Returns v_seq, and v_last if wanted.
template <class Kernels>
std::vector<Tensor> integrator_forward(const Kernels& kernels, const Tensor& x_seq, const OptionalTensor& v_init,
                                       const OptionalTensor& decay, const OptionalTensor& input_gain,
                                       at::ArrayRef<double> numbers, at::IntArrayRef rules, bool delay,
                                       bool wants_v_last) {
  const Call call = integrator_call(x_seq, v_init, decay, input_gain, numbers, rules);
  const auto backend = kernels.on(x_seq);
  std::vector<Tensor> results = {call.layout().empty_sequence(x_seq.options())};
  if (wants_v_last) results.push_back(call.layout().empty_state(call.real_options()));
  if (call.layout().shape().neurons() == 0) return results;
  with_scalar(x_seq.scalar_type(), [&](auto scalar) {
    IntegratorParams<decltype(scalar)> params{};
    call.fill(params);
    params.delay = delay;
    params.v_seq = pointer<decltype(scalar)>(results[0]);
    if (wants_v_last) params.v_last = pointer<Real_t<decltype(scalar)>>(results[1]);
    backend.plan_tiles(params);
    backend.launch(params);
  });
  return results;
}

// Returns the wanted gradients; decay's needs v_seq, input_gain's x_seq, both brought to the layout of grad_v_seq.
template <class Kernels>
std::vector<Tensor> integrator_backward(const Kernels& kernels, const Tensor& grad_v_seq,
                                        const OptionalTensor& grad_v_last, const OptionalTensor& v_seq,
                                        const OptionalTensor& x_seq, const OptionalTensor& v_init,
                                        const OptionalTensor& decay, const OptionalTensor& input_gain,
                                        at::ArrayRef<double> numbers, at::IntArrayRef rules, bool delay,
                                        std::array<bool, 4> wanted) {
  const Call call = integrator_call(grad_v_seq, v_init, decay, input_gain, numbers, rules);
  const auto [wants_x_seq, wants_v_init, wants_decay, wants_input_gain] = wanted;
  const Layout& layout = call.layout();
  const auto sequence_if = [&](bool needed, const OptionalTensor& given, const char* name) -> OptionalTensor {
    TORCH_CHECK_VALUE(given.has_value() || !needed,
                      "asgl_cuda: a gradient of decay needs v_seq and one of input_gain x_seq, like grad_v_seq");
    const OptionalTensor dense = call.sequence(given, grad_v_seq.scalar_type(), name);
    return needed ? dense : std::nullopt;
  };
  const OptionalTensor potentials = sequence_if(wants_decay, v_seq, "v_seq");
  const OptionalTensor inputs = sequence_if(wants_input_gain, x_seq, "x_seq");
  const OptionalTensor grad_last = call.state(grad_v_last, "grad_v_last");
  const auto backend = kernels.on(grad_v_seq);
  std::vector<Tensor> results;
  if (wants_x_seq) results.push_back(layout.empty_sequence(grad_v_seq.options()));
  if (wants_v_init) results.push_back(layout.empty_state(call.real_options()));
  WantedParameters wants_parameters{};
  wants_parameters[kDecay] = wants_decay;
  wants_parameters[kInputGain] = wants_input_gain;
  const ParameterGradients gradients(call, wants_parameters);
  if (layout.shape().neurons() > 0) {
    with_scalar(grad_v_seq.scalar_type(), [&](auto scalar) {
      using Scalar = decltype(scalar);
      using Real = Real_t<Scalar>;
      IntegratorParams<Scalar> params{};
      call.fill(params);
      params.x_seq = const_pointer<Scalar>(inputs);
      params.delay = delay;
      params.v_seq = const_cast<Scalar*>(const_pointer<Scalar>(potentials));  // backward only reads it
      params.grad_v_seq = const_pointer<Scalar>(grad_v_seq);
      params.grad_v_last = const_pointer<Real>(grad_last);
      if (wants_x_seq) params.grad_x_seq = pointer<Scalar>(results.front());
      if (wants_v_init) params.grad_v_init = pointer<Real>(results.back());
      gradients.compute(backend, params);
    });
  }
  gradients.append_to(results);
  return results;
}

template <class Kernels, class Library>
void implement_integrator(Library& m, const Kernels& kernels) {
  m.impl("integrator_forward", on_kernels(kernels, &integrator_forward<Kernels>));
  m.impl("integrator_backward", on_kernels(kernels, &integrator_backward<Kernels>));
}

}  // namespace asgl::ops
