// Arguments of products that add up only the elements of x that are not zero:
//
//   out[n, y, x, o] = bias[o] + sum over ky, kx, c of x[n, iy, ix, c] * weight[o, ky, kx, c]
//   iy = y * stride + ky - padding, and ix likewise; elements outside of the image are zero
//   dweight[o, ky, kx, c] = sum over n, y, x of x[n, iy, ix, c] * grad[n, y, x, o]
//
// The terms of each sum are added in the order written. The clones for AVX2 and AVX-512 use fused multiply-adds. A
// linear layer is a convolution of images of one pixel.
#pragma once

#include "math/host_device.h"

namespace asgl {

// The sizes of a convolution.
struct SpikeShape {
  int64 images, channels, height, width;
  int64 outputs, kernel_height, kernel_width;
  int64 stride_height, stride_width, padding_height, padding_width;
  int64 out_height, out_width;

  int64 num_out_pixels() const { return images * out_height * out_width; }
  int64 depth() const { return kernel_height * kernel_width * channels; }  // the largest number of terms of a sum
};

// A tensor of which only elements that are not zero are stored. Elements are in memory order.
template <class Real>
struct PackedSpikes {
  const uint64* mask;  // a bit for each element, from the lowest bit of a word on, set if the element is not zero
  const Real* values;  // the elements that are not zero, or null if all of these are 1
};

template <class Real>
struct SpikeProductParams {
  SpikeShape shape;
  PackedSpikes<Real> x;  // [images, height, width, channels]
  const Real* weight;    // [outputs, kernel_height, kernel_width, channels]
  const Real* panels;    // the weight as fill_spike_panels stores it, or null
  const Real* bias;      // [outputs], or null
  Real* out;             // [images, out_height, out_width, outputs]
};

template <class Real>
struct SpikeGradientParams {
  SpikeShape shape;
  PackedSpikes<Real> x;  // [images, height, width, channels]
  const Real* grad;      // [images, out_height, out_width, outputs]
  Real* grad_weight;     // [outputs, kernel_height, kernel_width, channels]
};

}  // namespace asgl
