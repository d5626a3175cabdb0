// The operators of spike layers, which are linear layers and convolutions that skip zeros in their input, and the
// packing of spikes. For the CPU, in float32 and float64.
#pragma once

#include <torch/library.h>

#include <cstring>
#include <limits>

#include "cpu/spikes.h"
#include "ops/call.h"

namespace asgl::ops {

// Calls f(double{}) for float64, else f(float{}). Callers have refused other types.
template <class F>
void with_real(at::ScalarType type, F&& f) {
  if (type == at::kDouble) return f(double{});
  f(float{});
}

// The checked arguments of a linear layer, x [..., channels], or a convolution, x [images, channels, (height,) width].
// Both are computed as a convolution of images in memory order [images, height, width, channels]. `weight` has the
// sizes of the weight, in torch's order.
class SpikeCall {
 public:
  SpikeCall(const Tensor& x, at::IntArrayRef weight, at::IntArrayRef stride, at::IntArrayRef padding)
      : type(x.scalar_type()), dims_(static_cast<int64_t>(weight.size())) {
    TORCH_CHECK_TYPE(x.is_cpu() && (type == at::kFloat || type == at::kDouble),
                     "asgl_cuda: x must be float32 or float64 on the CPU, got ", type, " on ", x.device());
    TORCH_CHECK_VALUE(2 <= dims_ && dims_ <= 4, "asgl_cuda: weight must have 2 to 4 dimensions, got ", dims_);
    const size_t spatial = static_cast<size_t>(dims_ - 2);
    TORCH_CHECK_VALUE(stride.size() == spatial && padding.size() == spatial, "asgl_cuda: stride and padding must have ",
                      spatial, " elements, got ", stride.size(), " and ", padding.size());
    TORCH_CHECK_VALUE(spatial == 0 ? x.dim() >= 1 : x.dim() == dims_, "asgl_cuda: x must have ",
                      spatial == 0 ? 1 : dims_, spatial == 0 ? " or more" : "", " dimensions for this weight, got ",
                      x.dim());
    const int64_t channels = x.size(spatial == 0 ? -1 : 1);
    TORCH_CHECK_VALUE(channels == weight[1], "asgl_cuda: x must have ", weight[1], " channels, got ", channels);
    shape.channels = channels;
    shape.outputs = weight[0];
    shape.images =
        spatial == 0 ? (channels == 0 ? c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)) : x.numel() / channels)
                     : x.size(0);
    shape.height = spatial == 2 ? x.size(2) : 1;
    shape.width = spatial == 0 ? 1 : x.size(-1);
    const auto last = [&](at::IntArrayRef sizes, size_t back, int64_t otherwise) {
      return back < spatial ? sizes[sizes.size() - 1 - back] : otherwise;
    };
    shape.kernel_height = last(weight, 1, 1);
    shape.kernel_width = last(weight, 0, 1);
    shape.stride_height = last(stride, 1, 1);
    shape.stride_width = last(stride, 0, 1);
    shape.padding_height = last(padding, 1, 0);
    shape.padding_width = last(padding, 0, 0);
    TORCH_CHECK_VALUE(shape.stride_height > 0 && shape.stride_width > 0 && shape.padding_height >= 0 &&
                          shape.padding_width >= 0 && shape.kernel_height > 0 && shape.kernel_width > 0,
                      "asgl_cuda: stride and kernel_size must be positive, and padding not negative");
    shape.out_height = out_size(shape.height, shape.kernel_height, shape.stride_height, shape.padding_height);
    shape.out_width = out_size(shape.width, shape.kernel_width, shape.stride_width, shape.padding_width);
    TORCH_CHECK_VALUE(shape.out_height > 0 && shape.out_width > 0,
                      "asgl_cuda: the kernel is larger than the image with its padding, for x of shape ", x.sizes());
    const double row_length = (static_cast<double>(shape.width) + static_cast<double>(shape.padding_width) +
                               static_cast<double>(shape.kernel_height) * static_cast<double>(shape.kernel_width)) *
                              static_cast<double>(channels);
    TORCH_CHECK_VALUE(row_length < std::numeric_limits<int32_t>::max(),
                      "asgl_cuda: a row of the padded image must have fewer than 2^31 elements, got x of shape ",
                      x.sizes());
  }

  bool is_linear() const { return dims_ == 2; }

  // The tensor in the memory order of the kernels: contiguous for a linear layer, and channels_last for a convolution.
  // A line [*, *, width] becomes an image [*, *, 1, width].
  Tensor in_kernel_order(const Tensor& tensor) const {
    if (is_linear()) return tensor.contiguous();
    const Tensor images = dims_ == 3 ? tensor.unsqueeze(2) : tensor;
    if (images.is_contiguous(at::MemoryFormat::ChannelsLast) || !images.is_contiguous()) {
      return images.contiguous(at::MemoryFormat::ChannelsLast);
    }
    const Tensor result = empty(tensor.sizes(), tensor.options());
    transpose_each(images, result, images.size(1), images.size(2) * images.size(3));
    return result;
  }

  // An uninitialised tensor with these sizes in the memory order of the kernels. For a 1-D convolution it has a height
  // of 1, which in_torch_order removes.
  Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) const {
    if (is_linear()) return request_huge_pages(at::empty(sizes, options));
    const bool is_line = dims_ == 3;
    return request_huge_pages(
        at::empty({sizes[0], sizes[1], is_line ? 1 : sizes[2], sizes.back()}, options, at::MemoryFormat::ChannelsLast));
  }
  // Returns `result`, which `empty` allocated, as torch's layers return it. The result of a 2-D convolution stays
  // channels_last if `channels_last` is set. Every other result is contiguous, without a height for a 1-D convolution.
  Tensor in_torch_order(const Tensor& result, bool channels_last) const {
    if (is_linear() || (channels_last && dims_ == 4)) return result;
    Tensor contiguous = result;
    if (!result.is_contiguous()) {
      contiguous = request_huge_pages(at::empty(result.sizes(), result.options()));
      transpose_each(result, contiguous, result.size(2) * result.size(3), result.size(1));
    }
    return dims_ == 3 ? contiguous.squeeze(2) : contiguous;
  }

  const at::ScalarType type;
  SpikeShape shape{};

 private:
  // The size of the output in one dimension; 0 if the kernel is larger than the padded image.
  static int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
    const int64_t room = size + 2 * padding - kernel;
    return room < 0 ? 0 : room / stride + 1;
  }

  // Transposes each matrix of a batch: to[i, k, j] = from[i, j, k]. torch's own copies take five times as long.
  void transpose_each(const Tensor& from, const Tensor& to, int64_t rows, int64_t columns) const {
    with_real(type, [&](auto real) {
      using Real = decltype(real);
      cpu::transpose_each(data_ptr<const Real>(from), from.size(0), rows, columns, data_ptr<Real>(to));
    });
  }

  const int64_t dims_;
};

// Whether the memory format of images is channels_last.
inline bool is_channels_last(const Tensor& tensor) {
  return tensor.dim() == 4 && tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

// The sizes of the layer's output, in torch's order.
inline Dims spike_result_sizes(const SpikeCall& call, const Tensor& x) {
  Dims sizes(x.sizes().begin(), x.sizes().end());
  if (call.is_linear()) {
    sizes.back() = call.shape.outputs;
  } else {
    sizes[1] = call.shape.outputs;
    if (x.dim() == 4) sizes[2] = call.shape.out_height;
    sizes.back() = call.shape.out_width;
  }
  return sizes;
}

// Throws unless the tensor has the type of x and is on the CPU.
inline void check_like(const Tensor& tensor, const Tensor& x, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type() && tensor.is_cpu(), "asgl_cuda: ", name,
                   " must have the type and device of x, ", x.scalar_type(), " on cpu, got ", tensor.scalar_type(),
                   " on ", tensor.device());
}

// The size in bytes of the mask of packed spikes: a bit per element of x, in whole words of 64 bits.
inline int64_t mask_bytes(const Tensor& x) { return (x.numel() + 63) / 64 * 8; }

// Packs x, which must not be empty, in the memory order of the kernels. The result begins with a mask of one bit per
// element, in whole words of 64 bits. The elements that are not zero follow, unless all of these are 1.
inline Tensor pack(const SpikeCall& call, const Tensor& x) {
  const Tensor x_in_order = call.in_kernel_order(x);
  Tensor result = at::empty({mask_bytes(x)}, x.options().dtype(at::kByte));
  with_real(call.type, [&](auto real) {
    using Real = decltype(real);
    const Tensor mask = result;
    const Real* data = data_ptr<const Real>(x_in_order);
    auto* const bits = static_cast<uint64*>(mask.mutable_data_ptr());
    if (cpu::pack_spike_mask(data, x.numel(), bits)) return;
    const int64_t bytes = cpu::count_spikes(bits, x.numel()) * static_cast<int64_t>(sizeof(Real));
    result = at::empty({mask.numel() + bytes}, mask.options());
    std::memcpy(result.mutable_data_ptr(), bits, mask.numel());
    cpu::pack_spike_values(data, x.numel(), bits,
                           reinterpret_cast<Real*>(result.mutable_data_ptr<uint8>() + mask.numel()));
  });
  return result;
}

// Packs x for spike_product and for spike_weight_gradient. Returns an undefined tensor if x is empty, or if it has
// torch's negative bit, because its memory then holds -x.
inline Tensor pack_spikes(const Tensor& x, at::IntArrayRef weight_sizes, at::IntArrayRef stride,
                          at::IntArrayRef padding) {
  const SpikeCall call(x, weight_sizes, stride, padding);
  return x.numel() == 0 || x.is_neg() ? Tensor() : pack(call, x);
}

// The packed elements of x as kernels read them. `packed` is the result of `pack` for x.
template <class Real>
PackedSpikes<Real> view_packed(const Tensor& packed, const Tensor& x) {
  const int64_t bytes = mask_bytes(x);
  TORCH_CHECK_VALUE(
      packed.scalar_type() == at::kByte && packed.is_cpu() && packed.is_contiguous() && packed.numel() >= bytes,
      "asgl_cuda: packed must be the result of pack_spikes for x");
  const auto* mask = static_cast<const uint64*>(packed.const_data_ptr());
  if (packed.numel() == bytes) return {mask, nullptr};
  TORCH_CHECK_VALUE(packed.numel() == bytes + cpu::count_spikes(mask, x.numel()) * static_cast<int64_t>(sizeof(Real)),
                    "asgl_cuda: packed must be the result of pack_spikes for x");
  return {mask, reinterpret_cast<const Real*>(packed.const_data_ptr<uint8>() + bytes)};
}

// Returns the layer's output. `panels` is the result of spike_panels for the weight, or none. `packed` is the result of
// pack_spikes for x, or none. If `packed` is given, the elements of x are not read.
inline Tensor spike_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& panels, at::IntArrayRef stride, at::IntArrayRef padding,
                            const OptionalTensor& packed) {
  const SpikeCall call(x, weight.sizes(), stride, padding);
  check_like(weight, x, "weight");
  const int64_t outputs = call.shape.outputs;
  if (bias.has_value()) {
    check_like(*bias, x, "bias");
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == outputs, "asgl_cuda: bias must have shape [", outputs,
                      "], got ", bias->sizes());
  }
  const Tensor result = call.empty(spike_result_sizes(call, x), x.options());
  if (x.numel() == 0 && result.numel() > 0) {  // empty sums, which are the bias or 0
    result.zero_();
    if (bias.has_value()) result.add_(call.is_linear() ? *bias : bias->view({-1, 1, 1}));
  } else if (result.numel() > 0) {
    const Tensor spikes = packed.has_value() ? *packed : pack(call, x);
    const Tensor kept_bias = bias.has_value() ? bias->contiguous() : Tensor();
    const Tensor weight_in_order = panels.has_value() ? Tensor() : call.in_kernel_order(weight);
    with_real(call.type, [&](auto real) {
      using Real = decltype(real);
      if (panels.has_value()) {
        check_like(*panels, x, "panels");
        TORCH_CHECK_VALUE(panels->numel() == cpu::spike_panels_size<Real>(call.shape) && panels->is_contiguous(),
                          "asgl_cuda: panels must be the result of spike_panels for the weight");
      }
      const auto data = [](const OptionalTensor& tensor) {
        return tensor.has_value() ? data_ptr<const Real>(*tensor) : nullptr;
      };
      cpu::spike_product<Real>({call.shape, view_packed<Real>(spikes, x), data_ptr<const Real>(weight_in_order),
                                data(panels), data_ptr<const Real>(kept_bias), data_ptr<Real>(result)});
    });
  }
  return call.in_torch_order(result, is_channels_last(x) || is_channels_last(weight));
}

// Returns the gradient of the weight of spike_product, from the gradient of its output. The result is channels_last if
// `channels_last` is set and the weight has four dimensions. `packed` is the result of pack_spikes for x, or none. If
// `packed` is given, the elements of x are not read.
inline Tensor spike_weight_gradient(const Tensor& grad, const Tensor& x, at::IntArrayRef weight_sizes,
                                    at::IntArrayRef stride, at::IntArrayRef padding, bool channels_last,
                                    const OptionalTensor& packed) {
  const SpikeCall call(x, weight_sizes, stride, padding);
  check_like(grad, x, "grad");
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(spike_result_sizes(call, x)), "asgl_cuda: grad must have shape ",
                    at::IntArrayRef(spike_result_sizes(call, x)), ", got ", grad.sizes());
  const Tensor result = call.empty(weight_sizes, x.options());
  if (x.numel() == 0 || grad.numel() == 0) {
    result.zero_();
  } else {
    const Tensor spikes = packed.has_value() ? *packed : pack(call, x), grad_in_order = call.in_kernel_order(grad);
    with_real(call.type, [&](auto real) {
      using Real = decltype(real);
      cpu::spike_weight_gradient<Real>(
          {call.shape, view_packed<Real>(spikes, x), data_ptr<const Real>(grad_in_order), data_ptr<Real>(result)});
    });
  }
  return call.in_torch_order(result, channels_last);
}

// Registers the operators of this file. `m` is a torch::Library or has its interface.
template <class Library>
void register_spike_operators(Library& m) {
  m.impl("spike_product",
         [](const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& panels,
            at::IntArrayRef stride, at::IntArrayRef padding,
            const OptionalTensor& packed) { return spike_product(x, weight, bias, panels, stride, padding, packed); });
  m.impl("spike_weight_gradient",
         [](const Tensor& grad, const Tensor& x, at::IntArrayRef weight_sizes, at::IntArrayRef stride,
            at::IntArrayRef padding, bool channels_last, const OptionalTensor& packed) {
           return spike_weight_gradient(grad, x, weight_sizes, stride, padding, channels_last, packed);
         });
}

// Copies the weight, in float32 or float64, to the order in which spike_product reads it. The copy can be used for
// inputs of any batch size.
inline Tensor spike_panels(const Tensor& weight) {
  SpikeShape shape{};
  shape.outputs = weight.size(0);
  shape.channels = weight.size(1);
  shape.kernel_height = weight.dim() == 4 ? weight.size(2) : 1;
  shape.kernel_width = weight.dim() > 2 ? weight.size(-1) : 1;
  const Tensor in_order =
      weight.dim() == 2 ? weight.contiguous()
                        : (weight.dim() == 3 ? weight.unsqueeze(2) : weight).contiguous(at::MemoryFormat::ChannelsLast);
  Tensor panels;
  with_real(weight.scalar_type(), [&](auto real) {
    using Real = decltype(real);
    panels = at::empty({cpu::spike_panels_size<Real>(shape)}, weight.options());
    if (panels.numel() > 0) {
      cpu::fill_spike_panels<Real>(shape, data_ptr<const Real>(in_order), data_ptr<Real>(panels));
    }
  });
  return panels;
}

}  // namespace asgl::ops
