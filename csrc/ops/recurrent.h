// The call of recurrent neurons, and its kernels on the CPU; recurrent_steps.h has the operators, and other kernels.
//
// `parameters` are the rows of RecurrentParameterId; numbers and rules those of the neuron.
#pragma once

#include "cpu/recurrent.h"
#include "ops/call.h"
#include "ops/launched.h"

namespace asgl::ops {

// The gradients of results, none for zero; and the results of forward that backward reads.
struct RecurrentGradients {
  OptionalTensor s_seq, v_seq, h_seq, v_last, s_last, i_last;
};
struct RecurrentResults {
  Tensor h_seq, emitted;
  OptionalTensor i_seq, w_seq;
};
using WantedResults = std::array<bool, 8>;             // emitted, h_seq, v_seq, i_seq, w_seq, v_last, s_last and i_last
constexpr size_t kStates = 5;                          // where the states begin
using WantedRecurrentGradients = std::array<bool, 6>;  // x_seq, weight, parameters, v_init, s_init and i_init

// The arguments that forward and backward share, checked. `sequence` is x_seq, or a sequence of its shape.
class RecurrentCall {
 public:
  RecurrentCall(const Tensor& sequence, const Tensor& weight, const Tensor& parameters, const OptionalTensor& v_init,
                const OptionalTensor& s_init, const OptionalTensor& i_init, const OptionalTensor& rng_state,
                const Constants& constants, bool has_synapse, bool detach_recurrent)
      : has_synapse(has_synapse),
        detach_recurrent(detach_recurrent),
        rules(constants.rules),
        numbers(constants.numbers),
        sequence(sequence),
        weight(weight.contiguous()),
        parameters(parameters.contiguous()),
        rng_state(rng_state) {
    TORCH_CHECK_VALUE(sequence.dim() == 3 && sequence.is_contiguous(),
                      "asgl_cuda: x_seq must be contiguous and have 3 dimensions, got shape ", sequence.sizes());
    TORCH_CHECK_VALUE(rules.time_dim == 0 || rules.time_dim == 1, "asgl_cuda: time_dim must be 0 or 1, got ",
                      rules.time_dim);
    TORCH_CHECK_VALUE(sequence.size(rules.time_dim) > 0, "asgl_cuda: x_seq must have at least one time step");
    TORCH_CHECK_VALUE(0 <= rules.surrogate && rules.surrogate < static_cast<int64_t>(Surrogate::kInteger),
                      "asgl_cuda: no surrogate of recurrent neurons has the number ", rules.surrogate);
    TORCH_CHECK_VALUE(
        !(rules.multi_spike || rules.periodic || rules.floored || rules.log_width || rules.logit_decay || rules.levels),
        "asgl_cuda: recurrent neurons have no optional rules but the adaptation");
    check_adaptation(rules);
    check(this->weight, is_elementwise() ? at::IntArrayRef({neurons()}) : at::IntArrayRef({neurons(), neurons()}),
          "weight");
    check(this->parameters, {kRecurrentParameters, neurons()}, "parameters");
    this->v_init = state(v_init, "v_init", members());
    this->s_init = state(s_init, "s_init");
    this->i_init = state(i_init, "i_init");
    check_noise(rules, rng_state, sequence);
  }

  int64_t steps() const { return sequence.size(rules.time_dim); }
  int64_t batch() const { return sequence.size(1 - rules.time_dim); }
  int64_t neurons() const { return sequence.size(2); }
  bool is_elementwise() const { return weight.dim() == 1; }
  bool adapts() const { return rules.adaptation != 0; }
  int64_t members() const { return adapts() ? 2 : 1; }  // of the state v_init

  Tensor empty_sequence() const { return in_huge_pages(at::empty(sequence.sizes(), weight.options())); }
  Tensor empty_state(int64_t members = 1) const { return at::empty(state_sizes(members), weight.options()); }
  Tensor or_zero(const OptionalTensor& state, int64_t members = 1) const {
    return state.has_value() ? *state : at::zeros(state_sizes(members), weight.options());
  }

  RecurrentGradients checked(const RecurrentGradients& grads) const {
    const at::ScalarType type = grads.s_seq.has_value() ? grads.s_seq->scalar_type() : real_type(sequence);
    return {like_sequence(grads.s_seq, type, "grad_s_seq"),
            like_sequence(grads.v_seq, "grad_v_seq"),
            like_sequence(grads.h_seq, "grad_h_seq"),
            state(grads.v_last, "grad_v_last", members()),
            state(grads.s_last, "grad_s_last"),
            state(grads.i_last, "grad_i_last")};
  }
  RecurrentResults checked(const RecurrentResults& kept) const {
    return {kept.h_seq, *like_sequence(kept.emitted, "emitted"), like_sequence(kept.i_seq, "i_seq"),
            like_sequence(kept.w_seq, "w_seq")};
  }

  template <class Scalar>
  void fill(RecurrentParams<Scalar>& params) const {
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
    params.v_init = const_pointer<Real>(v_init);
    params.s_init = const_pointer<Real>(s_init);
    params.i_init = const_pointer<Real>(i_init);
  }

  const bool has_synapse, detach_recurrent;
  const Rules rules;
  const Numbers numbers;
  const Tensor sequence, weight, parameters;
  const OptionalTensor rng_state;
  OptionalTensor v_init, s_init, i_init;

 private:
  std::vector<int64_t> state_sizes(int64_t members) const {
    return members == 1 ? std::vector<int64_t>{batch(), neurons()} : std::vector<int64_t>{members, batch(), neurons()};
  }
  OptionalTensor state(const OptionalTensor& given, const char* name, int64_t members = 1) const {
    if (!given.has_value()) return std::nullopt;
    check(*given, state_sizes(members), name);
    return given->contiguous();
  }
  OptionalTensor like_sequence(const OptionalTensor& given, const char* name) const {
    return like_sequence(given, real_type(sequence), name);
  }
  OptionalTensor like_sequence(const OptionalTensor& given, at::ScalarType type, const char* name) const {
    if (!given.has_value()) return std::nullopt;
    check_type(*given, type, sequence, name);
    check_sizes(*given, sequence.sizes(), name);
    return given->contiguous();
  }
  static void check_sizes(const Tensor& tensor, at::IntArrayRef sizes, const char* name) {
    TORCH_CHECK_VALUE(tensor.sizes() == sizes, "asgl_cuda: ", name, " must have shape ", sizes, ", got ",
                      tensor.sizes());
  }
  void check(const Tensor& tensor, at::IntArrayRef sizes, const char* name) const {
    check_type(tensor, real_type(sequence), sequence, name);
    check_sizes(tensor, sizes, name);
  }
};

// Returns s_seq and the other wanted results.
inline std::vector<Tensor> run_forward(const CpuKernels&, const RecurrentCall& call, const WantedResults& wanted) {
  const Tensor& x_seq = call.sequence;
  std::vector<Tensor> results = {in_huge_pages(at::empty(x_seq.sizes(), x_seq.options()))};
  std::array<Tensor, std::tuple_size_v<WantedResults>> others;
  for (size_t i = 0; i < others.size(); ++i) {
    if (!wanted[i]) continue;
    others[i] = i < kStates ? call.empty_sequence() : call.empty_state(i == kStates ? call.members() : 1);
    results.push_back(others[i]);
  }
  if (x_seq.numel() == 0) return results;
  with_scalar(x_seq.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Real = Real_t<Scalar>;
    RecurrentForwardParams<Scalar> params{};
    call.fill(params);
    params.x_seq = const_pointer<Scalar>(x_seq);
    params.s_seq = pointer<Scalar>(results.front());
    Real** fields[] = {&params.emitted, &params.h_seq,  &params.v_seq,  &params.i_seq,
                       &params.w_seq,   &params.v_last, &params.s_last, &params.i_last};
    for (size_t i = 0; i < others.size(); ++i) *fields[i] = pointer<Real>(others[i]);
    cpu::recurrent_forward(params);
  });
  return results;
}

// Returns the wanted gradients, that of x_seq in the arithmetic type.
inline std::vector<Tensor> run_backward(const CpuKernels&, const RecurrentCall& call, const RecurrentGradients& grads,
                                        const RecurrentResults& kept, const WantedRecurrentGradients& wanted) {
  const auto [wants_x_seq, wants_weight, wants_parameters, wants_v_init, wants_s_init, wants_i_init] = wanted;
  const bool elementwise = call.is_elementwise(), wants_sums = wants_parameters || (wants_weight && elementwise);
  const Tensor grad_j_seq = call.empty_sequence();
  const Tensor grad_weight = wants_weight && !elementwise ? at::zeros_like(call.weight) : Tensor();
  const Tensor grad_v_init = wants_v_init ? call.empty_state(call.members()) : Tensor();
  const Tensor grad_s_init = wants_s_init ? call.empty_state() : Tensor();
  const Tensor grad_i_init = wants_i_init ? call.empty_state() : Tensor();
  const int64_t chunks = recurrent_chunks(call.batch());
  const Tensor sums = wants_sums ? at::zeros({chunks, kRecurrentSums, call.neurons()}, at::kDouble) : Tensor();
  const at::ScalarType real = kept.h_seq.scalar_type();
  if (call.sequence.numel() > 0) {
    with_scalar(grads.s_seq.has_value() ? grads.s_seq->scalar_type() : real, [&](auto scalar) {
      using Scalar = decltype(scalar);
      using Real = Real_t<Scalar>;
      RecurrentBackwardParams<Scalar> params{};
      call.fill(params);
      params.detach_recurrent = call.detach_recurrent;
      params.h_seq = const_pointer<Real>(kept.h_seq);
      params.emitted = const_pointer<Real>(kept.emitted);
      params.i_seq = const_pointer<Real>(kept.i_seq);
      params.w_seq = const_pointer<Real>(kept.w_seq);
      params.grad_s_seq = const_pointer<Scalar>(grads.s_seq);
      params.grad_v_seq = const_pointer<Real>(grads.v_seq);
      params.grad_h_seq = const_pointer<Real>(grads.h_seq);
      params.grad_v_last = const_pointer<Real>(grads.v_last);
      params.grad_s_last = const_pointer<Real>(grads.s_last);
      params.grad_i_last = const_pointer<Real>(grads.i_last);
      params.grad_j_seq = pointer<Real>(grad_j_seq);
      params.grad_weight = pointer<Real>(grad_weight);
      params.grad_v_init = pointer<Real>(grad_v_init);
      params.grad_s_init = pointer<Real>(grad_s_init);
      params.grad_i_init = pointer<Real>(grad_i_init);
      params.grad_parameters = pointer<double>(sums);
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
