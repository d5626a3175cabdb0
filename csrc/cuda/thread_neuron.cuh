// The parameters of a thread's neurons, in registers.
#pragma once

#include "cuda/access.cuh"
#include "params/neuron.h"

namespace asgl {

// The parameters of the neurons of a thread, of which n is the first. This template is for parameters that do not
// change over time. If kNeurons is 1, the neurons share all parameters. Otherwise each neuron has its own.
template <class Real, bool kGeneral, int kNeurons = 1>
class ThreadNeuron {
 public:
  template <class Scalar>
  __device__ __forceinline__ ThreadNeuron(const LIFParams<Scalar>& params, int64 n,
                                          const NeuronOptions<Real>& options) {
    const ParameterSummary& summary = params.summary;
    Real given[kNumParameters][kNeurons];
    const auto read = [&](int id, uint32 index) {
      const ParameterView<Real>& parameter = params.parameters[id];
      if (kNeurons > 1 && has_bit(summary.by_neuron, id)) {
        Access<kNeurons>::load(parameter.data + index, given[id]);
      } else {
        fill(given[id], has_bit(summary.tensors, id) ? parameter.data[index] : parameter.constant);
      }
    };
    if (summary.alike) {
      const uint32 index = summary.common.index(n);
#pragma unroll
      for (int id = 0; id < kNumParameters; ++id) read(id, index * summary.strides[id]);
    } else {
#pragma unroll
      for (int id = 0; id < kNumParameters; ++id) read(id, summary.own[id].index(n));
    }
#pragma unroll
    for (int j = 0; j < kNeurons; ++j) {
      neurons_[j] = make_neuron<Real>([&](ParameterId id) { return parameter_value(id, given[id][j], options); });
    }
  }

  // Does nothing, because the parameters are the same at every step.
  __device__ __forceinline__ void move_to(int64) {}
  // The parameters of the thread's neuron j.
  __device__ __forceinline__ const Neuron<Real>& now(int j = 0) const { return neurons_[j % kNeurons]; }

 private:
  Neuron<Real> neurons_[kNeurons];
};

// The specialisation for parameters that may change over time. The neurons of a thread share all of them.
template <class Real>
class ThreadNeuron<Real, true> {
 public:
  template <class Scalar>
  __device__ __forceinline__ ThreadNeuron(const LIFParams<Scalar>& params, int64 n, const NeuronOptions<Real>& options)
      : parameters_(params.parameters) {
#pragma unroll
    for (int id = 0; id < kNumParameters; ++id) {
      const ParameterView<Real>& parameter = parameters_[id];
      values_[id] = parameter.constant;
      first_[id] = nullptr;
      if (parameter.data != nullptr) {
        first_[id] = parameter.data + parameter.index(n);
        values_[id] = parameter_value(static_cast<ParameterId>(id), *first_[id], options);
        per_step_ = per_step_ || parameter.step_stride != 0;
      }
    }
    update_neuron();
  }

  // Reads the parameters of step t that change over time. They are never logarithms or logits (checked in ops/call.h),
  // so parameter_value is not needed.
  __device__ __forceinline__ void move_to(int64 t) {
    if (!per_step_) return;
#pragma unroll
    for (int id = 0; id < kNumParameters; ++id) {
      const int64 stride = parameters_[id].step_stride;
      if (stride != 0) values_[id] = first_[id][t * stride];
    }
    update_neuron();
  }

  // The parameters at the step of the last move_to, for any of the thread's neurons.
  __device__ __forceinline__ const Neuron<Real>& now(int = 0) const { return neuron_; }

 private:
  // Sets neuron_ from the values, with the inverse of the width.
  __device__ __forceinline__ void update_neuron() {
    neuron_ = make_neuron<Real>([&](ParameterId id) { return values_[id]; });
  }

  const ParameterView<Real> (&parameters_)[kNumParameters];
  const Real* first_[kNumParameters];
  Real values_[kNumParameters];
  bool per_step_ = false;
  Neuron<Real> neuron_;
};

}  // namespace asgl
