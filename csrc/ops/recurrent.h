// The operators of recurrent neurons on the CPU; recurrent_steps.h has those of other kernels.
//
// `parameters` are the rows of RecurrentParameterId; numbers and rules those of the neuron.
#pragma once

#include "cpu/recurrent.h"
#include "ops/call.h"

namespace asgl::ops {

// The arguments that forward and backward share, checked. `sequence` is x_seq, or a sequence of its shape.
class RecurrentCall {
 public:
  RecurrentCall(const Tensor& sequence, const Tensor& weight, const Tensor& parameters, const OptionalTensor& v_init,
                const OptionalTensor& s_init, const OptionalTensor& i_init, const OptionalTensor& rng_state,
                const Constants& constants, bool has_synapse)
      : rules_(constants.rules),
        numbers_(constants.numbers),
        sequence_(sequence),
        weight_(weight.contiguous()),
        parameters_(parameters.contiguous()),
        rng_state_(rng_state),
        has_synapse_(has_synapse) {
    TORCH_CHECK_VALUE(sequence.dim() == 3 && sequence.is_contiguous(),
                      "asgl_cuda: x_seq must be contiguous and have 3 dimensions, got shape ", sequence.sizes());
    TORCH_CHECK_VALUE(rules_.time_dim == 0 || rules_.time_dim == 1, "asgl_cuda: time_dim must be 0 or 1, got ",
                      rules_.time_dim);
    TORCH_CHECK_VALUE(sequence.size(rules_.time_dim) > 0, "asgl_cuda: x_seq must have at least one time step");
    TORCH_CHECK_VALUE(0 <= rules_.surrogate && rules_.surrogate < static_cast<int64_t>(Surrogate::kInteger),
                      "asgl_cuda: no surrogate of recurrent neurons has the number ", rules_.surrogate);
    TORCH_CHECK_VALUE(!(rules_.multi_spike || rules_.periodic || rules_.floored || rules_.log_width ||
                        rules_.logit_decay || rules_.levels || rules_.adaptation),
                      "asgl_cuda: recurrent neurons have no optional rules");
    const int64_t neurons = sequence.size(2);
    check(weight_, weight_.dim() == 1 ? at::IntArrayRef({neurons}) : at::IntArrayRef({neurons, neurons}), "weight");
    check(parameters_, {kRecurrentParameters, neurons}, "parameters");
    v_init_ = state(v_init, "v_init");
    s_init_ = state(s_init, "s_init");
    i_init_ = state(i_init, "i_init");
    check_noise(rules_, rng_state, sequence);
  }

  int64_t batch() const { return sequence_.size(1 - rules_.time_dim); }
  int64_t neurons() const { return sequence_.size(2); }
  bool empty() const { return sequence_.numel() == 0; }
  const Tensor& weight() const { return weight_; }
  const Tensor& parameters() const { return parameters_; }
  const Rules& rules() const { return rules_; }
  const Numbers& numbers() const { return numbers_; }
  at::TensorOptions real_options() const { return weight_.options(); }

  Tensor empty_sequence() const { return in_huge_pages(at::empty(sequence_.sizes(), real_options())); }
  Tensor empty_state() const { return at::empty({batch(), neurons()}, real_options()); }
  Tensor or_zero(const OptionalTensor& state) const {
    return state.has_value() ? *state : at::zeros({batch(), neurons()}, real_options());
  }

  // The arguments of the operators of the neuron for one step, [1, B, N].
  Rules rules_of_step() const {
    Rules rules = rules_;
    rules.time_dim = rules.scale_output = 0;
    return rules;
  }
  Parameters neuron(const OptionalTensor& decay) const {
    const auto row = [&](int id) -> OptionalTensor { return parameters_[id]; };
    return {row(kRecurrentWidth), decay, row(kRecurrentThreshold), row(kRecurrentReset)};
  }

  OptionalTensor state(const OptionalTensor& given, const char* name) const {
    if (!given.has_value()) return std::nullopt;
    check(*given, {batch(), neurons()}, name);
    return given->contiguous();
  }
  OptionalTensor sequence(const OptionalTensor& given, at::ScalarType type, const char* name) const {
    if (!given.has_value()) return std::nullopt;
    check_type(*given, type, sequence_, name);
    check_sizes(*given, sequence_.sizes(), name);
    return given->contiguous();
  }

  template <class Scalar>
  void fill(RecurrentParams<Scalar>& params) const {
    using Real = Real_t<Scalar>;
    params.steps = sequence_.size(rules_.time_dim);
    params.batch = batch();
    params.neurons = neurons();
    params.batch_first = rules_.time_dim == 1;
    params.options = options_of<Real>(rules_, numbers_);
    params.input_gain = static_cast<Real>(numbers_.constants[kInputGain]);
    params.noise = noise_of(rules_, rng_state_);
    params.elementwise = weight_.dim() == 1;
    params.has_synapse = has_synapse_;
    params.weight = weight_.const_data_ptr<Real>();
    params.parameters = parameters_.const_data_ptr<Real>();
    params.v_init = const_pointer<Real>(v_init_);
    params.s_init = const_pointer<Real>(s_init_);
    params.i_init = const_pointer<Real>(i_init_);
  }

 private:
  static void check_sizes(const Tensor& tensor, at::IntArrayRef sizes, const char* name) {
    TORCH_CHECK_VALUE(tensor.sizes() == sizes, "asgl_cuda: ", name, " must have shape ", sizes, ", got ",
                      tensor.sizes());
  }
  void check(const Tensor& tensor, at::IntArrayRef sizes, const char* name) const {
    check_type(tensor, real_type(sequence_), sequence_, name);
    check_sizes(tensor, sizes, name);
  }

  Rules rules_;
  Numbers numbers_;
  Tensor sequence_, weight_, parameters_;
  OptionalTensor rng_state_, v_init_, s_init_, i_init_;
  bool has_synapse_;
};

// Returns s_seq and the wanted of emitted, h_seq, v_seq, i_seq, v_last, s_last and i_last.
inline std::vector<Tensor> recurrent_forward_on_cpu(const Tensor& x_seq, const Tensor& weight, const Tensor& parameters,
                                                    const OptionalTensor& v_init, const OptionalTensor& s_init,
                                                    const OptionalTensor& i_init, const OptionalTensor& rng_state,
                                                    at::ArrayRef<double> numbers, at::IntArrayRef rules,
                                                    bool has_synapse, bool /*detach_recurrent*/,
                                                    std::array<bool, 7> wanted) {
  const RecurrentCall call(x_seq, weight, parameters, v_init, s_init, i_init, rng_state, constants_of(numbers, rules),
                           has_synapse);
  std::vector<Tensor> results = {in_huge_pages(at::empty(x_seq.sizes(), x_seq.options()))};
  std::array<Tensor, 7> others;
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!wanted[i]) continue;
    others[i] = i < 4 ? call.empty_sequence() : call.empty_state();
    results.push_back(others[i]);
  }
  if (call.empty()) return results;
  with_scalar(x_seq.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    RecurrentForwardParams<Scalar> params{};
    call.fill(params);
    params.x_seq = const_pointer<Scalar>(x_seq);
    params.s_seq = pointer<Scalar>(results.front());
    Real** fields[] = {&params.emitted, &params.h_seq,  &params.v_seq, &params.i_seq,
                       &params.v_last,  &params.s_last, &params.i_last};
    for (size_t i = 0; i < others.size(); ++i) *fields[i] = pointer<Real>(others[i]);
    cpu::recurrent_forward(params);
  });
  return results;
}

// Returns the wanted gradients of x_seq (in the arithmetic type), weight, parameters, v_init, s_init and i_init.
inline std::vector<Tensor> recurrent_backward_on_cpu(
    const OptionalTensor& grad_s_seq, const OptionalTensor& grad_v_seq, const OptionalTensor& grad_h_seq,
    const OptionalTensor& grad_v_last, const OptionalTensor& grad_s_last, const OptionalTensor& grad_i_last,
    const Tensor& h_seq, const Tensor& emitted, const OptionalTensor& i_seq, const Tensor& weight,
    const Tensor& parameters, const OptionalTensor& v_init, const OptionalTensor& s_init, const OptionalTensor& i_init,
    const OptionalTensor& rng_state, at::ArrayRef<double> numbers, at::IntArrayRef rules, bool has_synapse,
    bool detach_recurrent, std::array<bool, 6> wanted) {
  const RecurrentCall call(h_seq, weight, parameters, v_init, s_init, i_init, rng_state, constants_of(numbers, rules),
                           has_synapse);
  const auto [wants_x_seq, wants_weight, wants_parameters, wants_v_init, wants_s_init, wants_i_init] = wanted;
  const at::ScalarType real = h_seq.scalar_type();
  const at::ScalarType type = grad_s_seq.has_value() ? grad_s_seq->scalar_type() : real;
  const OptionalTensor given_s_seq = call.sequence(grad_s_seq, type, "grad_s_seq");
  const OptionalTensor given_v_seq = call.sequence(grad_v_seq, real, "grad_v_seq");
  const OptionalTensor given_h_seq = call.sequence(grad_h_seq, real, "grad_h_seq");
  const OptionalTensor given_v_last = call.state(grad_v_last, "grad_v_last");
  const OptionalTensor given_s_last = call.state(grad_s_last, "grad_s_last");
  const OptionalTensor given_i_last = call.state(grad_i_last, "grad_i_last");
  const OptionalTensor spikes = call.sequence(emitted, real, "emitted"), currents = call.sequence(i_seq, real, "i_seq");
  const bool elementwise = call.weight().dim() == 1;
  const bool wants_sums = wants_parameters || (wants_weight && elementwise);
  const Tensor grad_j_seq = call.empty_sequence();
  const Tensor grad_weight = wants_weight && !elementwise ? at::zeros_like(call.weight()) : Tensor();
  const Tensor grad_v_init = wants_v_init ? call.empty_state() : Tensor();
  const Tensor grad_s_init = wants_s_init ? call.empty_state() : Tensor();
  const Tensor grad_i_init = wants_i_init ? call.empty_state() : Tensor();
  const int64_t chunks = recurrent_chunks(call.batch());
  const Tensor sums = wants_sums ? at::zeros({chunks, kRecurrentSums, call.neurons()}, at::kDouble) : Tensor();
  if (!call.empty()) {
    with_scalar(type, [&](auto scalar) {
      using Scalar = decltype(scalar);
      using Real = Real_t<Scalar>;
      RecurrentBackwardParams<Scalar> params{};
      call.fill(params);
      params.detach_recurrent = detach_recurrent;
      params.h_seq = const_pointer<Real>(h_seq);
      params.emitted = const_pointer<Real>(spikes);
      params.i_seq = const_pointer<Real>(currents);
      params.grad_s_seq = const_pointer<Scalar>(given_s_seq);
      params.grad_v_seq = const_pointer<Real>(given_v_seq);
      params.grad_h_seq = const_pointer<Real>(given_h_seq);
      params.grad_v_last = const_pointer<Real>(given_v_last);
      params.grad_s_last = const_pointer<Real>(given_s_last);
      params.grad_i_last = const_pointer<Real>(given_i_last);
      params.grad_j_seq = pointer<Real>(grad_j_seq);
      params.grad_weight = pointer<Real>(grad_weight);
      params.grad_v_init = pointer<Real>(grad_v_init);
      params.grad_s_init = pointer<Real>(grad_s_init);
      params.grad_i_init = pointer<Real>(grad_i_init);
      params.grad_parameters = wants_sums ? sums.mutable_data_ptr<double>() : nullptr;
      cpu::recurrent_backward(params);
    });
  }
  std::vector<Tensor> results;
  if (wants_x_seq) results.push_back(grad_j_seq);
  const Tensor totals = wants_sums ? sums.sum(0).to(real) : Tensor();
  if (wants_weight) results.push_back(elementwise ? totals[kRecurrentWeight].clone() : grad_weight);
  if (wants_parameters) results.push_back(totals.slice(0, 0, kRecurrentParameters).clone());
  for (const Tensor& state : {grad_v_init, grad_s_init, grad_i_init}) {
    if (state.defined()) results.push_back(state);
  }
  return results;
}

}  // namespace asgl::ops
