// A summary of the parameters for the CUDA kernels. Without this summary, a tenth of a kernel's instructions for a
// short sequence would be comparisons for each parameter.
#pragma once

#include "math/divisor.h"

namespace asgl {

enum ParameterId { kWidth, kDecay, kThreshold, kReset, kInputGain, kInputBias, kInputMean, kNumParameters };
// Adaptive neurons have no gain, bias and mean of the input; the parameters of the adaptation take their ids.
constexpr ParameterId kAdaptDecay = kInputGain, kAdaptPotential = kInputBias, kAdaptSpike = kInputMean;

// Computes ParameterView::index without a division, for fewer than kDividendLimit neurons.
struct NeuronIndex {
  Divisor inner, count;

  // The index of neuron n's value.
  ASGL_HOST_DEVICE uint32 index(int64 n) const {
    return count.by == 1 ? 0 : count.remainder(inner.quotient(static_cast<uint32>(n)));
  }
};

struct ParameterSummary {
  uint32 tensors;  // a bit for each parameter that is not constant
  uint32 wanted;   // a bit for each parameter that wants a gradient
  // Whether all parameters that differ between neurons share inner and count (ParameterView). The value of parameter id
  // for neuron n is then at index common.index(n) * strides[id].
  bool alike;
  uint8 by_neuron;  // a bit for each parameter whose values for adjacent neurons are adjacent
  NeuronIndex common;
  uint32 strides[kNumParameters];   // 1, or 0 if there is one value
  NeuronIndex own[kNumParameters];  // used if they are not alike
};

// Whether the bit of a parameter is set.
ASGL_HOST_DEVICE bool has_bit(uint32 bits, int id) { return bits >> id & 1u; }

}  // namespace asgl
