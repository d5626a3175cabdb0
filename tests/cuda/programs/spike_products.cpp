// Products of spikes of random sizes, on arrays without room around them, compared with plain sums. All values are
// small integers, whose sums are exact in any order. No torch, so that it compiles in seconds, also for a sanitizer.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cpu/spikes.h"

namespace {

using namespace asgl;

std::mt19937 generator(0);

int64 between(int64 least, int64 most) { return least + static_cast<int64>(generator() % (most - least + 1)); }

template <class Real>
std::vector<Real> integers(int64 count, int64 least, int64 most) {
  std::vector<Real> values(static_cast<size_t>(count));
  for (Real& value : values) value = static_cast<Real>(between(least, most));
  return values;
}

template <class Real>
std::vector<Real> unwritten(int64 count) {
  return std::vector<Real>(static_cast<size_t>(count), std::numeric_limits<Real>::quiet_NaN());
}

void expect(bool holds, const char* what, const SpikeShape& s) {
  if (holds) return;
  std::printf("%s: images %ld x %ld x %ld x %ld, outputs %ld, kernel %ld x %ld\n", what, s.images, s.height, s.width,
              s.channels, s.outputs, s.kernel_height, s.kernel_width);
  std::exit(1);
}

SpikeShape random_shape() {
  SpikeShape s{};
  s.outputs = between(1, 5) == 1 ? between(100, 300) : between(1, 40);
  s.kernel_height = s.kernel_width = s.stride_height = s.stride_width = s.height = s.width = 1;
  if (between(0, 2) == 0) {  // a linear layer
    s.images = between(0, 3) == 0 ? between(1000, 1100) : between(1, 20);
    s.channels = between(1, s.images > 100 ? 70 : 1200);
  } else {
    s.images = between(1, 3), s.channels = between(1, 40), s.height = between(1, 9), s.width = between(1, 9);
    s.kernel_height = between(1, 4), s.kernel_width = between(1, 4);
    s.stride_height = between(1, 2), s.stride_width = between(1, 2);
    s.padding_height = between(0, 4), s.padding_width = between(0, 4);
  }
  const auto outputs = [](int64 size, int64 kernel, int64 stride, int64 padding) {
    return size + 2 * padding < kernel ? 0 : (size + 2 * padding - kernel) / stride + 1;
  };
  s.out_height = outputs(s.height, s.kernel_height, s.stride_height, s.padding_height);
  s.out_width = outputs(s.width, s.kernel_width, s.stride_width, s.padding_width);
  return s;
}

// f(place in x, in the kernel, in the output) for all that meet.
template <class F>
void for_each_product(const SpikeShape& s, const F& f) {
  for (int64 pixel = 0; pixel < s.num_out_pixels(); ++pixel) {
    const int64 x = pixel % s.out_width, y = pixel / s.out_width % s.out_height;
    const int64 image = pixel / s.out_width / s.out_height;
    for (int64 at = 0; at < s.kernel_height * s.kernel_width; ++at) {
      const int64 row = y * s.stride_height + at / s.kernel_width - s.padding_height;
      const int64 column = x * s.stride_width + at % s.kernel_width - s.padding_width;
      if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
      f(((image * s.height + row) * s.width + column) * s.channels, at * s.channels, pixel * s.outputs);
    }
  }
}

template <class Real>
void check(const SpikeShape& s) {
  const int64 size = s.images * s.height * s.width * s.channels, weights = s.outputs * s.depth();
  const bool ones = between(0, 1) == 0, has_bias = between(0, 1) == 0;
  std::vector<Real> x = integers<Real>(size, ones ? 0 : -2, ones ? 1 : 2);
  for (Real& value : x) value = between(0, 4) == 0 ? value : 0;
  const auto weight = integers<Real>(weights, -3, 3), bias = integers<Real>(s.outputs, -3, 3);
  const auto grad = integers<Real>(s.num_out_pixels() * s.outputs, -3, 3);
  std::vector<Real> out(grad.size()), grad_weight(weight.size());
  for (size_t i = 0; i < out.size() && has_bias; ++i) out[i] = bias[i % static_cast<size_t>(s.outputs)];
  for_each_product(s, [&](int64 from, int64 in_kernel, int64 to) {
    for (int64 c = 0; c < s.channels; ++c) {
      for (int64 o = 0; o < s.outputs && x[from + c] != 0; ++o) {
        out[to + o] += x[from + c] * weight[o * s.depth() + in_kernel + c];
        grad_weight[o * s.depth() + in_kernel + c] += x[from + c] * grad[to + o];
      }
    }
  });

  std::vector<uint64> mask(static_cast<size_t>((size + 63) / 64));
  const bool all_ones = cpu::pack_spike_mask(x.data(), size, mask.data());
  std::vector<Real> values(static_cast<size_t>(cpu::count_spikes(mask.data(), size)));
  cpu::pack_spike_values(x.data(), size, mask.data(), values.data());
  const PackedSpikes<Real> spikes = {mask.data(), all_ones ? nullptr : values.data()};
  expect(values.size() == static_cast<size_t>(size - std::count(x.begin(), x.end(), Real(0))), "counted", s);
  expect(all_ones || !ones, "packed", s);

  auto found = unwritten<Real>(static_cast<int64>(out.size()));
  SpikeProductParams<Real> params = {s, spikes, weight.data(), nullptr, has_bias ? bias.data() : nullptr, found.data()};
  cpu::spike_product(params);
  expect(found == out, "product", s);
  auto panels = unwritten<Real>(cpu::spike_panels_size<Real>(s));
  cpu::fill_spike_panels(s, weight.data(), panels.data());
  found = unwritten<Real>(static_cast<int64>(out.size()));
  params.panels = panels.data(), params.out = found.data();
  cpu::spike_product(params);
  expect(found == out, "product with panels", s);
  auto found_grad = unwritten<Real>(weights);
  cpu::spike_weight_gradient<Real>({s, spikes, grad.data(), found_grad.data()});
  expect(found_grad == grad_weight, "gradient", s);

  auto once = unwritten<Real>(weights), twice = once;
  cpu::transpose_each(weight.data(), 1, s.outputs, s.depth(), once.data());
  cpu::transpose_each(once.data(), 1, s.depth(), s.outputs, twice.data());
  expect(twice == weight && once[weights - 1] == weight[weights - 1], "transposed", s);
}

}  // namespace

int main() {
  int calls = 0;
  while (calls < 400) {
    const SpikeShape shape = random_shape();
    if (shape.num_out_pixels() == 0) continue;
    ++calls % 2 == 0 ? check<float>(shape) : check<double>(shape);
  }
  std::printf("%d calls\n", calls);
}
