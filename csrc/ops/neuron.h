// The operators of the neuron as templates over the kernels, CpuKernels or CudaKernels.
#pragma once

#include "ops/call.h"
#include "ops/launched.h"

namespace asgl::ops {

// Returns s_seq and the other wanted outputs.
template <class Kernels>
std::vector<Tensor> lif_forward(const Kernels& kernels, const Tensor& x_seq, const OptionalTensor& v_init,
                                const OptionalTensor& rng_state, const c10::List<OptionalTensor>& parameters,
                                at::ArrayRef<double> numbers, at::IntArrayRef rules, std::array<bool, 4> wanted) {
  const Call call(x_seq, v_init, rng_state, parameters, numbers, rules);
  const auto [wants_v_last, wants_v_seq, wants_h_seq, wants_checkpoints] = wanted;
  const auto backend = kernels.on(x_seq);
  const Layout& layout = call.layout();
  const SequenceShape& shape = layout.shape();
  const at::TensorOptions real = call.real_options();
  std::vector<Tensor> results;
  const auto keep = [&](Tensor result) {
    results.push_back(result);
    return result;
  };
  const Tensor s_seq = keep(layout.empty_sequence(x_seq.options()));
  const Tensor v_last = wants_v_last ? keep(layout.empty_state(real, call.members())) : Tensor();
  const Tensor v_seq = wants_v_seq ? keep(layout.empty_sequence(real)) : Tensor();
  const Tensor h_seq = wants_h_seq ? keep(layout.empty_sequence(real)) : Tensor();
  const int64_t elements = checkpoint_elements(shape, call.members());
  const Tensor checkpoints = wants_checkpoints ? keep(in_huge_pages(at::empty({elements}, real))) : Tensor();
  if (shape.neurons() == 0) {
    if (wants_checkpoints) checkpoints.zero_();
    return results;
  }
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
    if (wants_checkpoints) params.zeros = pointer<Real>(checkpoints) + elements - 2;
    backend.plan_tiles(params);
    backend.launch(params);
  });
  return results;
}

// Returns the wanted gradients.
template <class Kernels>
std::vector<Tensor> lif_backward(const Kernels& kernels, const c10::List<OptionalTensor>& grads, const Tensor& x_seq,
                                 const OptionalTensor& v_init, const OptionalTensor& rng_state,
                                 const Tensor& checkpoints, const c10::List<OptionalTensor>& parameters,
                                 at::ArrayRef<double> numbers, at::IntArrayRef rules, WantedGradients wanted) {
  const Call call(x_seq, v_init, rng_state, parameters, numbers, rules);
  TORCH_CHECK_VALUE(grads.size() == 4, "asgl_cuda: expected 4 gradients, got ", grads.size());
  const Layout& layout = call.layout();
  const SequenceShape& shape = layout.shape();
  const at::TensorOptions real = call.real_options();
  check_type(checkpoints, real_type(x_seq), x_seq, "checkpoints");
  TORCH_CHECK_VALUE(checkpoints.is_contiguous() && checkpoints.numel() == checkpoint_elements(shape, call.members()),
                    "asgl_cuda: checkpoints do not belong to this x_seq");
  const auto given = [&](int which, const char* name) -> OptionalTensor {
    const OptionalTensor grad = grads[which];
    if (!grad.has_value()) return std::nullopt;
    check_type(*grad, which == 0 ? x_seq.scalar_type() : real_type(x_seq), x_seq, name);
    return which == 1 ? layout.match_state(*grad, name, call.members()) : layout.match_sequence(*grad, name);
  };
  const OptionalTensor grad_s_seq = given(0, "grad_s_seq"), grad_v_last = given(1, "grad_v_last");
  const OptionalTensor grad_v_seq = given(2, "grad_v_seq"), grad_h_seq = given(3, "grad_h_seq");

  const auto backend = kernels.on(x_seq);
  const Tensor grad_x_seq = wanted[0] ? layout.empty_sequence(x_seq.options()) : Tensor();
  const Tensor grad_v_init = wanted[1] ? layout.empty_state(real, call.members()) : Tensor();
  const Tensor grad_residual = wanted.back() && call.has_residual() ? layout.empty_sequence(x_seq.options()) : Tensor();
  std::vector<Tensor> results;
  if (wanted[0]) results.push_back(grad_x_seq);
  if (wanted[1]) results.push_back(grad_v_init);
  const ParameterGradients gradients(call, wanted);
  if (shape.neurons() > 0) {
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
      params.grad_residual = pointer<Scalar>(grad_residual);
      gradients.compute(backend, params);
    });
  }
  gradients.append_to(results);
  if (grad_residual.defined()) results.push_back(grad_residual);
  return results;
}

// Draws (seed, offset) from the device's default generator; an operator, so that compiled graphs draw as eager mode
// does. `fresh`, a new tensor, gives type and device: compilers merge equal calls, but not allocations.
inline Tensor draw_rng_state(const Tensor& fresh) {
  return at::randint(std::numeric_limits<int64_t>::max(), {2}, fresh.options());
}

// The schemas are in asgl_cuda/ops.py.
template <class Kernels, class Library>
void implement(Library& m, const Kernels& kernels) {
  m.impl("draw_rng_state", draw_rng_state);
  m.impl("lif_forward", on_kernels(kernels, &lif_forward<Kernels>));
  m.impl("lif_backward", on_kernels(kernels, &lif_backward<Kernels>));
}

}  // namespace asgl::ops
