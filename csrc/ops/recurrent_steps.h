// The operators of recurrent neurons. On the CPU they run a kernel for the whole sequence. On CUDA they loop over the
// steps. A step of forward is a product with the weight, in some cases the sum for the current, and a kernel of the
// neuron. The host does not wait for the device.
#pragma once

#include "ops/neuron.h"
#include "ops/recurrent.h"

namespace asgl::ops {

// Makes the NeuronCalls that compute the steps of a recurrent call. Each has sequences of one step, [1, B, N].
class RecurrentSteps {
 public:
  // Prepares the arguments that all steps share, and an rng_state for each step, in which t * kSeedPerStep is added to
  // the seed. Spikes are fed back unscaled, so scale_output applies later, to the whole sequence. x may be passed as a
  // residual, whose gain is then 1.
  explicit RecurrentSteps(const RecurrentCall& call)
      : parameters_(call.parameters.unbind()), constants_{call.numbers, call.rules}, rng_states_(call.steps()) {
    constants_.rules.time_dim = constants_.rules.scale_output = 0;
    constants_.numbers.residual_gain = 1;
    const int count = call.has_adaptation() ? kNumParameters : kInputGain;  // otherwise the input's are constants
    for (int id = 0; id < count; ++id) neuron_[id] = parameters_[id];
    if (!call.rng_state.has_value()) return;
    const Tensor is_seed = at::arange(call.rng_state->numel(), call.rng_state->options()).eq(0);
    const Tensor t = at::arange(call.steps(), call.rng_state->options()).unsqueeze(1);
    const int64_t seed_of_step = static_cast<int64_t>(kSeedPerStep);
    const std::vector<Tensor> rng_states = (*call.rng_state + t * seed_of_step * is_seed).unbind();
    rng_states_.assign(rng_states.begin(), rng_states.end());
  }

  // The values of a parameter, [N], by RecurrentParameterId.
  const Tensor& parameter(int id) const { return parameters_[id]; }

  // The call of the neuron for step t, with this input and the states before the step.
  NeuronCall forward_call(const Tensor& current, const Tensor& v, int64_t t) const {
    return {current.unsqueeze(0), v, rng_states_[t], neuron_, std::nullopt, constants_};
  }

  // The call of the neuron for step t, whose kernel computes the input (fed + bias) + x.
  NeuronCall forward_call(const Tensor& fed, const Tensor& x, const Tensor& v, int64_t t) const {
    Parameters neuron = neuron_;
    neuron[kInputBias] = parameters_[kRecurrentBias];
    return {fed.unsqueeze(0), v, rng_states_[t], neuron, x.unsqueeze(0), constants_};
  }

  // The call of the neuron for backward of step t. It recomputes the step with h as the input of a neuron at rest, so
  // that the decay does not matter. `reset` is the reset amount if an adaptation changes it, else undefined.
  NeuronCall backward_call(const Tensor& h, const Tensor& reset, int64_t t) const {
    Constants constants = constants_;
    constants.numbers.constants[kInputGain] = 1;
    constants.numbers.v_rest = 0;
    Parameters neuron = neuron_;
    if (reset.defined()) neuron[kReset] = reset;
    return {h, std::nullopt, rng_states_[t], neuron, std::nullopt, constants};
  }

 private:
  std::vector<Tensor> parameters_;
  Constants constants_;
  std::vector<OptionalTensor> rng_states_;
  Parameters neuron_;
};

// Returns s_seq and the other wanted results, as forward_on_cpu does.
inline std::vector<Tensor> forward_by_steps(const Launcher* launcher, const RecurrentCall& call,
                                            const WantedResults& wanted) {
  const RecurrentSteps step(call);
  const Tensor& x_seq = call.sequence;
  // If there is no synapse, adaptation or input gain, and the current is not a wanted result, the neuron's kernel adds
  // up the current. A step then takes two launches.
  const bool wants_current = wanted[3] || wanted[7];
  const bool adds =
      !call.has_synapse && !call.has_adaptation() && call.numbers.constants[kInputGain] == 1 && !wants_current;
  const Tensor x_by_step = x_seq.movedim(call.rules.time_dim, 0);
  const auto x = (adds ? x_by_step.to(call.layout.real()).contiguous() : x_by_step).unbind();
  Tensor v = call.v_init, s = call.state_or_zeros(call.s_init),
         i = call.has_synapse ? call.state_or_zeros(call.i_init) : Tensor();
  std::array<std::vector<Tensor>, kFirstState> sequences;  // emitted, h, v, i and w
  for (size_t t = 0; t < x.size(); ++t) {
    const Tensor fed = call.is_elementwise() ? s * call.weight : at::mm(s, call.weight.t());
    if (!adds) {
      const Tensor j = x[t] + (fed + step.parameter(kRecurrentBias));
      i = call.has_synapse ? step.parameter(kRecurrentSynDecay) * i + j : j;
    }
    const NeuronCall neuron = adds ? step.forward_call(fed, x[t], v, t) : step.forward_call(i, v, t);
    const auto found = neuron_forward(launcher, neuron, {/*v_last=*/true, false, /*h_seq=*/true, false});
    const Tensor w = !call.has_adaptation() ? Tensor() : v.defined() ? v[1] : at::zeros_like(s);
    s = found[0].squeeze(0);
    v = found[1];
    const Tensor each[] = {s, found[2].squeeze(0), call.has_adaptation() ? v[0] : v, i, w};
    for (size_t k = 0; k < sequences.size(); ++k) {
      if (k == 0 || wanted[k]) sequences[k].push_back(each[k]);
    }
  }
  const Tensor emitted = at::stack(sequences[0], call.rules.time_dim);
  const Tensor s_seq = call.rules.scale_output ? emitted * step.parameter(kThreshold) : emitted;
  std::vector<Tensor> results = {s_seq.to(x_seq.scalar_type(), /*non_blocking=*/false, /*copy=*/wanted[0])};
  if (wanted[0]) results.push_back(emitted);
  for (size_t k = 1; k < sequences.size(); ++k) {
    if (wanted[k]) results.push_back(at::stack(sequences[k], call.rules.time_dim));
  }
  const Tensor last[] = {v, s, i};
  for (size_t k = 0; k < 3; ++k) {
    if (wanted[kFirstState + k]) results.push_back(last[k].clone());
  }
  return results;
}

// Returns the wanted gradients, as backward_on_cpu does.
inline std::vector<Tensor> backward_by_steps(const Launcher* launcher, const RecurrentCall& call,
                                             const RecurrentGradients& grads, const RecurrentResults& kept,
                                             const WantedRecurrentGradients& wanted) {
  const auto [wants_x_seq, wants_weight, wants_parameters, wants_v_init, wants_s_init, wants_i_init] = wanted;
  const RecurrentSteps step(call);
  const Rules& rules = call.rules;
  const int64_t time_dim = rules.time_dim, steps = call.steps();
  const bool in_threshold = (rules.adaptation & kAdaptsThreshold) != 0,
             in_reset = (rules.adaptation & kAdaptsReset) != 0;
  const double gain = call.has_adaptation() ? 1 : call.numbers.constants[kInputGain];
  WantedGradients wanted_of_step{/*x_seq=*/true, /*v_init=*/true};
  for (const int id : {kWidth, kThreshold, kReset}) wanted_of_step.parameters[id] = wants_parameters;
  const Tensor no_checkpoints = at::zeros({2}, call.weight.options());
  const Tensor g_seq = grads.s_seq.defined() ? grads.s_seq.to(call.weight.scalar_type()) : Tensor();
  const auto at_step = [&](const Tensor& sequence, int64_t t) {
    return sequence.defined() ? sequence.select(time_dim, t).unsqueeze(0).contiguous() : Tensor();
  };
  // a + b, where an undefined tensor means zero.
  const auto sum = [](const Tensor& a, const Tensor& b) {
    return a.defined() && b.defined() ? a + b : a.defined() ? a : b;
  };
  std::array<std::vector<Tensor>, 3> parameter_grads;  // of width, threshold and reset
  std::vector<Tensor> dh_seq(steps), dj_seq(steps), dw_seq;
  Tensor dv = grads.v_last, di = grads.i_last, feedback = grads.s_last;  // dv: gradient of all states
  for (int64_t t = steps - 1; t >= 0; --t) {
    const Tensor h = at_step(kept.h_seq, t), w = at_step(kept.w_seq, t), gv = at_step(grads.v_seq, t);
    Tensor g = at_step(g_seq, t), reset;
    if (g.defined() && rules.scale_output) g = g * step.parameter(kThreshold);
    g = sum(g, feedback);
    if (call.has_adaptation() && dv.defined()) dw_seq.push_back(dv[1]);
    if (in_reset) reset = step.parameter(kReset) + w;
    if (in_threshold && rules.hard_reset && !rules.detach_reset && (dv.defined() || gv.defined())) {
      // Here h is the potential minus w (compared_potential() in math/adaptive.h). The hard reset acts on the potential
      // itself, h + w, so the gradient of s has the additional term -w times the gradient of v.
      const Tensor whole = dv.defined() ? sum(dv[0] + step.parameter(kAdaptPotential) * dv[1], gv) : gv;
      g = sum(g, -(whole * w));
    }
    if (g.defined()) g = g.view(h.sizes());
    const NeuronCall backward = step.backward_call(h, reset, t);
    const auto found =
        neuron_backward(launcher, backward, {g, dv, gv, at_step(grads.h_seq, t)}, no_checkpoints, wanted_of_step);
    dh_seq[t] = found[0].squeeze(0);
    dv = found[1];
    for (size_t k = 2; k < found.size(); ++k) parameter_grads[k - 2].push_back(found[k]);
    Tensor dj = gain == 1 ? dh_seq[t] : dh_seq[t] * gain;
    if (call.has_synapse) {
      if (di.defined()) dj = dj + di;
      di = step.parameter(kRecurrentSynDecay) * dj;
    }
    feedback = Tensor();
    if (!call.detach_recurrent) feedback = call.is_elementwise() ? dj * call.weight : at::mm(dj, call.weight);
    dj_seq[t] = dj;
  }
  // The gradients of all steps, [T, B, N].
  const Tensor dh_all = at::stack(dh_seq), dj_all = at::stack(dj_seq);
  // Returns the values before each step: the sequence moved one step later. Before step 0 the value is `first`, or
  // `otherwise` if `first` is undefined.
  const auto before = [&](const Tensor& sequence, const Tensor& first, double otherwise) {
    const Tensor state = first.defined() ? first : at::full_like(dh_seq.front(), otherwise);
    return at::cat({state.unsqueeze(0), sequence.slice(0, 0, steps - 1)});
  };
  const Tensor s = kept.emitted.movedim(time_dim, 0), s_before = before(s, call.s_init, 0);
  std::vector<Tensor> results;
  if (wants_x_seq) results.push_back(dj_all.movedim(0, time_dim).contiguous());
  if (wants_weight) {
    results.push_back(call.is_elementwise() ? (dj_all * s_before).sum({0, 1})
                                            : at::mm(dj_all.flatten(0, 1).t(), s_before.flatten(0, 1)));
  }
  if (wants_parameters) {
    const Tensor w = kept.w_seq.defined() ? kept.w_seq.movedim(time_dim, 0) : at::zeros_like(s);
    const Tensor h = kept.h_seq.movedim(time_dim, 0) + (in_threshold ? w : at::zeros({}, w.options()));
    const Tensor reset = in_reset ? step.parameter(kReset) + w : step.parameter(kReset);
    const Tensor v = rules.hard_reset ? h * (1 - s) + reset * s : h - reset * s;
    const double v_rest = call.numbers.v_rest;
    const Tensor v_init = call.has_adaptation() && call.v_init.defined() ? call.v_init[0] : call.v_init;
    std::vector<Tensor> totals(kNumRecurrentParameters, at::zeros_like(step.parameter(kReset)));
    totals[kWidth] = at::stack(parameter_grads[0]).sum(0);
    totals[kThreshold] = at::stack(parameter_grads[1]).sum(0);
    totals[kReset] = at::stack(parameter_grads[2]).flatten(0, -2).sum(0);
    if (g_seq.defined() && rules.scale_output) totals[kThreshold] += (g_seq * kept.emitted).sum({0, 1});
    totals[kDecay] = (dh_all * (before(v, v_init, v_rest) - v_rest)).sum({0, 1});
    if (rules.logit_decay) {
      const Tensor decay = step.parameter(kDecay).clamp(-kLearnedBound, kLearnedBound).sigmoid();
      totals[kDecay] = totals[kDecay] * (1 - decay) * decay;
    }
    totals[kRecurrentBias] = dj_all.sum({0, 1});
    if (kept.i_seq.defined()) {
      totals[kRecurrentSynDecay] = (dj_all * before(kept.i_seq.movedim(time_dim, 0), call.i_init, 0)).sum({0, 1});
    }
    if (!dw_seq.empty()) {  // for the last step only if w_last has a gradient
      const int64_t count = static_cast<int64_t>(dw_seq.size());
      const Tensor dw = at::stack(dw_seq).flip(0);
      totals[kAdaptDecay] = (dw * w.narrow(0, 0, count)).sum({0, 1});
      totals[kAdaptPotential] = (dw * (v.narrow(0, 0, count) - v_rest)).sum({0, 1});
      totals[kAdaptSpike] = (dw * s.narrow(0, 0, count)).sum({0, 1});
    }
    results.push_back(at::stack(totals));
  }
  if (wants_v_init) results.push_back(dv);
  if (wants_s_init) results.push_back(call.state_or_zeros(feedback).clone());
  if (wants_i_init) results.push_back(call.state_or_zeros(di).clone());
  return results;
}

// The operators recurrent_forward and recurrent_backward. asgl_cuda/backends/ops.py has their schemas.
inline std::vector<Tensor> recurrent_forward(const Launcher* launcher, const Tensor& x_seq, const Tensor& weight,
                                             const Tensor& parameters, const OptionalTensor& v_init,
                                             const OptionalTensor& s_init, const OptionalTensor& i_init,
                                             const OptionalTensor& rng_state, at::ArrayRef<double> numbers,
                                             at::IntArrayRef rules, bool has_synapse, bool detach_recurrent,
                                             WantedResults wanted) {
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);  // also for the products
  const RecurrentCall call(x_seq, weight, parameters, v_init, s_init, i_init, rng_state, constants_of(numbers, rules),
                           has_synapse, detach_recurrent);
  return launcher == nullptr ? forward_on_cpu(call, wanted) : forward_by_steps(launcher, call, wanted);
}

inline std::vector<Tensor> recurrent_backward(
    const Launcher* launcher, const OptionalTensor& grad_s_seq, const OptionalTensor& grad_v_seq,
    const OptionalTensor& grad_h_seq, const OptionalTensor& grad_v_last, const OptionalTensor& grad_s_last,
    const OptionalTensor& grad_i_last, const Tensor& h_seq, const Tensor& emitted, const OptionalTensor& i_seq,
    const OptionalTensor& w_seq, const Tensor& weight, const Tensor& parameters, const OptionalTensor& v_init,
    const OptionalTensor& s_init, const OptionalTensor& i_init, const OptionalTensor& rng_state,
    at::ArrayRef<double> numbers, at::IntArrayRef rules, bool has_synapse, bool detach_recurrent,
    WantedRecurrentGradients wanted) {
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
  const RecurrentCall call(h_seq, weight, parameters, v_init, s_init, i_init, rng_state, constants_of(numbers, rules),
                           has_synapse, detach_recurrent);
  const Layout& layout = call.layout;
  layout.check_type_and_device(h_seq, layout.real(), "h_seq");
  TORCH_CHECK_TYPE(emitted.defined(), "asgl_cuda: emitted must be a tensor");
  const at::ScalarType real = layout.real(), type = grad_s_seq.has_value() ? grad_s_seq->scalar_type() : real;
  const RecurrentGradients grads{layout.checked_sequence(grad_s_seq, type, "grad_s_seq"),
                                 layout.checked_sequence(grad_v_seq, real, "grad_v_seq"),
                                 layout.checked_sequence(grad_h_seq, real, "grad_h_seq"),
                                 layout.checked_state(grad_v_last, "grad_v_last", call.num_states()),
                                 layout.checked_state(grad_s_last, "grad_s_last"),
                                 layout.checked_state(grad_i_last, "grad_i_last")};
  const RecurrentResults kept{h_seq, layout.checked_sequence(emitted, real, "emitted"),
                              layout.checked_sequence(i_seq, real, "i_seq"),
                              layout.checked_sequence(w_seq, real, "w_seq")};
  return launcher == nullptr ? backward_on_cpu(call, grads, kept, wanted)
                             : backward_by_steps(launcher, call, grads, kept, wanted);
}

// Registers the operators of this file. `m` is a torch::Library or has its interface.
template <class Library>
void register_recurrent_operators(Library& m, const Launcher* launcher) {
  m.impl("recurrent_forward", bind_launcher(launcher, &recurrent_forward));
  m.impl("recurrent_backward", bind_launcher(launcher, &recurrent_backward));
}

}  // namespace asgl::ops
