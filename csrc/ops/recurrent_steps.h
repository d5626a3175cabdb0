// The operators of recurrent neurons on kernels that compute one layer at a time: loops over the operators of the
// neuron with a product in between. Nothing is read back to the host.
#pragma once

#include "ops/neuron.h"
#include "ops/recurrent.h"

namespace asgl::ops {

// The rng_state of each step, [seed, offset + t].
inline std::vector<OptionalTensor> states_of_steps(const OptionalTensor& rng_state, int64_t steps) {
  if (!rng_state.has_value()) return std::vector<OptionalTensor>(steps);
  const Tensor is_offset = at::arange(rng_state->numel(), rng_state->options()).eq(1);
  const Tensor states = *rng_state + at::arange(steps, rng_state->options()).unsqueeze(1) * is_offset;
  const std::vector<Tensor> rows = states.unbind();
  return {rows.begin(), rows.end()};
}

// s W^T, or s times the diagonal.
inline Tensor weighted(const Tensor& s, const Tensor& weight) {
  return weight.dim() == 1 ? s * weight : at::mm(s, weight.t());
}

template <class Kernels>
std::vector<Tensor> recurrent_forward(const Kernels& kernels, const Tensor& x_seq, const Tensor& weight,
                                      const Tensor& parameters, const OptionalTensor& v_init,
                                      const OptionalTensor& s_init, const OptionalTensor& i_init,
                                      const OptionalTensor& rng_state, at::ArrayRef<double> numbers,
                                      at::IntArrayRef rules, bool has_synapse, bool /*detach_recurrent*/,
                                      std::array<bool, 7> wanted) {
  const RecurrentCall call(x_seq, weight, parameters, v_init, s_init, i_init, rng_state, constants_of(numbers, rules),
                           has_synapse);
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);  // products, too
  const std::vector<Tensor> row = call.parameters().unbind();
  const auto steps = x_seq.unbind(call.rules().time_dim);
  const auto states = states_of_steps(rng_state, static_cast<int64_t>(steps.size()));
  const Parameters neuron = call.neuron(row[kRecurrentDecay]);
  const Constants constants_of_step = {call.numbers(), call.rules_of_step()};
  OptionalTensor v = v_init;
  Tensor s = call.or_zero(s_init), i = has_synapse ? call.or_zero(i_init) : Tensor();
  std::array<std::vector<Tensor>, 4> sequences;  // emitted, h, v and i
  for (size_t t = 0; t < steps.size(); ++t) {
    const Tensor j = steps[t] + (weighted(s, call.weight()) + row[kRecurrentBias]);
    i = has_synapse ? row[kRecurrentSynDecay] * i + j : j;
    const Call step(i.unsqueeze(0), v, states[t], neuron, std::nullopt, constants_of_step);
    const auto found = ops::forward(kernels, step, {/*v_last=*/true, false, /*h_seq=*/true, false});
    s = found[0].squeeze(0);
    v = found[1];
    const Tensor each[] = {s, found[2].squeeze(0), found[1], i};
    for (size_t k = 0; k < sequences.size(); ++k) {
      if (k == 0 || wanted[k]) sequences[k].push_back(each[k]);
    }
  }
  const Tensor emitted = at::stack(sequences[0], call.rules().time_dim);
  const Tensor s_seq = call.rules().scale_output ? emitted * row[kRecurrentThreshold] : emitted;
  std::vector<Tensor> results = {s_seq.to(x_seq.scalar_type(), /*non_blocking=*/false, /*copy=*/wanted[0])};
  if (wanted[0]) results.push_back(emitted);
  for (size_t k = 1; k < sequences.size(); ++k) {
    if (wanted[k]) results.push_back(at::stack(sequences[k], call.rules().time_dim));
  }
  const Tensor last[] = {*v, s, i};
  for (size_t k = 0; k < 3; ++k) {
    if (wanted[4 + k]) results.push_back(last[k].clone());
  }
  return results;
}

// A step's neuron is computed again from h as its current, at rest, where its decay does not matter.
template <class Kernels>
std::vector<Tensor> recurrent_backward(const Kernels& kernels, const OptionalTensor& grad_s_seq,
                                       const OptionalTensor& grad_v_seq, const OptionalTensor& grad_h_seq,
                                       const OptionalTensor& grad_v_last, const OptionalTensor& grad_s_last,
                                       const OptionalTensor& grad_i_last, const Tensor& h_seq, const Tensor& emitted,
                                       const OptionalTensor& i_seq, const Tensor& weight, const Tensor& parameters,
                                       const OptionalTensor& v_init, const OptionalTensor& s_init,
                                       const OptionalTensor& i_init, const OptionalTensor& rng_state,
                                       at::ArrayRef<double> numbers, at::IntArrayRef rules, bool has_synapse,
                                       bool detach_recurrent, std::array<bool, 6> wanted) {
  const RecurrentCall call(h_seq, weight, parameters, v_init, s_init, i_init, rng_state, constants_of(numbers, rules),
                           has_synapse);
  const auto [wants_x_seq, wants_weight, wants_parameters, wants_v_init, wants_s_init, wants_i_init] = wanted;
  const int64_t time_dim = call.rules().time_dim, steps = h_seq.size(time_dim);
  const bool elementwise = weight.dim() == 1;
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);  // products, too
  const std::vector<Tensor> row = call.parameters().unbind();
  const auto states = states_of_steps(rng_state, steps);
  const Parameters neuron = call.neuron(std::nullopt);
  Constants constants_of_h = {call.numbers(), call.rules_of_step()};
  constants_of_h.numbers.constants[kDecay] = constants_of_h.numbers.v_rest = 0;
  constants_of_h.numbers.constants[kInputGain] = 1;
  WantedGradients wanted_of_step{/*x_seq=*/true};
  for (const int id : {kWidth, kThreshold, kReset}) wanted_of_step.parameters[id] = wants_parameters;
  const Tensor no_checkpoints = at::zeros({2}, h_seq.options());
  const Tensor g_seq = grad_s_seq.has_value() ? grad_s_seq->to(h_seq.scalar_type()) : Tensor();
  const auto at_step = [&](const OptionalTensor& sequence, int64_t t) -> OptionalTensor {
    if (!sequence.has_value() || !sequence->defined()) return std::nullopt;
    return sequence->select(time_dim, t).unsqueeze(0).contiguous();
  };
  std::array<std::vector<Tensor>, 3> of_parameters;  // of width, threshold and reset
  std::vector<Tensor> dh_seq(steps), dj_seq(steps);
  OptionalTensor dv = grad_v_last, di = grad_i_last, feedback = grad_s_last;
  for (int64_t t = steps - 1; t >= 0; --t) {
    OptionalTensor g = at_step(g_seq, t);
    if (g.has_value() && call.rules().scale_output) g = *g * row[kRecurrentThreshold];
    if (feedback.has_value()) g = g.has_value() ? *g + *feedback : feedback->unsqueeze(0);
    const Call step(*at_step(h_seq, t), std::nullopt, states[t], neuron, std::nullopt, constants_of_h);
    const OutputGradients grads{g, dv, at_step(grad_v_seq, t), at_step(grad_h_seq, t)};
    const auto found = ops::backward(kernels, step, grads, no_checkpoints, wanted_of_step);
    for (size_t k = 1; k < found.size(); ++k) of_parameters[k - 1].push_back(found[k]);
    const Tensor dh = found[0].squeeze(0);
    Tensor dj = call.numbers().constants[kInputGain] == 1 ? dh : dh * call.numbers().constants[kInputGain];
    if (has_synapse) {
      if (di.has_value()) dj = dj + *di;
      di = row[kRecurrentSynDecay] * dj;
    }
    dv = row[kRecurrentDecay] * dh;
    feedback = std::nullopt;
    if (!detach_recurrent) feedback = elementwise ? dj * call.weight() : at::mm(dj, call.weight());
    dh_seq[t] = dh;
    dj_seq[t] = dj;
  }
  // Of each step, [T, B, N], and what the step before left.
  const Tensor dh_all = at::stack(dh_seq), dj_all = at::stack(dj_seq);
  const auto before = [&](const Tensor& sequence, const OptionalTensor& first, double otherwise) {
    const Tensor state = first.has_value() ? *first : at::full_like(dv.value(), otherwise);
    return at::cat({state.unsqueeze(0), sequence.slice(0, 0, steps - 1)});
  };
  const Tensor s = emitted.movedim(time_dim, 0), s_before = before(s, s_init, 0);
  std::vector<Tensor> results;
  if (wants_x_seq) results.push_back(dj_all.movedim(0, time_dim).contiguous());
  if (wants_weight) {
    results.push_back(elementwise ? (dj_all * s_before).sum({0, 1})
                                  : at::mm(dj_all.flatten(0, 1).t(), s_before.flatten(0, 1)));
  }
  if (wants_parameters) {
    const Tensor h = h_seq.movedim(time_dim, 0), reset = row[kRecurrentReset];
    const Tensor v = call.rules().hard_reset ? h * (1 - s) + reset * s : h - reset * s;
    const double v_rest = call.numbers().v_rest;
    std::vector<Tensor> totals(kRecurrentParameters, at::zeros_like(reset));
    totals[kRecurrentWidth] = at::stack(of_parameters[0]).sum(0);
    totals[kRecurrentThreshold] = at::stack(of_parameters[1]).sum(0);
    totals[kRecurrentReset] = at::stack(of_parameters[2]).sum(0);
    if (g_seq.defined() && call.rules().scale_output) totals[kRecurrentThreshold] += (g_seq * emitted).sum({0, 1});
    totals[kRecurrentDecay] = (dh_all * (before(v, v_init, v_rest) - v_rest)).sum({0, 1});
    totals[kRecurrentBias] = dj_all.sum({0, 1});
    if (i_seq.has_value()) {
      totals[kRecurrentSynDecay] = (dj_all * before(i_seq->movedim(time_dim, 0), i_init, 0)).sum({0, 1});
    }
    results.push_back(at::stack(totals));
  }
  const OptionalTensor of_states[] = {dv, feedback, di};
  for (size_t k = 0; k < 3; ++k) {
    if (wanted[3 + k]) results.push_back(call.or_zero(of_states[k]).clone());
  }
  return results;
}

// CpuKernels take the kernels of csrc/cpu.
template <class Library, class Kernels>
void implement_recurrent(Library& m, const Kernels& kernels) {
  m.impl("recurrent_forward", on_kernels(kernels, &recurrent_forward<Kernels>));
  m.impl("recurrent_backward", on_kernels(kernels, &recurrent_backward<Kernels>));
}
template <class Library>
void implement_recurrent(Library& m, const CpuKernels&) {
  m.impl("recurrent_forward", recurrent_forward_on_cpu);
  m.impl("recurrent_backward", recurrent_backward_on_cpu);
}

}  // namespace asgl::ops
