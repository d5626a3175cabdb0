// Products of a few rows with a matrix, for recurrent neurons. Each sum is in the order of the inner dimension, by
// fused multiply-add where the processor has it: the bits of an element depend neither on the number of rows nor on
// whether zeros are skipped.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/clones.h"
#include "math/float_math.h"

namespace asgl::cpu {

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

template <class Real, class Vector>
ASGL_HOST_DEVICE void load(const Real* from, Vector& to) {
  std::memcpy(&to, from, sizeof(Vector));
}

// Columns of a panel: a matrix [depth, columns] is stored as [columns / kPanel, depth, kPanel], padded by zeros, so
// that a panel's rows follow each other in the cache. Two vectors of the widest kind.
template <class Real>
constexpr int64 kPanel = 128 / static_cast<int64>(sizeof(Real));

template <class Real>
int64 panels_size(int64 depth, int64 columns) {
  return (columns + kPanel<Real> - 1) / kPanel<Real> * kPanel<Real> * depth;
}

// Stores the matrix whose element (k, j) is matrix[k * row_stride + j * column_stride] in panels, which are zero.
template <class Real>
void fill_panels(const Real* matrix, int64 row_stride, int64 column_stride, int64 depth, int64 columns, Real* panels) {
  for (int64 first = 0; first < columns; first += kPanel<Real>) {
    const int64 width = columns - first < kPanel<Real> ? columns - first : kPanel<Real>;
    Real* panel = panels + first * depth;
    for (int64 k = 0; k < depth; ++k) {
      const Real* row = matrix + k * row_stride + first * column_stride;
      for (int64 j = 0; j < width; ++j) panel[k * kPanel<Real> + j] = row[j * column_stride];
    }
  }
}

// out[i, j] = sum over k of a[i, k] * b[k, j]
template <class Real>
struct DenseProduct {
  const Real* a;  // [rows, depth]
  int64 rows, depth, columns;
  const Real* panels;  // of b
  Real* out;           // [rows, columns]
};

// In tiles of six rows and two vectors: twelve sums in registers hide the latency of an addition.
template <class Real, int kBytes>
struct DenseProductLoop {
  using Args = DenseProduct<Real>;
  using Vector = typename VectorOf<Real, kBytes>::type;
  static constexpr int64 kLanes = kBytes / static_cast<int64>(sizeof(Real)), kColumns = 2 * kLanes;
  static_assert(kPanel<Real> % kColumns == 0);

  static ASGL_HOST_DEVICE void run(Args args) {
    for (int64 column = 0; column < args.columns; column += kColumns) {
      int64 row = 0;
      for (; row + 6 <= args.rows; row += 6) tile<6>(args, row, column);
      if (row + 4 <= args.rows) tile<4>(args, row, column), row += 4;
      if (row + 2 <= args.rows) tile<2>(args, row, column), row += 2;
      if (row < args.rows) tile<1>(args, row, column);
    }
  }

 private:
  template <int kRows>
  static ASGL_HOST_DEVICE void tile(const Args& args, int64 row, int64 column) {
    const int64 in_panel = column % kPanel<Real>;
    const Real* b = args.panels + (column - in_panel) * args.depth + in_panel;
    const Real* a = args.a + row * args.depth;
    Vector sums[kRows][2] = {};
    for (int64 k = 0; k < args.depth; ++k) {
      Vector b0, b1;
      load(b + k * kPanel<Real>, b0);
      load(b + k * kPanel<Real> + kLanes, b1);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const Vector factor = a[i * args.depth + k] - Vector{};
        multiply_add(factor, b0, sums[i][0]);
        multiply_add(factor, b1, sums[i][1]);
      }
    }
    const int64 width = args.columns - column < kColumns ? args.columns - column : kColumns;
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      Real* out = args.out + (row + i) * args.columns + column;
      std::memcpy(out, &sums[i], width == kColumns ? sizeof(sums[i]) : static_cast<size_t>(width) * sizeof(Real));
    }
  }
};

// out[j] (+)= sum over n of values[n] * b[indices[n], j]
template <class Real>
struct GatheredProduct {
  const int32_t* indices;
  const Real* values;
  int64 count, columns;
  const Real* b;
  int64 row_stride, panel_stride;  // of b: elements between rows, and between panels of kPanel columns
  bool accumulate;
  Real* out;
};

template <class Real, int kBytes>
struct GatheredProductLoop {
  using Args = GatheredProduct<Real>;
  using Vector = typename VectorOf<Real, kBytes>::type;
  static constexpr int64 kLanes = kBytes / static_cast<int64>(sizeof(Real));

  static ASGL_HOST_DEVICE void run(Args args) {
    int64 column = 0;
    for (; column + 8 * kLanes <= args.columns; column += 8 * kLanes) block<8>(args, column);
    for (; column + 2 * kLanes <= args.columns; column += 2 * kLanes) block<2>(args, column);
    for (; column < args.columns; ++column) single(args, column);
  }

 private:
  static ASGL_HOST_DEVICE const Real* at(const Args& args, int64 column) {
    return args.b + column / kPanel<Real> * args.panel_stride + column % kPanel<Real>;
  }

  template <int kVectors>
  static ASGL_HOST_DEVICE void block(const Args& args, int64 column) {
    Vector sums[kVectors] = {};
    Real* out = args.out + column;
    if (args.accumulate) std::memcpy(&sums, out, sizeof(sums));
    const Real* b[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) b[i] = at(args, column + i * kLanes);
    for (int64 n = 0; n < args.count; ++n) {
      const int64 offset = args.indices[n] * args.row_stride;
      const Vector factor = args.values[n] - Vector{};
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        Vector row;
        load(b[i] + offset, row);
        multiply_add(factor, row, sums[i]);
      }
    }
    std::memcpy(out, &sums, sizeof(sums));
  }

  static ASGL_HOST_DEVICE void single(const Args& args, int64 column) {
    const Real* b = at(args, column);
    Real sum = args.accumulate ? args.out[column] : Real(0);
    for (int64 n = 0; n < args.count; ++n) {
      const Real element = b[args.indices[n] * args.row_stride];
      sum = kBytes > 16 ? std::fma(args.values[n], element, sum) : args.values[n] * element + sum;
    }
    args.out[column] = sum;
  }
};

#if defined(__x86_64__)
template <class Loop>
__attribute__((target("avx2,fma"))) void run_fma(const typename Loop::Args& args) {
  Loop::run(args);
}
#endif

// Runs a loop over vectors of this processor.
template <template <class, int> class Loop, class Real>
void run_vectors(const typename Loop<Real, 16>::Args& args) {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx512) return run_avx512<Loop<Real, 64>>(args);
  if (instruction_set() == InstructionSet::kAvx2 && __builtin_cpu_supports("fma")) return run_fma<Loop<Real, 32>>(args);
#endif
  run_baseline<Loop<Real, 16>>(args);
}

// Lists the elements of a row that are not zero; NaN is listed. Returns their number.
template <class Real>
int64 list_nonzero(const Real* row, int64 length, int32_t* indices, Real* values) {
  using Bits = std::conditional_t<sizeof(Real) == 4, uint32, uint64>;
  int64 count = 0;
  for (int64 i = 0; i < length; ++i) {
    indices[count] = static_cast<int32_t>(i);
    values[count] = row[i];
    count += (bit_cast<Bits>(row[i]) << 1) != 0;  // without the sign
  }
  return count;
}

template <class Real>
int64 list_all(const Real* row, int64 length, int32_t* indices, Real* values) {
  for (int64 i = 0; i < length; ++i) indices[i] = static_cast<int32_t>(i), values[i] = row[i];
  return length;
}

}  // namespace asgl::cpu
