// A tile's rows: where they lie in a sequence, or as copies of the type of the arithmetic that stay in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "cpu_loops.h"

namespace asgl::cpu {

constexpr int64 kTile = 1024;  // neurons
constexpr int64 kElementsPerTask = 32768;
// A row takes about as long as memory does to answer, so that one row ahead would come too late.
constexpr int64 kRowsAhead = 2;

// Calls f(offset in the tile, element in the sequence, length) for each stretch of the tile that step t has in one
// piece.
template <class F>
void for_each_stretch(const SequenceShape& shape, int64 first, int64 length, int64 t, F&& f) {
  for (int64 i = 0; i < length;) {
    const int64 n = first + i;
    const int64 stretch = std::min(length - i, shape.inner - n % shape.inner);
    f(i, shape.element(n, t), stretch);
    i += stretch;
  }
}

// Row t of a sequence as contiguous numbers of the arithmetic's type: where it lies if it is so already, else a copy in
// `buffer`.
template <class Element>
const Real_t<Element>* read_row(const Element* sequence, const SequenceShape& shape, int64 first, int64 length, int64 t,
                                Real_t<Element>* buffer) {
  using Real = Real_t<Element>;
  if constexpr (std::is_same_v<Element, Real>) {
    if (first % shape.inner + length <= shape.inner) {
      return sequence + shape.element(first, t);
    }
  }
  for_each_stretch(shape, first, length, t, [&](int64 offset, int64 element, int64 stretch) {
    run<ConvertLoop<Element, Real>>({sequence + element, buffer + offset, stretch});
  });
  return buffer;
}

// Where row t is to be written: in place, or in `buffer`, which finish_row then stores.
template <class Element>
Real_t<Element>* start_row(Element* sequence, const SequenceShape& shape, int64 first, int64 length, int64 t,
                           Real_t<Element>* buffer) {
  if constexpr (std::is_same_v<Element, Real_t<Element>>) {
    if (sequence != nullptr && first % shape.inner + length <= shape.inner) {
      return sequence + shape.element(first, t);
    }
  }
  return buffer;
}

template <class Element>
void finish_row(const Real_t<Element>* row, Element* sequence, const SequenceShape& shape, int64 first, int64 length,
                int64 t) {
  if (sequence == nullptr) {
    return;
  }
  if constexpr (std::is_same_v<Element, Real_t<Element>>) {
    if (first % shape.inner + length <= shape.inner && row == sequence + shape.element(first, t)) {
      return;
    }
  }
  for_each_stretch(shape, first, length, t, [&](int64 offset, int64 element, int64 stretch) {
    run<ConvertLoop<Real_t<Element>, Element>>({row + offset, sequence + element, stretch});
  });
}

// A hint at row t of the tile at `first`: null where that does not exist or is not one stretch.
template <class Element>
const char* row_ahead(const Element* sequence, const SequenceShape& shape, int64 first, int64 length, int64 t) {
  const bool in_one_stretch = first < shape.neurons() && first % shape.inner + length <= shape.inner;
  return sequence == nullptr || !in_one_stretch ? nullptr
                                                : reinterpret_cast<const char*>(sequence + shape.element(first, t));
}

// Rows of numbers that begin at cache lines.
template <class Number>
class Rows {
 public:
  Rows(int64 count, int64 length)
      : stride_((length + kPerLine - 1) / kPerLine * kPerLine),
        storage_(new Number[static_cast<size_t>(count * stride_ + kPerLine)]) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.get());
    first_ = reinterpret_cast<Number*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
  }

  Number* row(int64 index) { return first_ + index * stride_; }
  Number* take(int64 count = 1) {
    Number* rows = row(taken_);
    taken_ += count;
    return rows;
  }
  int64 stride() const { return stride_; }

 private:
  static constexpr int64 kCacheLine = 64;
  static constexpr int64 kPerLine = kCacheLine / sizeof(Number);

  int64 stride_;
  std::unique_ptr<Number[]> storage_;
  Number* first_;
  int64 taken_ = 0;
};

}  // namespace asgl::cpu
