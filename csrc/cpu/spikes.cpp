// CPU kernels of linear layers and convolutions whose input is mostly zeros: only elements that are not zero cost time.
// These elements are listed for each row of an image. An output pixel walks along the lists of the pixels in its
// window, adjacent pixels of a row at once, and adds up rows of the transposed weight in registers. The gradient of the
// weight uses the same lists, sorted by rows of the weight, and adds up rows of the output's gradient.
#include "cpu/spikes.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "cpu/product.h"

namespace asgl::cpu {
namespace {

constexpr int64 kElementsPerTask = 65536;

// Memory for elements, not initialised. It is aligned, because a vector that crosses a cache line takes two loads.
struct Delete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
template <class Element>
using Room = std::unique_ptr<Element[], Delete>;
template <class Element>
Room<Element> room_for(int64 elements) {
  const size_t bytes = static_cast<size_t>(elements) * sizeof(Element);
  return Room<Element>(static_cast<Element*>(::operator new(bytes, std::align_val_t(64))));
}

// The elements of x that are not zero, in order, each by its position in its row of an image, [width * channels].
template <class Real>
class SpikeLists {
 public:
  SpikeLists(const SpikeShape& shape, const Real* x) : offsets_(shape.images * shape.height * shape.width + 1) {
    const int64 length = shape.width * shape.channels, rows = shape.images * shape.height;
    const int64 grain = std::max<int64>(1, kElementsPerTask / length);
    std::atomic<bool> all_ones = true;
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      bool ones = true;
      run<CountNonzeroLoop<Real>>(
          {x + begin * length, (end - begin) * shape.width, shape.channels, &offsets_[begin * shape.width + 1], &ones});
      if (!ones) all_ones = false;
    });
    for (size_t pixel = 1; pixel < offsets_.size(); ++pixel) offsets_[pixel] += offsets_[pixel - 1];
    indices_ = room_for<int32_t>(count());
    if (!all_ones) values_ = room_for<Real>(count());
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> places(static_cast<size_t>(length));
      for (int64 row = begin; row < end; ++row) {
        const int64 first = offsets_[row * shape.width], listed = list_nonzero(x + row * length, length, places.data());
        std::copy_n(places.data(), listed, &indices_[first]);
        for (int64 n = 0; n < listed && values_ != nullptr; ++n) values_[first + n] = x[row * length + places[n]];
      }
    });
  }

  // The number of listed elements.
  int64 count() const { return offsets_.back(); }
  // The list from pixel number `pixel` on, counted over all images.
  const int32_t* from(int64 pixel) const { return indices_.get() + offsets_[pixel]; }
  const int32_t* indices() const { return indices_.get(); }
  const Real* values() const { return values_.get(); }  // null: all are 1

 private:
  std::vector<int64> offsets_;  // [images * height * width + 1]
  Room<int32_t> indices_;
  Room<Real> values_;
};

// A part of the list. Each listed element is multiplied by row index + base of b.
template <class Index>
struct Walk {
  const Index* first;
  int32_t count, base;
};

// The walks of pixels of the output, [pixels, kernel_height]: one for each row of an image in the kernel's window.
template <class Real>
void list_walks(const SpikeShape& shape, const SpikeLists<Real>& lists, int64 first, int64 last, Walk<int32_t>* walks) {
  int64 x = first % shape.out_width, y = first / shape.out_width % shape.out_height;
  int64 image = first / shape.out_width / shape.out_height;
  for (int64 pixel = first; pixel < last; ++pixel) {
    const int64 left = x * shape.stride_width - shape.padding_width;
    const int64 begin = std::clamp<int64>(left, 0, shape.width);
    const int64 end = std::clamp<int64>(left + shape.kernel_width, begin, shape.width);
    for (int64 ky = 0; ky < shape.kernel_height; ++ky) {
      const int64 row = y * shape.stride_height + ky - shape.padding_height;
      Walk<int32_t>& walk = *walks++ = {lists.indices(), 0, 0};
      if (row < 0 || row >= shape.height) continue;
      const int64 pixels = (image * shape.height + row) * shape.width;
      walk.first = lists.from(pixels + begin);
      walk.count = static_cast<int32_t>(lists.from(pixels + end) - walk.first);
      walk.base = static_cast<int32_t>((ky * shape.kernel_width - left) * shape.channels);
    }
    if (++x < shape.out_width) continue;
    x = 0;
    if (++y < shape.out_height) continue;
    y = 0;
    ++image;
  }
}

// out[i, j] = start[i, j] + sum over the walks of row i of value * b[index + base, j]
template <class Real, class Index>
struct WalkedProduct {
  const Walk<Index>* walks;  // [rows, walks_each]
  int64 rows, walks_each;
  const Index* indices;  // the lists
  const Real* values;    // theirs; null: all are 1
  const Real* b;         // [depth, columns], padded to whole panels
  int64 b_stride, columns;
  const Real* start;  // null: 0
  int64 start_stride;
  Real* out;  // [rows, columns]
  int64 out_stride;
};

// The loop of a WalkedProduct, for lists of elements of type Index.
template <class Index>
struct WalkedProductOf {
  template <class Real, int kBytes>
  struct Loop {
    using Args = WalkedProduct<Real, Index>;
    using Vector = typename VectorOf<Real, kBytes>::type;
    static constexpr int64 kLanes = kBytes / static_cast<int64>(sizeof(Real));

    static ASGL_HOST_DEVICE void run(Args args) {
      int64 column = 0;
      for (; column + 8 * kLanes <= args.columns; column += 8 * kLanes) block<8>(args, column);
      for (; column + 4 * kLanes <= args.columns; column += 4 * kLanes) block<4>(args, column);
      for (; column < args.columns; column += 2 * kLanes) block<2>(args, column);
    }

   private:
    // Computes kVectors vectors of columns.
    template <int kVectors>
    static ASGL_HOST_DEVICE void block(const Args& args, int64 column) {
      if (args.values == nullptr) return rows<kVectors>(args, column, [](const Walk<Index>&) { return AllOnes{}; });
      rows<kVectors>(args, column, [&](const Walk<Index>& walk) __attribute__((always_inline)) {
        const Real* values = args.values + (walk.first - args.indices);
        return [values](int64 n, int64) __attribute__((always_inline)) { return values[n]; };
      });
    }

    // The same with the factors of a walk's elements, values_of(walk).
    template <int kVectors, class Values>
    static ASGL_HOST_DEVICE void rows(const Args& args, int64 column, const Values& values_of) {
      const int64 width = args.columns - column;
      const Walk<Index>* walk = args.walks;
      for (int64 row = 0; row < args.rows; ++row) {
        Vector sums[kVectors] = {};
        if (args.start != nullptr) {
          copy<kVectors * kLanes, Real>(args.start + row * args.start_stride + column, &sums, width);
        }
        for (const Walk<Index>* end = walk + args.walks_each; walk < end; ++walk) {
          const Real* b[kVectors];
#pragma GCC unroll 8
          for (int i = 0; i < kVectors; ++i) b[i] = args.b + walk->base * args.b_stride + column + i * kLanes;
          add_listed(walk->first, walk->count, args.b_stride, values_of(*walk), b, sums);
        }
        copy<kVectors * kLanes, Real>(&sums, args.out + row * args.out_stride + column, width);
      }
    }
  };
};

#if defined(__x86_64__)
// to[j, i] = from[i, j] for 8 x 8 elements, by halves of 4.
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

// to[j, i] = from[i, j]. Of the two tensors, the one with the larger stride between rows is accessed row by row,
// because its rows compete for the same lines of the L1 cache.
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

// The number of columns of b that are computed together, in whole panels: eight sums of the widest vectors, or fewer,
// so that these columns of b take at most 512 KiB and stay in the L2 cache.
template <class Real>
int64 group_of(int64 depth, int64 columns) {
  constexpr int64 kMostElements = (int64{1} << 19) / static_cast<int64>(sizeof(Real));
  int64 group = 4 * kPanel<Real>;
  while (group > kPanel<Real> && group * depth > kMostElements) group /= 2;
  return std::min(group, round_up(columns, kPanel<Real>));
}

// Writes the columns [first, first + group) of the transposed weight to b, [depth, group].
template <class Real>
void fill_group(const SpikeShape& shape, const Real* weight, int64 first, int64 group, Real* b) {
  const int64 depth = shape.depth();
  transpose(weight + first * depth, depth, std::min(group, shape.outputs - first), depth, b, group);
}

// Pixels whose walks are listed together.
constexpr int64 kPixelsPerBatch = 256;
// The number of multiplications from which a task is worth a thread.
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
  return round_up(shape.outputs, group_of<Real>(shape.depth(), shape.outputs)) * shape.depth();
}

template <class Real>
void fill_spike_panels(const SpikeShape& shape, const Real* weight, Real* panels) {
  const int64 group = group_of<Real>(shape.depth(), shape.outputs);
  for (int64 first = 0; first < shape.outputs; first += group) {
    fill_group(shape, weight, first, group, panels + first * shape.depth());
  }
}

template <class Real>
void spike_product(const SpikeProductParams<Real>& params) {
  const SpikeShape& shape = params.shape;
  const SpikeLists<Real> lists(shape, params.x);
  const int64 group = group_of<Real>(shape.depth(), shape.outputs), pixels = shape.out_pixels();
  const int64 groups = (shape.outputs + group - 1) / group, threads = at::get_num_threads();
  const int64 most = (pixels + kPixelsPerBatch - 1) / kPixelsPerBatch,
              chunks = std::clamp<int64>((threads + groups - 1) / groups, 1, most);
  const int64 chunk = round_up((pixels + chunks - 1) / chunks, kPixelsPerBatch);
  const double products = static_cast<double>(lists.count()) * static_cast<double>(shape.depth() / shape.channels) *
                          static_cast<double>(shape.outputs) / static_cast<double>(groups * chunks);
  const int64 grain = 1 + static_cast<int64>(kProductsPerTask / (products + 1));
  at::parallel_for(0, groups * chunks, grain, [&](int64_t begin, int64_t end) {
    std::vector<Walk<int32_t>> walks(static_cast<size_t>(kPixelsPerBatch * shape.kernel_height));
    const Room<Real> filled = params.panels == nullptr ? room_for<Real>(group * shape.depth()) : nullptr;
    for (int64 task = begin; task < end; ++task) {
      const int64 column = task / chunks * group, from = task % chunks * chunk;
      const Real* b = params.panels == nullptr ? filled.get() : params.panels + column * shape.depth();
      if (params.panels == nullptr && (task == begin || from == 0)) {
        fill_group(shape, params.weight, column, group, filled.get());
      }
      for (int64 first = from; first < std::min(from + chunk, pixels); first += kPixelsPerBatch) {
        const int64 last = std::min(first + kPixelsPerBatch, pixels);
        list_walks(shape, lists, first, last, walks.data());
        run_with_fma<WalkedProductOf<int32_t>::Loop, Real>(
            {walks.data(), last - first, shape.kernel_height, lists.indices(), lists.values(), b, group,
             std::min(group, shape.outputs - column), params.bias == nullptr ? nullptr : params.bias + column, 0,
             params.out + first * shape.outputs + column, shape.outputs});
      }
    }
  });
}

namespace {

// Of the transposed gradient of the weight: the largest number of rows that a task computes, and the number of rows
// that it stores together.
constexpr int64 kMostRows = 1024, kTileRows = 64;
// Pixels of the output whose lists are sorted at a time: 512 KiB of the gradient at most.
constexpr int64 kSortedPixels = 1024;

// Computes the rows [first, last) of the transposed gradient of the weight.
template <class Real>
class GradientRows {
 public:
  GradientRows(const SpikeGradientParams<Real>& params, const SpikeLists<Real>& lists, int64 first, int64 last)
      : params_(params), shape_(params.shape), lists_(lists), first_(first), rows_(last - first) {}

  void run() {
    const int64 pixels = shape_.out_pixels();
    for (int64 begin = 0; begin < pixels; begin += kSortedPixels) {
      const int64 end = std::min(begin + kSortedPixels, pixels);
      sort(begin, end);
      for (int64 column = 0; column < shape_.outputs; column += group_) add_columns(begin, end, column);
    }
  }

 private:
  using Pixel = uint16;

  // Sorts the lists: from the rows to which each pixel contributes to the pixels that each row adds up.
  void sort(int64 begin, int64 end) {
    for (int64 row = 0; row < rows_; ++row) walks_[row] = {&pixels_[row * stride_], 0, 0};
    list_walks(shape_, lists_, begin, end, of_pixels_.data());
    const Walk<int32_t>* walk = of_pixels_.data();
    for (int64 pixel = 0; pixel < end - begin; ++pixel) {
      for (int64 ky = 0; ky < shape_.kernel_height; ++ky, ++walk) {
        const int32_t *from = walk->first, *to = from + walk->count;
        if (rows_ < shape_.depth()) {
          from = std::lower_bound(from, to, first_ - walk->base);
          to = std::lower_bound(from, to, first_ + rows_ - walk->base);
        }
        const int64 base = walk->base - first_;
        for (const int32_t* element = from; element < to; ++element) {
          const int64 row = *element + base, place = row * stride_ + walks_[row].count++;
          pixels_[place] = static_cast<Pixel>(pixel);
          if (values_ != nullptr) values_[place] = lists_.values()[element - lists_.indices()];
        }
      }
    }
  }

  // Adds the sorted pixels to the columns from `column` on, of all rows.
  void add_columns(int64 begin, int64 end, int64 column) {
    const int64 outputs = shape_.outputs, depth = shape_.depth(), width = std::min(group_, outputs - column);
    const Real* grad = params_.grad + begin * outputs;
    if (group_ != outputs) {
      for (int64 pixel = 0; pixel < end - begin; ++pixel) {
        copy<4 * kPanel<Real>, Real>(grad + pixel * outputs + column, &grad_[pixel * group_], width);
      }
      grad = grad_.get();
    }
    for (int64 row = 0; row < rows_; row += kTileRows) {
      const int64 count = std::min(kTileRows, rows_ - row);
      Real* const to = params_.grad_weight + column * depth + first_ + row;
      if (begin > 0) transpose(to, depth, width, count, tile_.get(), group_);
      run_with_fma<WalkedProductOf<Pixel>::template Loop, Real>(
          {&walks_[row], count, 1, pixels_.get(), values_.get(), grad, group_, width,
           begin == 0 ? nullptr : tile_.get(), group_, tile_.get(), group_});
      transpose(tile_.get(), group_, count, width, to, depth);
    }
  }

  const SpikeGradientParams<Real>& params_;
  const SpikeShape& shape_;
  const SpikeLists<Real>& lists_;
  int64 first_, rows_, group_ = group_of<Real>(kSortedPixels, shape_.outputs);
  // The distance between lists. It is not a power of two, since the ends of the lists would then compete for the same
  // cache lines.
  int64 stride_ = round_up(std::min(kSortedPixels, shape_.out_pixels()), 32) + 32;
  std::vector<Walk<Pixel>> walks_ = std::vector<Walk<Pixel>>(static_cast<size_t>(rows_));
  std::vector<Walk<int32_t>> of_pixels_ =
      std::vector<Walk<int32_t>>(static_cast<size_t>(kSortedPixels * shape_.kernel_height));
  Room<Pixel> pixels_ = room_for<Pixel>(rows_ * stride_);
  Room<Real> values_ = lists_.values() == nullptr ? nullptr : room_for<Real>(rows_ * stride_);
  Room<Real> grad_ = room_for<Real>(kSortedPixels * group_);  // [pixels, group]
  Room<Real> tile_ = room_for<Real>(kTileRows * group_);      // [rows, group]
};

}  // namespace

template <class Real>
void spike_weight_gradient(const SpikeGradientParams<Real>& params) {
  const SpikeLists<Real> lists(params.shape, params.x);
  const int64 depth = params.shape.depth(), threads = at::get_num_threads();
  const int64 tasks = std::max(std::min(threads, (depth + 31) / 32), (depth + kMostRows - 1) / kMostRows);
  const int64 rows = (depth + tasks - 1) / tasks;
  at::parallel_for(0, (depth + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
    for (int64 task = begin; task < end; ++task) {
      GradientRows<Real>(params, lists, task * rows, std::min((task + 1) * rows, depth)).run();
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
