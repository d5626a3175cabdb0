// The functions through which the operators of ops/spikes.h call the CPU kernels. Real is float or double.
#pragma once

#include "params/spikes.h"

namespace asgl::cpu {

// Compute the product and the gradient of its weight, with the equations of params/spikes.h.
template <class Real>
void spike_product(const SpikeProductParams<Real>& params);
template <class Real>
void spike_weight_gradient(const SpikeGradientParams<Real>& params);

// Panels are a copy of the weight in the order in which spike_product reads it. The number of outputs is padded to
// whole groups that are computed together. spike_panels_size returns the number of elements of the panels, and
// fill_spike_panels writes all of these but the padding.
template <class Real>
int64 spike_panels_size(const SpikeShape& shape);
template <class Real>
void fill_spike_panels(const SpikeShape& shape, const Real* weight, Real* panels);

// Transposes each of `count` matrices: to[i, k, j] = from[i, j, k]. This converts images to channels_last and back.
template <class Real>
void transpose_each(const Real* from, int64 count, int64 rows, int64 columns, Real* to);

// Pack x as PackedSpikes. pack_spike_mask writes the mask, in whole words, and returns whether all elements that are
// not zero are 1. pack_spike_values writes the elements that are not zero, in order.
template <class Real>
bool pack_spike_mask(const Real* x, int64 length, uint64* mask);
template <class Real>
void pack_spike_values(const Real* x, int64 length, const uint64* mask, Real* values);
// The number of elements that are not zero, from the mask of `length` elements.
int64 count_spikes(const uint64* mask, int64 length);

}  // namespace asgl::cpu
