// The functions through which the operators of ops/spikes.h call the CPU kernels. Real is float or double.
#pragma once

#include "params/spikes.h"

namespace asgl::cpu {

// The product and the gradient of its weight, with the equations of params/spikes.h.
template <class Real>
void spike_product(const SpikeProductParams<Real>& params);
template <class Real>
void spike_weight_gradient(const SpikeGradientParams<Real>& params);

// A copy of the weight in the order in which spike_product reads it: the number of its elements, and a function that
// fills it.
template <class Real>
int64 spike_panels_size(const SpikeShape& shape);
template <class Real>
void fill_spike_panels(const SpikeShape& shape, const Real* weight, Real* panels);

// Transposes each of `count` matrices: to[i, k, j] = from[i, j, k]. This converts images to channels_last and back.
template <class Real>
void transpose_each(const Real* from, int64 count, int64 rows, int64 columns, Real* to);

// Spikes packed: a bit for each element, in whole words of 64 bits, and the elements that are not zero. mask_spikes
// writes the bits and counts these elements; copy_spikes copies them.
struct SpikeCount {
  int64 nonzero;
  bool all_ones;
};
template <class Real>
SpikeCount mask_spikes(const Real* x, int64 length, uint8* mask);
template <class Real>
void copy_spikes(const Real* x, int64 length, Real* values);
// Restores the elements. If `values` is null, all elements that are not zero are 1.
template <class Real>
void unpack_spikes(const uint8* mask, const Real* values, int64 length, Real* x);

}  // namespace asgl::cpu
