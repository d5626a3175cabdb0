// Access to the rows of a tile: in place in a sequence, or as copies in the arithmetic type, which stay in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "cpu/loops.h"

namespace asgl::cpu {

constexpr int64 kElementsPerTask = 32768;  // about the fewest that are worth a thread
// Rows are prefetched two rows ahead. One row would be too late, because computing a row takes about as long as the
// latency of memory.
constexpr int64 kRowsAhead = 2;

// The number of tiles of a sequence.
inline int64 num_tiles(const SequenceShape& shape) { return (shape.neurons() + kTile - 1) / kTile; }

// Adjacent neurons that a task computes together.
struct Tile {
  SequenceShape shape;
  int64 index, first, length;

  Tile(const SequenceShape& shape, int64 index, int64 size = kTile)
      : shape(shape), index(index), first(index * size), length(std::min(size, shape.neurons() - first)) {}

  // Whether the tile lies in one run of `inner` elements, so that its elements of a step are contiguous in memory.
  bool is_contiguous() const { return first % shape.inner + length <= shape.inner; }
};

// The runs of the tile's neurons that have the same n / inner.
inline Runs tile_runs(const Tile& tile, int64 inner) { return {inner - tile.first % inner, inner, tile.length}; }

// Calls f(neuron, offset in the tile, length) for each stretch of the tile's neurons that have the same n / inner.
template <class F>
void for_each_stretch(const Tile& tile, int64 inner, F&& f) {
  tile_runs(tile, inner).for_each([&](int64, int64 offset, int64 length) { f(tile.first + offset, offset, length); });
}

// Whether loops use the rows of a sequence in place: they are contiguous, and in the arithmetic type.
template <class Element>
bool is_in_place(const Tile& tile) {
  return std::is_same_v<Element, Real_t<Element>> && tile.is_contiguous();
}

// Returns row t of a sequence, contiguous and in the arithmetic type: in place, or a copy in `buffer`.
template <class Element>
const Real_t<Element>* read_row(const Element* sequence, const Tile& tile, int64 t, Real_t<Element>* buffer) {
  if (is_in_place<Element>(tile)) {
    return reinterpret_cast<const Real_t<Element>*>(sequence + tile.shape.offset(tile.first, t));
  }
  for_each_stretch(tile, tile.shape.inner, [&](int64 n, int64 offset, int64 length) {
    run<ConvertLoop<Element, Real_t<Element>>>({sequence + tile.shape.offset(n, t), buffer + offset, length});
  });
  return buffer;
}

// Returns the address to which a loop writes row t: in place, or `buffer`, which finish_row then stores.
template <class Element>
Real_t<Element>* start_row(Element* sequence, const Tile& tile, int64 t, Real_t<Element>* buffer) {
  if (sequence != nullptr && is_in_place<Element>(tile)) {
    return reinterpret_cast<Real_t<Element>*>(sequence + tile.shape.offset(tile.first, t));
  }
  return buffer;
}

// Stores row t in the sequence, unless it was computed in place or there is no sequence.
template <class Element>
void finish_row(const Real_t<Element>* row, Element* sequence, const Tile& tile, int64 t) {
  if (sequence == nullptr) return;
  const void* in_place = sequence + tile.shape.offset(tile.first, t);
  if (is_in_place<Element>(tile) && row == in_place) return;
  for_each_stretch(tile, tile.shape.inner, [&](int64 n, int64 offset, int64 length) {
    run<ConvertLoop<Real_t<Element>, Element>>({row + offset, sequence + tile.shape.offset(n, t), length});
  });
}

// Returns the rows from row t on for a loop over adjacent steps: all of them in place, or only row t, as a copy.
template <class Element>
StepRows<const Real_t<Element>> read_steps(const Element* sequence, const Tile& tile, int64 t,
                                           Real_t<Element>* buffer) {
  return {read_row(sequence, tile, t, buffer), tile.shape.inner};
}

// Returns the rows to which a loop over adjacent steps writes from row t on: in place, or the one row `buffer` for
// every step, each overwriting the one before. A sequence that is not in place is thus written one step at a time, by
// finish_row. Without a sequence the rows are discarded.
template <class Element>
StepRows<Real_t<Element>> start_steps(Element* sequence, const Tile& tile, int64 t, Real_t<Element>* buffer) {
  Real_t<Element>* row = start_row(sequence, tile, t, buffer);
  return {row, row == buffer ? 0 : tile.shape.inner};
}

// The address of row t (0 <= t < steps) of a tile for a prefetch. Null without a sequence, for a tile beyond the last,
// or if the row is not contiguous. For sequences that are assumed not to be in the cache; for others see
// recent_row_to_prefetch.
template <class Element>
const char* row_to_prefetch(const Element* sequence, const Tile& tile, int64 t) {
  if (sequence == nullptr || tile.length <= 0 || !tile.is_contiguous()) return nullptr;
  return reinterpret_cast<const char*>(sequence + tile.shape.offset(tile.first, t));
}

// row_to_prefetch for sequences that were written recently or will be written. Also null if the sequence fits in the L2
// cache: without prefetches a layer then takes 4 to 8 % less time.
template <class Element>
const char* recent_row_to_prefetch(const Element* sequence, const Tile& tile, int64 t) {
  constexpr int64 kCacheBytes = int64{1} << 20;
  const int64 bytes = tile.shape.neurons() * tile.shape.steps * static_cast<int64>(sizeof(Element));
  return bytes < kCacheBytes ? nullptr : row_to_prefetch(sequence, tile, t);
}

// The streaming store for a result, or null if ordinary stores are faster. Timed together with a sum as the next layer,
// streaming stores take 0.92 times as long for T = 4 and N = 2^20, 1.5 times for N = 2^18, and longer for any N at T
// = 1.
template <class Element>
StreamingStore streaming_store_for(const Element* sequence, const SequenceShape& shape) {
  constexpr int64 kSteps = 4, kBytes = int64{1} << 24;
  constexpr uintptr_t kCacheLine = 64;
  const auto is_whole = [](uintptr_t bytes) { return bytes % kCacheLine == 0; };
  const bool by_lines = is_whole(reinterpret_cast<uintptr_t>(sequence)) && is_whole(shape.inner * sizeof(Element));
  const int64 bytes = shape.neurons() * shape.steps * static_cast<int64>(sizeof(Element));
  const bool faster = shape.steps >= kSteps && bytes >= kBytes;
  return std::is_same_v<Element, float> && sequence != nullptr && by_lines && faster ? streaming_store() : nullptr;
}

// Allocates rows that are aligned to cache lines.
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
  // Returns the address of the next `count` rows that are not allocated yet.
  Number* allocate(int64 count = 1) {
    Number* rows = row(allocated_);
    allocated_ += count;
    return rows;
  }
  int64 stride() const { return stride_; }

 private:
  static constexpr int64 kCacheLine = 64;
  static constexpr int64 kPerLine = kCacheLine / sizeof(Number);

  int64 stride_;
  std::unique_ptr<Number[]> storage_;
  Number* first_;
  int64 allocated_ = 0;
};

}  // namespace asgl::cpu
