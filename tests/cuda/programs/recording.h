// Launches as files keep them: a kernel's params, and each of their arrays before and after.
#pragma once

#include <string>
#include <type_traits>

#include "params/gradient.h"
#include "params/integrator.h"
#include "params/normalisation.h"
#include "params/recurrent.h"

namespace asgl_recording {

using namespace asgl;

// ---- the arrays of params ----

// Calls use(pointer, elements, in_fours) for each array that is there. Pointers are references; those to const are
// inputs, others results. Kernels read or write four elements of arrays `in_fours` at once where all are aligned.
template <class Use>
struct Arrays {
  const Use& use;
  int64 steps;

  template <class Element>
  void operator()(Element*& pointer, int64 elements, bool in_fours = true) const {
    if (pointer != nullptr) use(pointer, elements, in_fours);
  }
  template <class Real>
  void parameter(ParameterView<Real>& view) const {
    (*this)(view.data, (view.step_stride != 0 ? steps : 1) * view.count, view.inner == 1);
  }
  template <class Real>
  void partials(GradientPartials<Real>& partials, const ParameterView<Real>& view) const {
    (*this)(partials.data, (view.step_stride != 0 ? steps : 1) * partials.slots, false);
  }
  void noise(NoiseParams& noise) const {
    (*this)(noise.rng_state, noise.analog_below == kAnalogBelowInState ? 3 : 2, false);
  }
};

template <class Scalar>
int64 elements_of(const LIFParams<Scalar>& params) {
  return params.shape.neurons() * params.shape.steps;
}
template <class Scalar>
int64 states_of(const LIFParams<Scalar>& params) {
  return params.shape.neurons() * params.options.num_states();
}
template <class Scalar>
int64 checkpoints_of(const LIFParams<Scalar>& params) {
  return checkpoint_stride(params.shape) * params.options.num_states();
}

template <class Scalar, class Use>
Arrays<Use> inputs_of(LIFParams<Scalar>& params, const Use& use) {
  const Arrays<Use> arrays{use, params.shape.steps};
  arrays(params.x_seq, elements_of(params));
  arrays(params.v_init, states_of(params));
  arrays(params.residual, elements_of(params));
  arrays.noise(params.noise);
  for (auto& parameter : params.parameters) arrays.parameter(parameter);
  return arrays;
}

template <class Scalar, class Use>
void for_each_array(ForwardParams<Scalar>& params, const Use& use) {
  const auto arrays = inputs_of(params, use);
  arrays(params.s_seq, elements_of(params));
  arrays(params.v_last, states_of(params));
  for (auto* sequence : {&params.v_seq, &params.h_seq}) arrays(*sequence, elements_of(params));
  arrays(params.checkpoints, checkpoints_of(params));
  arrays(params.zeros, 2, false);
}

template <class Scalar, class Use>
void for_each_array(BackwardParams<Scalar>& params, const Use& use) {
  const auto arrays = inputs_of(params, use);
  arrays(params.grad_s_seq, elements_of(params));
  arrays(params.grad_v_last, states_of(params));
  for (auto* sequence : {&params.grad_v_seq, &params.grad_h_seq}) arrays(*sequence, elements_of(params));
  arrays(params.checkpoints, checkpoints_of(params));
  for (auto* sequence : {&params.grad_x_seq, &params.grad_residual}) arrays(*sequence, elements_of(params));
  arrays(params.grad_v_init, states_of(params));
  for (int id = 0; id < kNumParameters; ++id) arrays.partials(params.partials[id], params.parameters[id]);
}

template <class Scalar, class Use>
void for_each_array(IntegratorParams<Scalar>& params, const Use& use) {
  const auto arrays = inputs_of(params, use);
  arrays(params.v_seq, elements_of(params));
  arrays(params.grad_v_seq, elements_of(params));
  arrays(params.grad_x_seq, elements_of(params));
  arrays(params.grad_v_last, states_of(params));
  for (auto* state : {&params.v_last, &params.grad_v_init}) arrays(*state, states_of(params));
  for (int id = 0; id < kNumParameters; ++id) arrays.partials(params.partials[id], params.parameters[id]);
}

template <class Real, class Use>
void for_each_array(GradientSum<Real>& sum, const Use& use) {
  const Arrays<Use> arrays{use, sum.shape.steps};
  for (int id = 0; id < sum.count; ++id) {
    GradientPart<Real>& part = sum.parts[id];
    arrays.partials(part.partials, part.parameter);
    arrays(part.parameter.data, part.num_elements(sum.shape), false);
    arrays(part.gradient, part.num_elements(sum.shape), false);
    arrays(part.totals, part.num_totals(sum.shape), false);
  }
}

template <class Scalar, class Use>
void for_each_array(MomentsParams<Scalar>& params, const Use& use) {
  const Arrays<Use> arrays{use, 1};
  arrays(params.x_seq, params.tiles.shape.rows * params.tiles.shape.columns());
  arrays(params.moments, params.tiles.num_slots() * params.tiles.shape.channels, false);
}

template <class Real, class Use>
void for_each_array(CoefficientsParams<Real>& params, const Use& use) {
  const Arrays<Use> arrays{use, 1};
  arrays(params.moments, params.slots * params.channels);
  for (auto* values : {&params.mean, &params.variance, &params.weight, &params.bias}) arrays(*values, params.channels);
  arrays(params.coefficients, kNumCoefficients * params.channels);
  arrays(params.total, params.channels);
  for (auto* values : {&params.running_mean, &params.running_var}) arrays(*values, params.channels);
  arrays(params.num_batches_tracked, 1);
}

template <class Scalar, class Use>
void for_each_array(InputGradientParams<Scalar>& params, const Use& use) {
  const Arrays<Use> arrays{use, 1};
  const int64 elements = params.tiles.shape.rows * params.tiles.shape.columns(), channels = params.tiles.shape.channels;
  arrays(params.x_seq, elements);
  arrays(params.moments, channels, false);
  arrays(params.coefficients, kNumCoefficients * channels, false);
  for (auto* sums : {&params.grad_gain, &params.grad_bias, &params.total_grad_gain, &params.total_grad_bias}) {
    arrays(*sums, channels, false);
  }
  for (auto* values : {&params.grad_weight, &params.grad_shift}) arrays(*values, channels, false);
  arrays(params.grad_x_seq, elements);
  arrays(params.grad_residual, elements);
}

// Elements of v_init and the like: of v, and of adaptive neurons w.
template <class Scalar>
int64 potentials(const RecurrentParams<Scalar>& params) {
  return params.options.num_states() * params.batch * params.neurons;
}

template <class Scalar, class Use>
Arrays<Use> inputs_of(RecurrentParams<Scalar>& params, const Use& use) {
  const Arrays<Use> arrays{use, 1};
  const int64 neurons = params.neurons, states = params.batch * neurons;
  arrays(params.weight, params.elementwise ? neurons : neurons * neurons);
  arrays(params.parameters, kNumRecurrentParameters * neurons);
  arrays(params.v_init, potentials(params));
  for (auto* state : {&params.s_init, &params.i_init}) arrays(*state, states);
  arrays.noise(params.noise);
  return arrays;
}

template <class Scalar, class Use>
void for_each_array(RecurrentForwardParams<Scalar>& params, const Use& use) {
  const auto arrays = inputs_of(params, use);
  const int64 states = params.batch * params.neurons, elements = params.steps * states;
  arrays(params.x_seq, elements);
  arrays(params.s_seq, elements);
  for (auto* sequence : {&params.emitted, &params.h_seq, &params.v_seq, &params.i_seq, &params.w_seq}) {
    arrays(*sequence, elements);
  }
  arrays(params.v_last, potentials(params));
  for (auto* state : {&params.s_last, &params.i_last}) arrays(*state, states);
}

template <class Scalar, class Use>
void for_each_array(RecurrentBackwardParams<Scalar>& params, const Use& use) {
  const auto arrays = inputs_of(params, use);
  const int64 neurons = params.neurons, states = params.batch * neurons, elements = params.steps * states;
  for (auto* sequence : {&params.h_seq, &params.emitted, &params.i_seq, &params.w_seq}) arrays(*sequence, elements);
  for (auto* sequence : {&params.grad_v_seq, &params.grad_h_seq}) arrays(*sequence, elements);
  arrays(params.grad_s_seq, elements);
  arrays(params.grad_v_last, potentials(params));
  for (auto* state : {&params.grad_s_last, &params.grad_i_last}) arrays(*state, states);
  arrays(params.grad_j_seq, elements);
  arrays(params.grad_weight, neurons * neurons);
  arrays(params.grad_v_init, potentials(params));
  for (auto* state : {&params.grad_s_init, &params.grad_i_init}) arrays(*state, states);
  arrays(params.grad_parameters, num_recurrent_chunks(params.batch) * kNumRecurrentSums * neurons);
}

// ---- kernels ----

// The types of x_seq in files. float16 differs only in its conversions, and would take long to compile.
template <template <class> class Params, class F>
void for_each_scalar(const char* kernel, const F& f) {
  f.template operator()<Params<float>>(kernel, "float");
  f.template operator()<Params<BFloat16>>(kernel, "asgl::BFloat16");
  f.template operator()<Params<double>>(kernel, "double");
}
template <template <class> class Params, class F>
void for_each_real(const char* kernel, const F& f) {
  f.template operator()<Params<float>>(kernel, "float");
  f.template operator()<Params<double>>(kernel, "double");
}

// f<params>(name, type of the name's template). Kernels for the CPU have the first name of their params.
template <class F>
void for_each_kernel(const F& f) {
  for_each_scalar<ForwardParams>("asgl::lif_forward_kernel", f);
  for_each_scalar<BackwardParams>("asgl::lif_backward_kernel", f);
  for_each_scalar<BackwardParams>("asgl::lif_backward_settled_kernel", f);
  for_each_scalar<ForwardParams>("asgl::adaptive_forward_kernel", f);
  for_each_scalar<BackwardParams>("asgl::adaptive_backward_kernel", f);
  for_each_scalar<IntegratorParams>("asgl::integrator_kernel", f);
  for_each_real<GradientSum>("asgl::gradient_sum_kernel", f);
  for_each_scalar<MomentsParams>("asgl::batch_moments_kernel", f);
  for_each_real<CoefficientsParams>("asgl::batch_norm_coefficients_kernel", f);
  for_each_scalar<InputGradientParams>("asgl::batch_norm_input_gradient_kernel", f);
  for_each_scalar<RecurrentForwardParams>("asgl::recurrent_forward", f);
  for_each_scalar<RecurrentBackwardParams>("asgl::recurrent_backward", f);
}

// Calls f<params>() for a kernel named by its C++ expression. Returns whether there is one.
template <class F>
bool with_params(const std::string& kernel, const F& f) {
  bool found = false;
  for_each_kernel([&]<class Params>(const char* name, const char* type) {
    const std::string begin = std::string(name) + "<" + type;
    if (kernel.rfind(begin, 0) != 0 || kernel.find_first_of(",>", begin.size()) != begin.size()) return;
    found = true;
    f.template operator()<Params>();
  });
  return found;
}

template <class Wanted>
std::string name_of_cpu_kernel() {
  std::string found;
  for_each_kernel([&]<class Params>(const char* name, const char* type) {
    if (std::is_same_v<Params, Wanted> && found.empty()) found = std::string(name) + "<" + type + ">";
  });
  return found;
}

// What a file has in front of the params. They and then the arrays follow: the address modulo kAlignment, the elements
// before the launch, and of results those after it.
struct Header {
  int64 bytes;                      // of all that belongs to the launch
  int64 blocks, threads, resident;  // of CUDA; the last is the number of threads that the device holds
  char kernel[128];
};
constexpr int64 kAlignment = 64;

}  // namespace asgl_recording
