// The parameters that a thread's neurons share.
#pragma once

#include "cuda/access.cuh"
#include "params/neuron.h"

namespace asgl {

// Neuron n where no parameter changes over time.
template <class Scalar, class Real = Real_t<Scalar>>
__device__ __forceinline__ Neuron<Real> settled_neuron(const LIFParams<Scalar>& params, int64 n,
                                                       const NeuronOptions<Real>& options) {
  const ParameterSummary& summary = params.summary;
  Real given[kNumParameters];
  const auto read = [&](int id, uint32 index) {
    const ParameterView<Real>& parameter = params.parameters[id];
    given[id] = has(summary.tensors, id) ? parameter.data[index] : parameter.constant;
  };
  if (summary.alike) {
    const uint32 index = summary.common.of(n);
#pragma unroll
    for (int id = 0; id < kNumParameters; ++id) read(id, index * summary.strides[id]);
  } else {
#pragma unroll
    for (int id = 0; id < kNumParameters; ++id) read(id, summary.own[id].of(n));
  }
  return neuron_of<Real>([&](ParameterId id) { return value_of(id, given[id], options); });
}

// Constant over time unless general.
template <class Real, bool kGeneral>
class ThreadNeuron {
 public:
  template <class Scalar>
  __device__ __forceinline__ ThreadNeuron(const LIFParams<Scalar>& params, int64 n, const NeuronOptions<Real>& options)
      : neuron_(settled_neuron(params, n, options)) {}

  __device__ __forceinline__ void move_to(int64) {}
  __device__ __forceinline__ const Neuron<Real>& now() const { return neuron_; }

 private:
  Neuron<Real> neuron_;
};

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
        values_[id] = value_of(static_cast<ParameterId>(id), *first_[id], options);
        per_step_ = per_step_ || parameter.step_stride != 0;
      }
    }
    convert();
  }

  __device__ __forceinline__ void move_to(int64 t) {
    if (!per_step_) return;
#pragma unroll
    for (int id = 0; id < kNumParameters; ++id) {
      const int64 stride = parameters_[id].step_stride;
      if (stride != 0) values_[id] = first_[id][t * stride];
    }
    convert();
  }

  __device__ __forceinline__ const Neuron<Real>& now() const { return neuron_; }

 private:
  __device__ __forceinline__ void convert() {
    neuron_ = neuron_of<Real>([&](ParameterId id) { return values_[id]; });
  }

  const ParameterView<Real> (&parameters_)[kNumParameters];
  const Real* first_[kNumParameters];
  Real values_[kNumParameters];
  bool per_step_ = false;
  Neuron<Real> neuron_;
};

}  // namespace asgl
