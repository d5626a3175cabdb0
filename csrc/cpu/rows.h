// Access to the rows of a tile, each of which has the tile's elements of one time step. Loops use a row in place in the
// sequence, or a copy of it as Real_t (float for half types), which stays in the cache.
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

  // Whether the tile's elements of a step are contiguous in memory, in one run of shape.inner neurons.
  bool is_contiguous() const { return first % shape.inner + length <= shape.inner; }
};

// The runs of the tile's neurons n with the same n / inner.
inline Runs tile_runs(const Tile& tile, int64 inner) { return {inner - tile.first % inner, inner, tile.length}; }

// Calls f(neuron, offset, length) for each run of tile_runs(tile, inner), with the run's first neuron, its offset in
// the tile and its length.
template <class F>
void for_each_stretch(const Tile& tile, int64 inner, F&& f) {
  tile_runs(tile, inner).for_each([&](int64, int64 offset, int64 length) { f(tile.first + offset, offset, length); });
}

// Whether loops use the rows of a sequence in place. They do if the tile's rows are contiguous, and the elements are
// not of a half type.
template <class Element>
bool is_in_place(const Tile& tile) {
  return std::is_same_v<Element, Real_t<Element>> && tile.is_contiguous();
}

// Returns row t of a sequence as contiguous elements of type Real_t<Element>: in place, or a copy in `buffer`.
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

// Returns the address to which a loop writes row t: in place in the sequence, or `buffer`, which finish_row then copies
// to the sequence.
template <class Element>
Real_t<Element>* start_row(Element* sequence, const Tile& tile, int64 t, Real_t<Element>* buffer) {
  if (sequence != nullptr && is_in_place<Element>(tile)) {
    return reinterpret_cast<Real_t<Element>*>(sequence + tile.shape.offset(tile.first, t));
  }
  return buffer;
}

// Stores row t in the sequence. Does nothing if the row was computed in place, or without a sequence.
template <class Element>
void finish_row(const Real_t<Element>* row, Element* sequence, const Tile& tile, int64 t) {
  if (sequence == nullptr) return;
  const void* in_place = sequence + tile.shape.offset(tile.first, t);
  if (is_in_place<Element>(tile) && row == in_place) return;
  for_each_stretch(tile, tile.shape.inner, [&](int64 n, int64 offset, int64 length) {
    run<ConvertLoop<Real_t<Element>, Element>>({row + offset, sequence + tile.shape.offset(n, t), length});
  });
}

// Returns the rows from row t on for a loop over adjacent steps. If the rows are not in place, only row t is valid, as
// a copy.
template <class Element>
StepRows<const Real_t<Element>> read_steps(const Element* sequence, const Tile& tile, int64 t,
                                           Real_t<Element>* buffer) {
  return {read_row(sequence, tile, t, buffer), tile.shape.inner};
}

// Returns the rows to which a loop over adjacent steps writes from row t on. If these are not in place, all steps write
// to the same row, `buffer`. A sequence that is not in place is therefore computed one step at a time, and finish_row
// stores each step. Without a sequence, the rows are discarded.
template <class Element>
StepRows<Real_t<Element>> start_steps(Element* sequence, const Tile& tile, int64 t, Real_t<Element>* buffer) {
  Real_t<Element>* row = start_row(sequence, tile, t, buffer);
  return {row, row == buffer ? 0 : tile.shape.inner};
}

// Returns the address of row t (0 <= t < steps) of a tile for a prefetch. Returns null without a sequence, for a tile
// beyond the last, or if the row is not contiguous. For a sequence that may be in the cache, see
// recent_row_to_prefetch.
template <class Element>
const char* row_to_prefetch(const Element* sequence, const Tile& tile, int64 t) {
  if (sequence == nullptr || tile.length <= 0 || !tile.is_contiguous()) return nullptr;
  return reinterpret_cast<const char*>(sequence + tile.shape.offset(tile.first, t));
}

// row_to_prefetch for sequences that were written recently or will be written. Also returns null if the sequence has
// less than 1 MiB, and so fits in most L2 caches. Without prefetches, a layer of this size takes 4 to 8 % less time.
template <class Element>
const char* recent_row_to_prefetch(const Element* sequence, const Tile& tile, int64 t) {
  constexpr int64 kCacheBytes = int64{1} << 20;
  const int64 bytes = tile.shape.neurons() * tile.shape.steps * static_cast<int64>(sizeof(Element));
  return bytes < kCacheBytes ? nullptr : row_to_prefetch(sequence, tile, t);
}

// Returns the streaming store for a result, or null if the result needs ordinary stores or if these are faster. Forward
// and a sum over its result, timed together, take 0.92 times as long with streaming stores for T = 4 and N = 2^20. For
// N = 2^18 they take 1.5 times as long, and for T = 1 they take longer at any N.
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
