// The expected results of the neuron's kernels, by a plain loop over neurons and steps, and their comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "params/neuron.h"
#include "trials.h"

namespace asgl_emulation {

using namespace asgl;

struct Sum {
  double total = 0, magnitude = 0;
  int64 terms = 0;

  void add(double term) { total += term, magnitude += std::fabs(term), ++terms; }
};

template <class Real>
struct Expected {
  std::vector<Real> s_seq, h_seq, v_seq, v_last, grad_x_seq, grad_residual, grad_v_init;
  std::vector<Sum> grad_parameters[kNumParameters];
};

inline bool is_analog(const NoiseParams& noise, int64 n, int64 t) {
  if (!noise.drawn()) return noise.analog_below > 0;
  const NoiseBlock block =
      noise_block(static_cast<uint64>(n / 4), static_cast<uint32>(t / 2), noise_key(noise.rng_state));
  return (block.draws[t % 2] >> (16 * (n % 4)) & 0xFFFFu) < noise.analog_below;
}

// LIFByOptions written independently, around the LIF that the options select.
template <class Named>
struct RulesAgain : Named {
  template <class Real>
  struct Rules : Named {
    const LIFByOptions<Real>& options;

    explicit Rules(const LIFByOptions<Real>& those) : options(those) {}
    Real fire(Real h, bool analog, const Neuron<Real>& neuron, const Firing<Real>& firing) const {
      if (!options.multi_spike) return Named::fire(h, analog, neuron, firing);
      const Real several = h > 0 ? std::trunc(h / neuron.v_threshold) : Real(0);
      return options.levels > 0 ? std::min(several, Real(options.levels)) : several;
    }
    Real above_floor(Real h, Real s, const Neuron<Real>& neuron) const {
      return std::max(Named::reset(h, s, neuron) - options.v_min, Real(0));
    }
    Real reset(Real h, Real s, const Neuron<Real>& neuron) const {
      return options.floored ? above_floor(h, s, neuron) + options.v_min : Named::reset(h, s, neuron);
    }
    Real floor_adjoint(Real h, Real s, const Neuron<Real>& neuron, Real dv) const {
      return options.floored && above_floor(h, s, neuron) == 0 ? Real(0) : dv;
    }
    Real distance(Real h, const Neuron<Real>& neuron) const {
      if (!options.periodic || h < neuron.v_threshold) return Named::distance(h, neuron);
      const Real turns = h / neuron.v_threshold - Real(0.5);
      return neuron.v_threshold * (2 * (turns - std::floor(turns)) - 1);
    }
    StepGradient<Real> step_adjoint(Real ds, Real gh, Real h, Real s, bool carried, Neuron<Real> neuron,
                                    const NeuronOptions<Real>&, Real& dv) const {
      const Real d = distance(h, neuron);
      neuron.v_threshold = 0;
      return Named::step_adjoint(ds, gh, d, s, carried, neuron, options, dv);
    }
  };

  template <class Real>
  static Rules<Real> of(const LIFByOptions<Real>& options) {
    return Rules<Real>(options);
  }
};

template <class Model, class Scalar>
Expected<Real_t<Scalar>> expect(const BackwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const SequenceShape& shape = params.shape;
  const LIFByOptions<Real>& options = params.options;
  const auto model = Model::of(options);
  Expected<Real> expected;
  for (auto* sequence :
       {&expected.s_seq, &expected.h_seq, &expected.v_seq, &expected.grad_x_seq, &expected.grad_residual}) {
    sequence->resize(shape.neurons() * shape.steps);
  }
  for (auto* state : {&expected.v_last, &expected.grad_v_init}) state->resize(shape.neurons());
  for (int id = 0; id < kNumParameters; ++id) {
    const ParameterView<Real>& parameter = params.parameters[id];
    expected.grad_parameters[id].resize((parameter.step_stride != 0 ? shape.steps : 1) * parameter.count);
  }

  std::vector<Neuron<Real>> neurons(shape.steps);
  std::vector<Real> spikes(shape.steps), v_before(shape.steps);
  for (int64 n = 0; n < shape.neurons(); ++n) {
    Real v = params.v_init != nullptr ? params.v_init[n] : options.v_rest;
    for (int64 t = 0; t < shape.steps; ++t) {
      const int64 element = shape.element(n, t);
      neurons[t] =
          neuron_of<Real>([&](ParameterId id) { return value_of(id, params.parameters[id].at(n, t), options); });
      v_before[t] = v;
      const Real x = to_real(params.x_seq[element]);
      Real c = input_current<Input::kGeneral>(x, neurons[t]);
      if (params.residual != nullptr) c += params.residual_gain * to_real(params.residual[element]);
      const Real h = Model::template charge<Input::kGeneral>(c, v, neurons[t], options);
      const Real s = model.fire(h, is_analog(params.noise, n, t), neurons[t], Firing<Real>(options));
      v = model.reset(h, s, neurons[t]);
      spikes[t] = s;
      expected.h_seq[element] = h;
      expected.v_seq[element] = v;
      expected.s_seq[element] = options.scale_output ? s * neurons[t].v_threshold : s;
    }
    expected.v_last[n] = v;

    bool carried = params.grad_v_last != nullptr;
    Real dv = carried ? params.grad_v_last[n] : Real(0);
    for (int64 t = shape.steps - 1; t >= 0; --t) {
      const int64 element = shape.element(n, t);
      const Neuron<Real>& neuron = neurons[t];
      const Real h = expected.h_seq[element], s = spikes[t];
      Real g = params.grad_s_seq != nullptr ? to_real(params.grad_s_seq[element]) : Real(0);
      const Real gh = params.grad_h_seq != nullptr ? params.grad_h_seq[element] : Real(0);
      if (params.grad_v_seq != nullptr) {
        dv += params.grad_v_seq[element];
        carried = true;
      }
      const auto add = [&](ParameterId id, double term) {
        const ParameterView<Real>& parameter = params.parameters[id];
        const int64 row = parameter.step_stride != 0 ? t * parameter.count : 0;
        expected.grad_parameters[id][row + parameter.index(n)].add(term);
      };
      if (options.scale_output) {
        add(kThreshold, static_cast<double>(g) * s);
        g = g * neuron.v_threshold;
      }
      dv = model.floor_adjoint(h, s, neuron, dv);
      const Real dv_after = dv, ds = model.spike_gradient(g, h, carried && !options.detach_reset, neuron, dv);
      const StepGradient<Real> step = model.step_adjoint(ds, gh, h, s, carried, neuron, options, dv);
      const double dy = step.dy, dh = step.dh, dc = step.dc;
      const double width = value_of(kWidth, params.parameters[kWidth].at(n, t), options), decay = neuron.decay;
      add(kWidth, -dy * model.distance(h, neuron) / (options.log_width ? width : width * width));
      add(kDecay, dh * (v_before[t] - options.v_rest) * (options.logit_decay ? (1 - decay) * decay : 1));
      add(kThreshold, -dy / width);
      if (carried) add(kReset, static_cast<double>(options.hard_reset ? dv_after : -dv_after) * s);
      add(kInputGain, dc * (static_cast<double>(to_real(params.x_seq[element])) - neuron.input_mean));
      add(kInputBias, dc);
      add(kInputMean, -dc * neuron.input_gain);
      expected.grad_x_seq[element] = neuron.input_gain * step.dc;
      expected.grad_residual[element] = params.residual_gain * step.dc;
      carried = true;
    }
    expected.grad_v_init[n] = dv;
  }
  return expected;
}

// Equal up to the sign of a zero, which Input may change in charge.
template <class Element>
void compare(const char* name, const Buffer<Element>& found, const std::vector<Real_t<Element>>& expected,
             Texts& differences) {
  for (int64 i = 0; i < found.size(); ++i) {
    const double is = to_real(found.data()[i]), should_be = to_real(from_real<Element>(expected[i]));
    if (same(is, should_be)) continue;
    differences.push_back(text("%s[%lld] is %.9g, expected %.9g", name, i, is, should_be));
    return;
  }
  if (found.data() != nullptr && found.overrun()) differences.push_back(text("%s was written beyond its end", name));
}

// CUDA kernels sum a thread's terms, of at most four neurons, then 128 threads in three and five additions, all in
// Real; the CPU sums the terms of up to 16 neurons, then in double; a term has a few more roundings. Each rounding is
// at most half an epsilon of the sum of all magnitudes, or half the smallest subnormal: for the width divided by its
// square, at least a quarter.
template <class Real>
void compare(const std::string& name, const Buffer<Real>& found, const std::vector<Sum>& expected, int64 steps,
             Texts& differences) {
  const double tolerance = static_cast<double>(std::numeric_limits<Real>::epsilon()) * ((kOnCpu ? 8 : 2) * steps + 8);
  for (int64 i = 0; i < found.size(); ++i) {
    const double is = found.data()[i], should_be = expected[i].total;
    const double least = 2.0 * std::numeric_limits<Real>::denorm_min() * expected[i].terms;
    if (std::fabs(is - should_be) <= tolerance * expected[i].magnitude + least) continue;
    differences.push_back(text("%s[%lld] is %.9g, expected %.9g", name.c_str(), i, is, should_be));
    return;
  }
  if (found.overrun()) differences.push_back(text("%s was written beyond its end", name.c_str()));
}

}  // namespace asgl_emulation
