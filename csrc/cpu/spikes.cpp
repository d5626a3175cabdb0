// CPU kernels of linear layers and convolutions whose input is mostly zeros. Zeros are not multiplied. A mask has one
// bit per element of the input. From the mask, the kernels list the elements that are not zero in each row of an image.
// Forward multiplies each listed element in the window of an output pixel by a row of the transposed weight, and sums
// these products. The gradient of the weight sorts the lists by channel, and sums rows of the output's gradient in the
// same way.
#include "cpu/spikes.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "cpu/product.h"
#include "cpu/spike_mask.h"

namespace asgl::cpu {
namespace {

constexpr int64 kElementsPerTask = 65536;  // about the fewest that are worth a thread

// An uninitialised array that is aligned to cache lines. Loading a vector that crosses a line would access two lines.
struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
template <class Element>
using AlignedArray = std::unique_ptr<Element[], AlignedDelete>;
template <class Element>
AlignedArray<Element> allocate_aligned(int64 elements) {
  const size_t bytes = static_cast<size_t>(elements) * sizeof(Element);
  return AlignedArray<Element>(static_cast<Element*>(::operator new(bytes, std::align_val_t(64))));
}

// Lists the elements of x that are not zero, in memory order. The index of an element is its offset in its row of an
// image, [width * channels].
template <class Real>
class SpikeLists {
 public:
  SpikeLists(const SpikeShape& shape, const PackedSpikes<Real>& x)
      : pixels_(shape.images * shape.height * shape.width),
        offsets_(allocate_aligned<int64>(pixels_ + 1)),
        values_(x.values) {
    const int64 length = shape.width * shape.channels, rows = shape.images * shape.height;
    const int64 grain = std::max<int64>(1, kElementsPerTask / length);
    std::vector<int64> row_offsets(static_cast<size_t>(rows + 1));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64 row = begin; row < end; ++row) row_offsets[row + 1] = count_bits(x.mask, row * length, length);
    });
    for (int64 row = 0; row < rows; ++row) row_offsets[row + 1] += row_offsets[row];
    offsets_[pixels_] = row_offsets[rows];
    indices_ = allocate_aligned<int32_t>(count());
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> listed(static_cast<size_t>(length + kListSlack));
      for (int64 row = begin; row < end; ++row) {
        const int64 first = row_offsets[row];
        list_bits(x.mask, row * length, shape.channels, shape.width, first, listed.data(),
                  &offsets_[row * shape.width]);
        std::copy_n(listed.data(), row_offsets[row + 1] - first, &indices_[first]);
      }
    });
  }

  // The number of listed elements.
  int64 count() const { return offsets_[pixels_]; }
  int64 num_pixels() const { return pixels_; }
  // The address at which the list of a pixel begins. Pixels are numbered over all images.
  const int32_t* pixel_indices(int64 pixel) const { return indices_.get() + offsets_[pixel]; }
  const int32_t* indices() const { return indices_.get(); }
  const Real* values() const { return values_; }  // of the listed elements; null: all are 1

 private:
  int64 pixels_;
  AlignedArray<int64> offsets_;  // [pixels + 1]
  AlignedArray<int32_t> indices_;
  const Real* values_;
};

// Adjacent indices of a list. The element of each index is multiplied by row `index + base` of a matrix.
struct Segment {
  const int32_t* first;
  int32_t count, base;
};

// Finds the listed elements in the windows of the output's pixels [first, last). Stores them as segments
// [kernel_height, pixels], one for each row of a window. In Segment, the matrix is the transposed weight.
template <class Real>
void find_window_segments(const SpikeShape& shape, const SpikeLists<Real>& lists, int64 first, int64 last,
                          Segment* segments) {
  const int64 pixels = last - first;
  int64 x = first % shape.out_width, y = first / shape.out_width % shape.out_height;
  int64 image = first / shape.out_width / shape.out_height;
  for (int64 pixel = 0; pixel < pixels;) {  // the first of adjacent pixels
    const int64 adjacent = std::min(shape.out_width - x, pixels - pixel);
    for (int64 ky = 0; ky < shape.kernel_height; ++ky) {
      const int64 row = y * shape.stride_height + ky - shape.padding_height;
      Segment* const found = &segments[ky * pixels + pixel];
      if (row < 0 || row >= shape.height) {
        std::fill_n(found, adjacent, Segment{lists.indices(), 0, 0});
        continue;
      }
      const int64 row_start = (image * shape.height + row) * shape.width;
      for (int64 i = 0; i < adjacent; ++i) {
        const int64 left = (x + i) * shape.stride_width - shape.padding_width;
        const int64 begin = std::clamp<int64>(left, 0, shape.width);
        const int64 end = std::clamp<int64>(left + shape.kernel_width, begin, shape.width);
        const int32_t* const listed = lists.pixel_indices(row_start + begin);
        found[i] = {listed, static_cast<int32_t>(lists.pixel_indices(row_start + end) - listed),
                    static_cast<int32_t>((ky * shape.kernel_width - left) * shape.channels)};
      }
    }
    pixel += adjacent;
    x = 0;
    if (++y < shape.out_height) continue;
    y = 0;
    ++image;
  }
}

// Arguments of out[i, j] = start[i, j] + sum of value * b[index + base, j] over the elements in the segments of row i.
template <class Real>
struct ListedProduct {
  const Segment* segments;  // [segments_each, rows]
  int64 rows, segments_each;
  const int32_t* indices;  // the lists whose parts the segments are
  const Real* values;      // of the listed elements; null: all are 1
  const Real* b;           // [depth, columns], padded to whole panels
  int64 b_stride, columns;
  const Real* start;  // null: 0
  int64 start_stride;
  Real* out;  // [rows, columns]
  int64 out_stride;
};

template <class Real, int kBytes>
struct ListedProductLoop {
  using Args = ListedProduct<Real>;
  using Vector = typename VectorOf<Real, kBytes>::type;
  static constexpr int64 kLanes = kBytes / static_cast<int64>(sizeof(Real));

  // Computes a ListedProduct, eight, four or two vectors of columns at a time.
  static ASGL_HOST_DEVICE void run(Args args) {
    int64 column = 0;
    for (; column + 8 * kLanes <= args.columns; column += 8 * kLanes) compute_block<8>(args, column);
    for (; column + 4 * kLanes <= args.columns; column += 4 * kLanes) compute_block<4>(args, column);
    for (; column < args.columns; column += 2 * kLanes) compute_block<2>(args, column);
  }

 private:
  // Computes kVectors vectors of columns, from `column` on.
  template <int kVectors>
  static ASGL_HOST_DEVICE void compute_block(const Args& args, int64 column) {
    if (args.values == nullptr) return compute_rows<kVectors>(args, column, [](const Segment&) { return AllOnes{}; });
    compute_rows<kVectors>(args, column, [&](const Segment& segment) __attribute__((always_inline)) {
      const Real* values = args.values + (segment.first - args.indices);
      return [values](int64 n, int64) __attribute__((always_inline)) { return values[n]; };
    });
  }

  // Computes a block as compute_block does. values_of(segment) returns the `value` that add_listed_rows takes.
  template <int kVectors, class Values>
  static ASGL_HOST_DEVICE void compute_rows(const Args& args, int64 column, const Values& values_of) {
    const int64 width = args.columns - column;
    for (int64 row = 0; row < args.rows; ++row) {
      Vector sums[kVectors] = {};
      if (args.start != nullptr) {
        copy_at_most<kVectors * kLanes, Real>(args.start + row * args.start_stride + column, &sums, width);
      }
      for (int64 n = 0; n < args.segments_each; ++n) {
        const Segment& segment = args.segments[n * args.rows + row];
        const Real* b[kVectors];
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) b[i] = args.b + segment.base * args.b_stride + column + i * kLanes;
        add_listed_rows(segment.first, segment.count, args.b_stride, values_of(segment), b, sums);
      }
      copy_at_most<kVectors * kLanes, Real>(&sums, args.out + row * args.out_stride + column, width);
    }
  }
};

#if defined(__x86_64__)
// Transposes 8 x 8 elements, to[j, i] = from[i, j].
__attribute__((target("avx2"))) inline void transpose_block(const float* from, int64 from_stride, float* to,
                                                            int64 to_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {  // rows i and i + 4 side by side
    const float* row = from + i * from_stride;
    const auto halves = [&](int64 column) __attribute__((target("avx2"), always_inline)) {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row + column)),
                                  _mm_loadu_ps(row + 4 * from_stride + column), 1);
    };
    a[i] = halves(0);
    a[i + 4] = halves(4);
  }
  for (int i = 0; i < 8; i += 4) {
    const __m256 low = _mm256_unpacklo_ps(a[i], a[i + 1]), high = _mm256_unpackhi_ps(a[i], a[i + 1]);
    const __m256 next_low = _mm256_unpacklo_ps(a[i + 2], a[i + 3]), next_high = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
    b[i] = _mm256_shuffle_ps(low, next_low, 0x44);
    b[i + 1] = _mm256_shuffle_ps(low, next_low, 0xEE);
    b[i + 2] = _mm256_shuffle_ps(high, next_high, 0x44);
    b[i + 3] = _mm256_shuffle_ps(high, next_high, 0xEE);
  }
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + i * to_stride, b[i]);
}
__attribute__((target("avx2"))) inline void transpose_block(const double* from, int64 from_stride, double* to,
                                                            int64 to_stride) {
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 8; j += 4) {
      __m256d a[4];
      for (int k = 0; k < 4; ++k) a[k] = _mm256_loadu_pd(from + (i + k) * from_stride + j);
      const __m256d low = _mm256_unpacklo_pd(a[0], a[1]), high = _mm256_unpackhi_pd(a[0], a[1]);
      const __m256d next_low = _mm256_unpacklo_pd(a[2], a[3]), next_high = _mm256_unpackhi_pd(a[2], a[3]);
      double* out = to + j * to_stride + i;
      _mm256_storeu_pd(out, _mm256_permute2f128_pd(low, next_low, 0x20));
      _mm256_storeu_pd(out + to_stride, _mm256_permute2f128_pd(high, next_high, 0x20));
      _mm256_storeu_pd(out + 2 * to_stride, _mm256_permute2f128_pd(low, next_low, 0x31));
      _mm256_storeu_pd(out + 3 * to_stride, _mm256_permute2f128_pd(high, next_high, 0x31));
    }
  }
}
#endif

// Transposes a matrix, to[j, i] = from[i, j]. With AVX2, blocks of 8 x 8 elements follow the rows of the matrix with
// the larger stride, because these rows compete for the same sets of the L1 cache.
template <class Real>
void transpose(const Real* from, int64 from_stride, int64 rows, int64 columns, Real* to, int64 to_stride) {
  int64 whole_rows = 0, whole_columns = 0;
#if defined(__x86_64__)
  if (instruction_set() != InstructionSet::kBaseline) {
    whole_rows = rows / 8 * 8;
    whole_columns = columns / 8 * 8;
  }
  const auto block = [&](int64 i, int64 j) {
    transpose_block(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
  };
  if (from_stride < to_stride) {
    for (int64 j = 0; j < whole_columns; j += 8) {
      for (int64 i = 0; i < whole_rows; i += 8) block(i, j);
    }
  } else {
    for (int64 first = 0; first < whole_rows; first += 16) {  // whole lines of `to`
      for (int64 j = 0; j < whole_columns; j += 8) {
        for (int64 i = first; i < std::min(first + 16, whole_rows); i += 8) block(i, j);
      }
    }
  }
#endif
  for (int64 i = 0; i < rows; ++i) {
    for (int64 j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
      to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// `count`, rounded up to a multiple of `multiple`.
constexpr int64 round_up(int64 count, int64 multiple) { return (count + multiple - 1) / multiple * multiple; }

// Returns how many columns of the transposed weight, [depth, columns], are computed together, so that they stay in a
// cache. These columns are two panels if two panels have at most 64 KiB, and then stay in or near the L1 cache.
// Otherwise they are four panels, or fewer if four have more than 512 KiB, and usually stay in the L2 cache.
template <class Real>
int64 columns_per_group(int64 depth, int64 columns) {
  constexpr int64 kNearL1 = (int64{1} << 16) / static_cast<int64>(sizeof(Real)), kInL2 = 8 * kNearL1;
  int64 panels = 2 * kPanelColumns<Real> * depth <= kNearL1 ? 2 : 4;
  while (panels > 1 && panels * kPanelColumns<Real> * depth > kInL2) panels /= 2;
  return std::min(panels * kPanelColumns<Real>, round_up(columns, kPanelColumns<Real>));
}

// Stores the columns [first, first + group) of the transposed weight in b, [depth, group].
template <class Real>
void fill_column_group(const SpikeShape& shape, const Real* weight, int64 first, int64 group, Real* b) {
  const int64 depth = shape.depth();
  transpose(weight + first * depth, depth, std::min(group, shape.outputs - first), depth, b, group);
}

// The number of output pixels whose windows are found together.
constexpr int64 kPixelsPerBatch = 256;
// If a row of a window has more nonzero elements than this on average, the products with the first row of the
// convolution's kernel are computed for all windows found together, then those with its second row, and so on. The part
// of the weight that belongs to one row then stays in or near the L1 cache. With fewer elements, loading and storing
// the sums for each row takes longer than this saves.
constexpr int64 kElementsByRow = 14;
// About the fewest multiplications that are worth a thread.
constexpr double kProductsPerTask = 1 << 18;

}  // namespace

template <class Real>
void transpose_each(const Real* from, int64 count, int64 rows, int64 columns, Real* to) {
  const int64 size = rows * columns, grain = 1 + kElementsPerTask / (size + 1);
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64 i = begin; i < end; ++i) transpose(from + i * size, columns, rows, columns, to + i * size, rows);
  });
}

template <class Real>
int64 spike_panels_size(const SpikeShape& shape) {
  return round_up(shape.outputs, columns_per_group<Real>(shape.depth(), shape.outputs)) * shape.depth();
}

template <class Real>
void fill_spike_panels(const SpikeShape& shape, const Real* weight, Real* panels) {
  const int64 group = columns_per_group<Real>(shape.depth(), shape.outputs);
  for (int64 first = 0; first < shape.outputs; first += group) {
    fill_column_group(shape, weight, first, group, panels + first * shape.depth());
  }
}

template <class Real>
void spike_product(const SpikeProductParams<Real>& params) {
  const SpikeShape& shape = params.shape;
  const SpikeLists<Real> lists(shape, params.x);
  const int64 group = columns_per_group<Real>(shape.depth(), shape.outputs), pixels = shape.num_out_pixels();
  const int64 groups = (shape.outputs + group - 1) / group, threads = at::get_num_threads();
  const int64 most = (pixels + kPixelsPerBatch - 1) / kPixelsPerBatch,
              chunks = std::clamp<int64>((threads + groups - 1) / groups, 1, most);
  const int64 chunk = round_up((pixels + chunks - 1) / chunks, kPixelsPerBatch);
  const double products = static_cast<double>(lists.count()) * static_cast<double>(shape.depth() / shape.channels) *
                          static_cast<double>(shape.outputs) / static_cast<double>(groups * chunks);
  const int64 grain = 1 + static_cast<int64>(kProductsPerTask / (products + 1));
  const bool by_row = lists.count() * shape.kernel_width > kElementsByRow * lists.num_pixels();
  const int64 rows_together = by_row ? 1 : shape.kernel_height;  // rows of the kernel
  at::parallel_for(0, groups * chunks, grain, [&](int64_t begin, int64_t end) {
    std::vector<Segment> segments(static_cast<size_t>(kPixelsPerBatch * shape.kernel_height));
    const AlignedArray<Real> filled =
        params.panels == nullptr ? allocate_aligned<Real>(group * shape.depth()) : nullptr;
    for (int64 task = begin; task < end; ++task) {
      const int64 column = task / chunks * group, from = task % chunks * chunk;
      const Real* b = params.panels == nullptr ? filled.get() : params.panels + column * shape.depth();
      if (params.panels == nullptr && (task == begin || from == 0)) {
        fill_column_group(shape, params.weight, column, group, filled.get());
      }
      for (int64 first = from; first < std::min(from + chunk, pixels); first += kPixelsPerBatch) {
        const int64 last = std::min(first + kPixelsPerBatch, pixels);
        find_window_segments(shape, lists, first, last, segments.data());
        Real* const out = params.out + first * shape.outputs + column;
        const Real* start = params.bias == nullptr ? nullptr : params.bias + column;
        for (int64 ky = 0; ky < shape.kernel_height; ky += rows_together) {
          run_with_fma<ListedProductLoop, Real>(
              {&segments[ky * (last - first)], last - first, rows_together, lists.indices(), lists.values(), b, group,
               std::min(group, shape.outputs - column), start, start == out ? shape.outputs : 0, out, shape.outputs});
          start = out;
        }
      }
    }
  });
}

namespace {

// The gradient of the weight
//
// With stride 1, the gradient of channel c is a sum over the channel's spikes, at (iy, ix):
//   dweight[ky, kx, c] = sum of x[iy, ix, c] * grad[iy + padding - ky, ix + padding - kx]
// Outside of the image, `grad` is zero. For one ky, a spike adds terms for all kx. These terms are adjacent in grad_, a
// copy of `grad` for some output channels, in reverse order of kx. For each ky, a spike therefore adds one contiguous
// row of grad_. One list of the channel's spikes serves the whole kernel.
// With a larger stride, the same holds for each phase. A phase consists of the pixels of x with the same (coordinate +
// padding) % stride in each dimension, and of the elements of the kernel that multiply these pixels.

// The sizes of x, of the kernel and of the output in one dimension of the images.
struct Axis {
  int64 size, kernel, stride, padding, out;

  // The last coordinate of the output whose window begins at coordinate i of x or before it. It may be beyond the end
  // of the output.
  int64 last_output(int64 i) const { return (i + padding) / stride; }
  // The largest number of outputs before last_output(i) whose windows contain i.
  int64 num_earlier_outputs() const { return (kernel - 1) / stride; }
};

// `count` elements of the kernel in one dimension: first, first + stride, and so on. They multiply the coordinates of x
// for which (coordinate + padding) % stride is first % stride.
struct Taps {
  int64 first, count;
};

// Lists the elements of the kernel in one dimension. An entry is all elements of a phase, or one element without
// `by_phase`.
inline std::vector<Taps> list_taps(const Axis& axis, bool by_phase) {
  std::vector<Taps> result;
  for (int64 first = 0; first < (by_phase ? std::min(axis.kernel, axis.stride) : axis.kernel); ++first) {
    result.push_back({first, by_phase ? 1 + (axis.kernel - 1 - first) / axis.stride : 1});
  }
  return result;
}

// Calls f(i, o) for each coordinate i in [begin, end) of x that the taps multiply. The first of the taps multiplies i
// in the window of output o, the next one in the window of output o - 1, and so on. Some of these outputs may be
// outside of the image.
template <class F>
void for_each_tap_coordinate(const Axis& axis, const Taps& taps, int64 begin, int64 end, const F& f) {
  const int64 shift = axis.padding - taps.first, from = std::max<int64>(begin + shift, 0);
  for (int64 o = (from + axis.stride - 1) / axis.stride; o < axis.out + taps.count - 1; ++o) {
    const int64 i = o * axis.stride - shift;
    if (i >= end) return;
    f(i, o);
  }
}

// A task has at most kMaxTaskChannels channels, whose lists then usually fit in the L2 cache. Each kMinTaskChannels
// channels are worth a thread.
constexpr int64 kMaxTaskChannels = 1024, kMinTaskChannels = 8;
// The approximate number of pixels of the output to which a tile of x contributes.
constexpr int64 kTilePixels = 512;

// Computes the gradient of the weight for the channels [first, last). For each tile of x, it sorts the tile's spikes by
// channel, and then adds the products of the spikes and the output's gradients to sums. With `by_phase`, x must be
// finite, because spikes at the border then multiply zeros outside of the image.
template <class Real>
class ChannelGradient {
 public:
  // Chooses the size of the tiles, and allocates the lists and sums of a tile.
  ChannelGradient(const SpikeGradientParams<Real>& params, const SpikeLists<Real>& lists, bool by_phase, int64 first,
                  int64 last)
      : params_(params), shape_(params.shape), lists_(lists), first_(first), channels_(last - first) {
    for (const Taps& y : list_taps(rows_, by_phase)) {
      for (const Taps& x : list_taps(columns_, by_phase)) phases_.push_back({y, x});
    }
    // A stride beyond the image counts as the image's size, because the product of two large strides might overflow.
    const int64 pixels =
        kTilePixels * std::min(shape_.stride_height, shape_.height) * std::min(shape_.stride_width, shape_.width);
    tile_columns_ = std::min(shape_.width, pixels);
    tile_rows_ = tile_columns_ < shape_.width ? 1 : std::clamp<int64>(pixels / shape_.width, 1, shape_.height);
    tile_images_ =
        tile_rows_ < shape_.height ? 1 : std::clamp<int64>(pixels / (shape_.width * shape_.height), 1, shape_.images);
    pitch_ = (tile_columns_ - 1) / shape_.stride_width + 2 + columns_.num_earlier_outputs();
    out_rows_ = (tile_rows_ - 1) / shape_.stride_height + 2 + rows_.num_earlier_outputs();
    const int64 met = tile_images_ * ((tile_rows_ - 1) / shape_.stride_height + 1) *
                      ((tile_columns_ - 1) / shape_.stride_width + 1);  // pixels of a tile and a phase, at most
    // Adds 32 because the capacity would often be 512, a power of two, at which the ends of the lists compete for the
    // same sets of the cache.
    capacity_ = round_up(met, 32) + 32;
    const int64 listed = static_cast<int64>(phases_.size()) * channels_;
    sorted_.resize(static_cast<size_t>(listed));
    indices_ = allocate_aligned<int32_t>(listed * capacity_);
    if (lists_.values() != nullptr) values_ = allocate_aligned<Real>(listed * capacity_);
    grad_ = allocate_aligned<Real>(tile_images_ * out_rows_ * pitch_ * kGroup);
    sums_ = allocate_aligned<Real>(shape_.kernel_height * shape_.kernel_width * channels_ *
                                   round_up(shape_.outputs, kGroup));
  }

  // Computes the gradient and stores it in grad_weight.
  void compute() {
    for (int64 image = 0; image < shape_.images; image += tile_images_) {
      for (int64 row = 0; row < shape_.height; row += tile_rows_) {
        for (int64 column = 0; column < shape_.width; column += tile_columns_) {
          const Tile tile = {image,  std::min(image + tile_images_, shape_.images),
                             row,    std::min(row + tile_rows_, shape_.height),
                             column, std::min(column + tile_columns_, shape_.width)};
          sort_spikes(tile);
          for (int64 output = 0; output < shape_.outputs; output += kGroup) add_output_gradients(tile, output);
        }
      }
    }
    store_gradient();
  }

 private:
  // The number of output channels that are computed together. Their gradients for a tile take about 64 KiB, and so stay
  // in or near the L1 cache.
  static constexpr int64 kGroup = kPanelColumns<Real>;

  struct Phase {
    Taps y, x;
    int64 num_taps() const { return y.count * x.count; }
  };
  // A part of x: the images [image, end_image), and rows and columns likewise.
  struct Tile {
    int64 image, end_image, row, end_row, column, end_column;
  };

  // Lists the spikes of a tile by phase and channel. The index that is stored for a spike is the first pixel of grad_
  // that the spike multiplies.
  void sort_spikes(const Tile& tile) {
    for (size_t i = 0; i < sorted_.size(); ++i) sorted_[i] = {&indices_[static_cast<int64>(i) * capacity_], 0, 0};
    const bool part = channels_ < shape_.channels;
    int64 first_list = 0;  // of the phase, for the first channel
    for (const Phase& phase : phases_) {
      for (int64 image = tile.image; image < tile.end_image; ++image) {
        for_each_tap_coordinate(rows_, phase.y, tile.row, tile.end_row, [&](int64 row, int64 out_row) {
          const int64 shift =
              ((image - tile.image) * out_rows_ + out_row - (phase.y.count - 1) - first_out_row(tile)) * pitch_ -
              (phase.x.count - 1) - first_out_column(tile);
          const int64 pixels = (image * shape_.height + row) * shape_.width;
          for_each_tap_coordinate(columns_, phase.x, tile.column, tile.end_column, [&](int64 column, int64 out_column) {
            const int32_t *from = lists_.pixel_indices(pixels + column),
                          *to = lists_.pixel_indices(pixels + column + 1);
            const int64 origin = column * shape_.channels + first_;
            if (part) {
              from = std::lower_bound(from, to, origin);
              to = std::lower_bound(from, to, origin + channels_);
            }
            for (const int32_t* element = from; element < to; ++element) {
              const int64 list = first_list + *element - origin, place = list * capacity_ + sorted_[list].count++;
              indices_[place] = static_cast<int32_t>(shift + out_column);
              if (values_ != nullptr) values_[place] = lists_.values()[element - lists_.indices()];
            }
          });
        });
      }
      first_list += channels_;
    }
  }

  // Adds the products of the tile's spikes and the output's gradients to the sums of kGroup output channels, from
  // `output` on.
  void add_output_gradients(const Tile& tile, int64 output) {
    copy_output_gradients(tile, output);
    Real* sums = &sums_[output * channels_ * shape_.kernel_height * shape_.kernel_width];
    const Segment* lists = sorted_.data();
    const bool first = tile.image == 0 && tile.row == 0 && tile.column == 0;
    for (const Phase& phase : phases_) {
      const int64 columns = phase.x.count * kGroup, stride = phase.y.count * columns;
      for (int64 y = 0; y < phase.y.count; ++y) {
        Real* const to = sums + y * columns;
        run_with_fma<ListedProductLoop, Real>({lists, channels_, 1, indices_.get(), values_.get(),
                                               &grad_[y * pitch_ * kGroup], kGroup, columns, first ? nullptr : to,
                                               stride, to, stride});
      }
      sums += channels_ * stride;
      lists += channels_;
    }
  }

  // Copies the gradients of kGroup output channels, from `output` on, to grad_. Copies those pixels of the output to
  // which the tile may contribute. Pixels outside of the image get zeros.
  void copy_output_gradients(const Tile& tile, int64 output) {
    const int64 width = std::min(kGroup, shape_.outputs - output);
    const int64 rows = rows_.last_output(tile.end_row - 1) + 1 - first_out_row(tile);
    const int64 columns = columns_.last_output(tile.end_column - 1) + 1 - first_out_column(tile);
    for (int64 image = tile.image; image < tile.end_image; ++image) {
      for (int64 y = 0; y < rows; ++y) {
        Real* to = &grad_[((image - tile.image) * out_rows_ + y) * pitch_ * kGroup];
        const int64 row = first_out_row(tile) + y, left = first_out_column(tile);
        const bool inside = 0 <= row && row < shape_.out_height;
        const int64 begin = inside ? std::clamp<int64>(-left, 0, columns) : columns;
        const int64 end = inside ? std::clamp<int64>(shape_.out_width - left, begin, columns) : columns;
        std::fill(to, to + begin * kGroup, Real(0));
        const Real* from =
            params_.grad + ((image * shape_.out_height + row) * shape_.out_width + left) * shape_.outputs + output;
        for (int64 x = begin; x < end; ++x) {
          copy_at_most<kGroup, Real>(from + x * shape_.outputs, to + x * kGroup, width);
        }
        std::fill(to + end * kGroup, to + columns * kGroup, Real(0));
      }
    }
  }

  // Stores the sums in grad_weight, transposed, with the elements of the kernel in ascending order.
  void store_gradient() {
    const int64 depth = shape_.depth();
    const Real* sums = sums_.get();
    for (int64 output = 0; output < shape_.outputs; output += kGroup) {
      const int64 width = std::min(kGroup, shape_.outputs - output);
      for (const Phase& phase : phases_) {
        for (int64 tap = 0; tap < phase.num_taps(); ++tap) {
          const int64 ky = phase.y.first + (phase.y.count - 1 - tap / phase.x.count) * shape_.stride_height;
          const int64 kx = phase.x.first + (phase.x.count - 1 - tap % phase.x.count) * shape_.stride_width;
          transpose(sums + tap * kGroup, phase.num_taps() * kGroup, channels_, width,
                    params_.grad_weight + output * depth + (ky * shape_.kernel_width + kx) * shape_.channels + first_,
                    depth);
        }
        sums += channels_ * phase.num_taps() * kGroup;
      }
    }
  }

  // The row and the column of the output at which grad_ begins for a tile. They may be negative.
  int64 first_out_row(const Tile& tile) const { return rows_.last_output(tile.row) - rows_.num_earlier_outputs(); }
  int64 first_out_column(const Tile& tile) const {
    return columns_.last_output(tile.column) - columns_.num_earlier_outputs();
  }

  const SpikeGradientParams<Real>& params_;
  const SpikeShape& shape_;
  const SpikeLists<Real>& lists_;
  const int64 first_, channels_;
  const Axis rows_ = {shape_.height, shape_.kernel_height, shape_.stride_height, shape_.padding_height,
                      shape_.out_height};
  const Axis columns_ = {shape_.width, shape_.kernel_width, shape_.stride_width, shape_.padding_width,
                         shape_.out_width};
  int64 tile_images_, tile_rows_, tile_columns_, out_rows_, pitch_, capacity_;
  std::vector<Phase> phases_;
  std::vector<Segment> sorted_;    // [phases, channels]
  AlignedArray<int32_t> indices_;  // [phases, channels, capacity]
  AlignedArray<Real> values_;      // [phases, channels, capacity], or null if all are 1
  AlignedArray<Real> grad_;        // [tile_images, out_rows, pitch, kGroup]
  AlignedArray<Real> sums_;        // [groups, phases, channels, taps, kGroup]
};

}  // namespace

template <class Real>
void spike_weight_gradient(const SpikeGradientParams<Real>& params) {
  const SpikeLists<Real> lists(params.shape, params.x);
  // by_phase needs a finite x, because elements at the border multiply zeros outside of the image. The products of
  // infinity and NaN with these zeros would wrongly be NaN.
  const bool by_phase = lists.values() == nullptr || std::all_of(lists.values(), lists.values() + lists.count(),
                                                                 [](Real value) { return std::isfinite(value); });
  const int64 channels = params.shape.channels, threads = at::get_num_threads();
  const int64 tasks = std::max(std::min(threads, (channels + kMinTaskChannels - 1) / kMinTaskChannels),
                               (channels + kMaxTaskChannels - 1) / kMaxTaskChannels);
  const int64 each = (channels + tasks - 1) / tasks;
  at::parallel_for(0, (channels + each - 1) / each, 1, [&](int64_t begin, int64_t end) {
    for (int64 task = begin; task < end; ++task) {
      ChannelGradient<Real>(params, lists, by_phase, task * each, std::min((task + 1) * each, channels)).compute();
    }
  });
}

template void transpose_each(const float*, int64, int64, int64, float*);
template void transpose_each(const double*, int64, int64, int64, double*);
template int64 spike_panels_size<float>(const SpikeShape&);
template int64 spike_panels_size<double>(const SpikeShape&);
template void fill_spike_panels(const SpikeShape&, const float*, float*);
template void fill_spike_panels(const SpikeShape&, const double*, double*);
template void spike_product(const SpikeProductParams<float>&);
template void spike_product(const SpikeProductParams<double>&);
template void spike_weight_gradient(const SpikeGradientParams<float>&);
template void spike_weight_gradient(const SpikeGradientParams<double>&);

}  // namespace asgl::cpu
