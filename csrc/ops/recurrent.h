// The checked arguments of the operators of recurrent neurons, and forward and backward with CPU kernels.
// recurrent_steps.h has the operators, and forward and backward step by step with CUDA kernels.
#pragma once

#include "ops/call.h"

namespace asgl::ops {

// The gradients of the results of forward; an undefined tensor means zero.
struct RecurrentGradients {
  Tensor s_seq, v_seq, h_seq, v_last, s_last, i_last;
};
// The results of forward that backward reads.
struct RecurrentResults {
  Tensor h_seq, emitted, i_seq, w_seq;
};
using WantedResults = std::array<bool, 8>;             // emitted, h_seq, v_seq, i_seq, w_seq, v_last, s_last and i_last
constexpr size_t kFirstState = 5;                      // index of v_last
using WantedRecurrentGradients = std::array<bool, 6>;  // x_seq, weight, parameters, v_init, s_init and i_init

// The checked arguments that forward and backward share. `sequence` is x_seq in forward and h_seq in backward.
// `parameters` has the rows of ParameterId and RecurrentParameterId. `constants` are those of the neuron. Without
// `has_synapse` syn_decay is unused. With `detach_recurrent` spikes get no gradient through the weight.
class RecurrentCall {
 public:
  RecurrentCall(const Tensor& sequence, const Tensor& weight, const Tensor& parameters, const OptionalTensor& v_init,
                const OptionalTensor& s_init, const OptionalTensor& i_init, const OptionalTensor& rng_state,
                const Constants& constants, bool has_synapse, bool detach_recurrent)
      : layout(checked_sequence(sequence, constants.rules), constants.rules.time_dim),
        has_synapse(has_synapse),
        detach_recurrent(detach_recurrent),
        rules(constants.rules),
        numbers(constants.numbers),
        sequence(sequence),
        weight(weight.contiguous()),
        parameters(parameters.contiguous()),
        v_init(layout.checked_state(v_init, "v_init", num_states())),
        s_init(layout.checked_state(s_init, "s_init")),
        i_init(layout.checked_state(i_init, "i_init")),
        rng_state(rng_state) {
    TORCH_CHECK_VALUE(0 <= rules.surrogate && rules.surrogate < static_cast<int64_t>(Surrogate::kInteger),
                      "asgl_cuda: no surrogate of recurrent neurons has the number ", rules.surrogate);
    TORCH_CHECK_VALUE(!(rules.multi_spike || rules.periodic || rules.floored || rules.levels),
                      "asgl_cuda: recurrent neurons have no multi_spike, levels, v_min or periodic surrogate");
    check_adaptation(rules);
    TORCH_CHECK_VALUE(has_adaptation() || (numbers.constants[kInputBias] == 0 && numbers.constants[kInputMean] == 0),
                      "asgl_cuda: recurrent neurons without an adaptation have no input_bias and input_mean");
    const Dims square = {neurons(), neurons()}, row = {neurons()};
    layout.check(weight, layout.real(), is_elementwise() ? row : square, "weight");
    layout.check(parameters, layout.real(), {kNumRecurrentParameters, neurons()}, "parameters");
    check_noise(rules, rng_state, sequence.device());
  }

  int64_t steps() const { return layout.shape().steps; }
  int64_t batch() const { return sequence.size(1 - rules.time_dim); }
  int64_t neurons() const { return sequence.size(2); }
  bool is_elementwise() const { return weight.dim() == 1; }
  bool has_adaptation() const { return rules.adaptation != 0; }
  int64_t num_states() const { return asgl::ops::num_states({numbers, rules}); }  // in v_init, and tensors like it

  Tensor empty_sequence() const { return layout.empty_sequence(layout.real()); }
  // The state, or zeros if it is undefined.
  Tensor state_or_zeros(const Tensor& state) const { return state.defined() ? state : layout.empty_state().zero_(); }

  // Sets the fields of params that forward and backward share.
  template <class Scalar>
  void set_params(RecurrentParams<Scalar>& params) const {
    using Real = Real_t<Scalar>;
    params.steps = steps();
    params.batch = batch();
    params.neurons = neurons();
    params.batch_first = rules.time_dim == 1;
    params.options = options_of<Real>(rules, numbers);
    params.noise = noise_of(rules, rng_state);
    params.elementwise = is_elementwise();
    params.has_synapse = has_synapse;
    params.weight = weight.const_data_ptr<Real>();
    params.parameters = parameters.const_data_ptr<Real>();
    params.v_init = data_ptr<const Real>(v_init);
    params.s_init = data_ptr<const Real>(s_init);
    params.i_init = data_ptr<const Real>(i_init);
  }

  const Layout layout;
  const bool has_synapse, detach_recurrent;
  const Rules rules;
  const Numbers numbers;
  const Tensor sequence, weight, parameters;
  const Tensor v_init, s_init, i_init;  // undefined if not given
  const OptionalTensor rng_state;

 private:
  // Returns the sequence. Throws if it does not have the layout that kernels need.
  static const Tensor& checked_sequence(const Tensor& sequence, const Rules& rules) {
    TORCH_CHECK_VALUE(sequence.dim() == 3 && sequence.is_contiguous(),
                      "asgl_cuda: x_seq must be contiguous and have 3 dimensions, got shape ", sequence.sizes());
    TORCH_CHECK_VALUE(rules.time_dim == 0 || rules.time_dim == 1, "asgl_cuda: time_dim must be 0 or 1, got ",
                      rules.time_dim);
    return sequence;
  }
};

// Returns s_seq and the other wanted results.
inline std::vector<Tensor> forward_on_cpu(const RecurrentCall& call, const WantedResults& wanted) {
  const Layout& layout = call.layout;
  std::vector<Tensor> results = {layout.empty_sequence(layout.type())};
  std::array<Tensor, std::tuple_size_v<WantedResults>> others;
  for (size_t i = 0; i < others.size(); ++i) {
    if (!wanted[i]) continue;
    others[i] = i < kFirstState ? call.empty_sequence() : layout.empty_state(i == kFirstState ? call.num_states() : 1);
    results.push_back(others[i]);
  }
  if (call.sequence.numel() == 0) return results;
  with_scalar(layout.type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    RecurrentForwardParams<Scalar> params{};
    call.set_params(params);
    params.x_seq = data_ptr<const Scalar>(call.sequence);
    params.s_seq = data_ptr<Scalar>(results.front());
    Real** fields[] = {&params.emitted, &params.h_seq,  &params.v_seq,  &params.i_seq,
                       &params.w_seq,   &params.v_last, &params.s_last, &params.i_last};
    for (size_t i = 0; i < others.size(); ++i) *fields[i] = data_ptr<Real>(others[i]);
    cpu::recurrent_forward(params);
  });
  return results;
}

// Returns the wanted gradients. The gradient of x_seq has the arithmetic type.
inline std::vector<Tensor> backward_on_cpu(const RecurrentCall& call, const RecurrentGradients& grads,
                                           const RecurrentResults& kept, const WantedRecurrentGradients& wanted) {
  const auto [wants_x_seq, wants_weight, wants_parameters, wants_v_init, wants_s_init, wants_i_init] = wanted;
  const bool elementwise = call.is_elementwise(), wants_sums = wants_parameters || (wants_weight && elementwise);
  const Tensor grad_j_seq = call.empty_sequence();
  const Tensor grad_weight = wants_weight && !elementwise ? at::zeros_like(call.weight) : Tensor();
  const Tensor grad_v_init = wants_v_init ? call.layout.empty_state(call.num_states()) : Tensor();
  const Tensor grad_s_init = wants_s_init ? call.layout.empty_state() : Tensor();
  const Tensor grad_i_init = wants_i_init ? call.layout.empty_state() : Tensor();
  const int64_t chunks = num_recurrent_chunks(call.batch());
  const Tensor sums = wants_sums ? at::zeros({chunks, kNumRecurrentSums, call.neurons()}, at::kDouble) : Tensor();
  const at::ScalarType real = kept.h_seq.scalar_type();
  if (call.sequence.numel() > 0) {
    with_scalar(grads.s_seq.defined() ? grads.s_seq.scalar_type() : real, [&](auto scalar) {
      using Scalar = decltype(scalar);
      using Real = Real_t<Scalar>;
      RecurrentBackwardParams<Scalar> params{};
      call.set_params(params);
      params.detach_recurrent = call.detach_recurrent;
      params.h_seq = data_ptr<const Real>(kept.h_seq);
      params.emitted = data_ptr<const Real>(kept.emitted);
      params.i_seq = data_ptr<const Real>(kept.i_seq);
      params.w_seq = data_ptr<const Real>(kept.w_seq);
      params.grad_s_seq = data_ptr<const Scalar>(grads.s_seq);
      params.grad_v_seq = data_ptr<const Real>(grads.v_seq);
      params.grad_h_seq = data_ptr<const Real>(grads.h_seq);
      params.grad_v_last = data_ptr<const Real>(grads.v_last);
      params.grad_s_last = data_ptr<const Real>(grads.s_last);
      params.grad_i_last = data_ptr<const Real>(grads.i_last);
      params.grad_j_seq = data_ptr<Real>(grad_j_seq);
      params.grad_weight = data_ptr<Real>(grad_weight);
      params.grad_v_init = data_ptr<Real>(grad_v_init);
      params.grad_s_init = data_ptr<Real>(grad_s_init);
      params.grad_i_init = data_ptr<Real>(grad_i_init);
      params.grad_parameters = data_ptr<double>(sums);
      cpu::recurrent_backward(params);
    });
  }
  std::vector<Tensor> results;
  if (wants_x_seq) results.push_back(grad_j_seq);
  const Tensor totals = wants_sums ? sums.sum(0).to(real) : Tensor();
  if (wants_weight) results.push_back(elementwise ? totals[kRecurrentWeight].clone() : grad_weight);
  if (wants_parameters) results.push_back(totals.slice(0, 0, kNumRecurrentParameters).clone());
  for (const Tensor& state : {grad_v_init, grad_s_init, grad_i_init}) {
    if (state.defined()) results.push_back(state);
  }
  return results;
}

}  // namespace asgl::ops
