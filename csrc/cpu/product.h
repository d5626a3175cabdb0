// Products of a few rows with a matrix, for recurrent neurons. The products of spikes in spikes.cpp use parts of this
// file. Each sum is in the order of the inner dimension. The AVX2 (with FMA) and AVX-512 clones use fused multiply-add.
// If the matrix is finite, the bits of a result depend neither on the number of rows nor on whether zeros are skipped.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/clones.h"
#include "math/float_math.h"

namespace asgl::cpu {

// A SIMD vector of kBytes bytes, by the compiler's vector extension.
template <class Real, int kBytes>
struct VectorOf {
  typedef Real type __attribute__((vector_size(kBytes)));
};

#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors as results of functions, which are inlined here
#endif

// c = a * b + c
template <class Vector>
ASGL_HOST_DEVICE void multiply_add(const Vector& a, const Vector& b, Vector& c) {
#if defined(__x86_64__) && defined(__clang__)
  if constexpr (sizeof(Vector) > 16) {
    c = __builtin_elementwise_fma(a, b, c);
    return;
  }
#elif defined(__x86_64__)
  [[maybe_unused]] constexpr bool kFloat = std::is_same_v<std::decay_t<decltype(c[0])>, float>;
  [[maybe_unused]] constexpr int kCurrentRounding = 4;
  if constexpr (sizeof(Vector) == 64 && kFloat) {
    c = __builtin_ia32_vfmaddps512_mask(a, b, c, 0xFFFF, kCurrentRounding);
    return;
  } else if constexpr (sizeof(Vector) == 64) {
    c = __builtin_ia32_vfmaddpd512_mask(a, b, c, 0xFF, kCurrentRounding);
    return;
  } else if constexpr (sizeof(Vector) == 32 && kFloat) {
    c = __builtin_ia32_vfmaddps256(a, b, c);
    return;
  } else if constexpr (sizeof(Vector) == 32) {
    c = __builtin_ia32_vfmaddpd256(a, b, c);
    return;
  }
#endif
  c = a * b + c;
}

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// Loads a vector from an address that need not be aligned.
template <class Real, class Vector>
ASGL_HOST_DEVICE void load(const Real* from, Vector& to) {
  std::memcpy(&to, from, sizeof(Vector));
}

// The number of columns of a panel, as many as fit in two of the widest vectors. A matrix [depth, columns] is stored as
// panels, [columns / kPanelColumns, depth, kPanelColumns], so that the rows of a panel are adjacent in memory. The last
// panel is padded.
template <class Real>
constexpr int64 kPanelColumns = 128 / static_cast<int64>(sizeof(Real));

// The number of elements of a matrix that is stored as panels, with padding.
template <class Real>
int64 panels_size(int64 depth, int64 columns) {
  return (columns + kPanelColumns<Real> - 1) / kPanelColumns<Real> * kPanelColumns<Real> * depth;
}

// Copies `count` elements, but at most kMost. For kMost elements, the size is a constant, so that the compiler can copy
// without a call of memcpy.
template <int64 kMost, class Real>
ASGL_HOST_DEVICE void copy_at_most(const void* from, void* to, int64 count) {
  if (count >= kMost) {
    std::memcpy(to, from, kMost * sizeof(Real));
  } else {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(Real));
  }
}

// Stores in panels the matrix whose element (k, j) is matrix[k * row_stride + j * column_stride]. Padding is not
// written, and no result depends on it.
template <class Real>
void fill_panels(const Real* matrix, int64 row_stride, int64 column_stride, int64 depth, int64 columns, Real* panels) {
  for (int64 first = 0; first < columns; first += kPanelColumns<Real>) {
    const int64 width = std::min(columns - first, kPanelColumns<Real>);
    Real* panel = panels + first * depth;
    for (int64 k = 0; k < depth; ++k) {
      const Real* row = matrix + k * row_stride + first * column_stride;
      Real* to = panel + k * kPanelColumns<Real>;
      if (column_stride == 1) {
        copy_at_most<kPanelColumns<Real>, Real>(row, to, width);
      } else {
        for (int64 j = 0; j < width; ++j) to[j] = row[j * column_stride];
      }
    }
  }
}

// The largest number of rows of `out` in a product.
constexpr int64 kMaxProductRows = 16;

// Arguments of a product: out[i, j] (+)= sum over k of a[i, k] * b[k, j].
template <class Real>
struct Product {
  const Real* a;                         // [rows, depth]
  int64 a_stride, rows, depth, columns;  // a_stride: elements between rows of a
  const Real* panels;                    // b, stored as panels
  bool accumulate;
  Real* out;  // [rows, columns]
};

template <class Real, int kBytes>
struct DenseProductLoop {
  using Args = Product<Real>;
  using Vector = typename VectorOf<Real, kBytes>::type;
  static constexpr int64 kLanes = kBytes / static_cast<int64>(sizeof(Real)), kColumns = 2 * kLanes;
  static_assert(kPanelColumns<Real> % kColumns == 0);

  // Computes the product in tiles of up to six rows and two vectors of columns. A tile of six rows has twelve sums in
  // registers, which are independent and hide the latency of an addition.
  static ASGL_HOST_DEVICE void run(Args args) {
    for (int64 column = 0; column < args.columns; column += kColumns) {
      int64 row = 0;
      for (; row + 6 <= args.rows; row += 6) compute_tile<6>(args, row, column);
      if (row + 4 <= args.rows) compute_tile<4>(args, row, column), row += 4;
      if (row + 2 <= args.rows) compute_tile<2>(args, row, column), row += 2;
      if (row < args.rows) compute_tile<1>(args, row, column);
    }
  }

 private:
  // Computes kRows rows of kColumns columns, from `row` and `column` on.
  template <int kRows>
  static ASGL_HOST_DEVICE void compute_tile(const Args& args, int64 row, int64 column) {
    const int64 in_panel = column % kPanelColumns<Real>, width = args.columns - column;
    const Real* b = args.panels + (column - in_panel) * args.depth + in_panel;
    const Real* a = args.a + row * args.a_stride;
    Real* out = args.out + row * args.columns + column;
    Vector sums[kRows][2] = {};
    for (int i = 0; i < kRows && args.accumulate; ++i) {
      copy_at_most<kColumns, Real>(out + i * args.columns, &sums[i], width);
    }
    for (int64 k = 0; k < args.depth; ++k) {
      Vector b0, b1;
      load(b + k * kPanelColumns<Real>, b0);
      load(b + k * kPanelColumns<Real> + kLanes, b1);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const Vector factor = a[i * args.a_stride + k] - Vector{};
        multiply_add(factor, b0, sums[i][0]);
        multiply_add(factor, b1, sums[i][1]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) copy_at_most<kColumns, Real>(&sums[i], out + i * args.columns, width);
  }
};

// Stands for `value` in add_listed_rows if all factors are 1. Rows of b are then added without a multiplication, which
// gives the same bits.
struct AllOnes {};

// Adds the listed rows of b to the sums, in order: sums += value(n, k) * (row k of b) for k = indices[n]. b[i] points
// to the columns that are added to sums[i], and rows are `stride` elements apart.
template <int kVectors, class Index, class Value, class Real, class Vector>
ASGL_HOST_DEVICE void add_listed_rows(const Index* indices, int64 count, int64 stride, const Value& value,
                                      const Real* const (&b)[kVectors], Vector (&sums)[kVectors]) {
  for (int64 n = 0; n < count; ++n) {
    const int64 k = indices[n];
    Vector factor;
    if constexpr (!std::is_same_v<Value, AllOnes>) factor = value(n, k) - Vector{};
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      Vector row;
      load(b[i] + k * stride, row);
      if constexpr (std::is_same_v<Value, AllOnes>) {
        sums[i] += row;
      } else {
        multiply_add(factor, row, sums[i]);
      }
    }
  }
}

// Arguments of the product of one row of a with b, in which only the row's `count` elements at `indices` take part.
template <class Real>
struct GatheredProduct {
  Product<Real> product;
  const int32_t* indices;
  int64 count;
};

template <class Real, int kBytes>
struct GatheredProductLoop {
  using Args = GatheredProduct<Real>;
  using Vector = typename VectorOf<Real, kBytes>::type;
  static constexpr int64 kLanes = kBytes / static_cast<int64>(sizeof(Real));

  // Computes a GatheredProduct, eight or two vectors of columns at a time.
  static ASGL_HOST_DEVICE void run(Args args) {
    int64 column = 0;
    for (; column + 8 * kLanes <= args.product.columns; column += 8 * kLanes) compute_block<8>(args, column);
    for (; column < args.product.columns; column += 2 * kLanes) compute_block<2>(args, column);
  }

 private:
  // Computes kVectors vectors of columns, from `column` on.
  template <int kVectors>
  static ASGL_HOST_DEVICE void compute_block(const Args& args, int64 column) {
    const Product<Real>& product = args.product;
    const int64 width = product.columns - column;
    Vector sums[kVectors] = {};
    if (product.accumulate) copy_at_most<kVectors * kLanes, Real>(product.out + column, &sums, width);
    const Real* b[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const int64 in_panel = (column + i * kLanes) % kPanelColumns<Real>;
      b[i] = product.panels + (column + i * kLanes - in_panel) * product.depth + in_panel;
    }
    add_listed_rows(
        args.indices, args.count, kPanelColumns<Real>,
        [a = product.a](int64, int64 k) __attribute__((always_inline)) { return a[k]; }, b, sums);
    copy_at_most<kVectors * kLanes, Real>(&sums, product.out + column, width);
  }
};

#if defined(__x86_64__)
// The clone of a loop for AVX2 with FMA.
template <class Loop>
__attribute__((target("avx2,fma"))) void run_fma(const typename Loop::Args& args) {
  Loop::run(args);
}
#endif

// Runs a loop of products (multiply_add) on the widest vectors of the instruction set. The int argument of `Loop` is
// the size of these vectors in bytes. The AVX-512 and AVX2 clones fuse multiply-adds. The baseline clone does not, and
// also runs on processors with AVX2 but without FMA.
template <template <class, int> class Loop, class Real>
void run_with_fma(const typename Loop<Real, 16>::Args& args) {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx512) return run_avx512<Loop<Real, 64>>(args);
  if (instruction_set() == InstructionSet::kAvx2 && __builtin_cpu_supports("fma")) return run_fma<Loop<Real, 32>>(args);
#endif
  run_baseline<Loop<Real, 16>>(args);
}

// Appends the indices of elements that are not zero, from `first` on, to a list of `count` indices. NaN is not zero.
// Returns the new length of the list.
template <class Real>
int64 append_nonzero(int64 first, const Real* row, int64 length, int32_t* indices, int64 count) {
  using Bits = std::conditional_t<sizeof(Real) == 4, uint32, uint64>;
  for (int64 i = first; i < length; ++i) {
    indices[count] = static_cast<int32_t>(i);
    count += (bit_cast<Bits>(row[i]) << 1) != 0;  // without the sign
  }
  return count;
}

#if defined(__x86_64__)
// For each value of a byte, the positions of its set bits, one byte per position.
constexpr auto kSetBitPositions = [] {
  std::array<uint64, 256> positions{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int bit = 7; bit >= 0; --bit) {
      if ((byte >> bit & 1) != 0) positions[byte] = positions[byte] << 8 | static_cast<uint64>(bit);
    }
  }
  return positions;
}();

// Returns a bit for each of eight elements, set if the element is not zero. Compares bit patterns without the sign. A
// comparison of floats would also find subnormal numbers to be zero if the processor flushes them.
__attribute__((target("avx2"))) inline int nonzero_bits(const float* row) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
  const __m256i zeros = _mm256_cmpeq_epi32(_mm256_add_epi32(bits, bits), _mm256_setzero_si256());
  return _mm256_movemask_ps(_mm256_castsi256_ps(zeros)) ^ 0xFF;
}
__attribute__((target("avx2"))) inline int nonzero_bits(const double* row) {
  const auto zeros = [](const double* from) __attribute__((target("avx2"), always_inline)) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_movemask_pd(
        _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_add_epi64(bits, bits), _mm256_setzero_si256())));
  };
  return (zeros(row) | zeros(row + 4) << 4) ^ 0xFF;
}

// list_nonzero for eight elements at once, without a branch. With AVX2 it takes 0.07 ns per element, and append_nonzero
// takes 0.47 ns.
template <class Real>
__attribute__((target("avx2,popcnt"))) int64 list_nonzero_avx2(const Real* row, int64 length, int32_t* indices) {
  int64 count = 0, i = 0;
  for (; i + 8 <= length; i += 8) {
    const int which = nonzero_bits(row + i);
    const __m256i positions = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kSetBitPositions[which])));
    const __m256i elements = _mm256_add_epi32(positions, _mm256_set1_epi32(static_cast<int>(i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices + count), elements);
    count += __builtin_popcount(static_cast<unsigned>(which));
  }
  return append_nonzero(i, row, length, indices, count);
}
#endif

// Lists the indices of the elements of a row that are not zero, and returns their number. `indices` must have room for
// all elements.
template <class Real>
int64 list_nonzero(const Real* row, int64 length, int32_t* indices) {
#if defined(__x86_64__)
  if (instruction_set() != InstructionSet::kBaseline) return list_nonzero_avx2(row, length, indices);
#endif
  return append_nonzero(0, row, length, indices, 0);
}

// The time per multiply-add of a gathered product, relative to that of a dense product. The two compute 10 and 40
// GMAC/s in float32 on one core with AVX2.
constexpr int64 kGatherCost = 4;

// Computes the product. With `skips_zeros`, only the nonzero elements of a are used if at most one in kGatherCost
// elements is not zero. All of b must then be finite, and `indices` must have room for all elements of a.
template <class Real>
void multiply(const Product<Real>& product, bool skips_zeros, int32_t* indices) {
  const auto row_of = [&](int64 row) {
    Product<Real> one = product;
    one.rows = 1;
    one.a += row * product.a_stride;
    one.out += row * product.columns;
    return one;
  };
  std::array<int64, kMaxProductRows> counts;
  int64 total = 0;
  for (int64 row = 0; row < product.rows && skips_zeros; ++row) {
    counts[row] = list_nonzero(product.a + row * product.a_stride, product.depth, indices + row * product.depth);
    total += counts[row];
  }
  if (!skips_zeros || total * kGatherCost > product.rows * product.depth) {
    return run_with_fma<DenseProductLoop, Real>(product);
  }
  for (int64 row = 0; row < product.rows; ++row) {
    run_with_fma<GatheredProductLoop, Real>({row_of(row), indices + row * product.depth, counts[row]});
  }
}

}  // namespace asgl::cpu
