// Reads the mask of packed spikes, one bit per element: counts and lists the bits of a range that are set.
#pragma once

#include <algorithm>

#include "cpu/product.h"

namespace asgl::cpu {

// Returns the bits [first, first + length) of a mask, at most 64, in the lowest bits of a word.
inline uint64 load_bits(const uint64* mask, int64 first, int64 length) {
  const int64 word = first / 64, shift = first % 64;
  uint64 bits = mask[word] >> shift;
  if (shift + length > 64) bits |= mask[word + 1] << (64 - shift);
  return length < 64 ? bits & ((uint64{1} << length) - 1) : bits;
}

// The number of entries after the end of a list that list_bits may overwrite.
constexpr int64 kListSlack = 8;

#if defined(__x86_64__)
// count_bits with the instruction popcnt, which counts the bits of a word.
__attribute__((target("popcnt"))) inline int64 count_bits_popcnt(const uint64* mask, int64 first, int64 length) {
  int64 count = 0;
  for (int64 i = 0; i < length; i += 64) {
    count += __builtin_popcountll(load_bits(mask, first + i, std::min<int64>(64, length - i)));
  }
  return count;
}

// list_bits without branches that depend on bits. For each byte of the mask, it stores eight positions, first those of
// the set bits, and advances by the number of set bits.
__attribute__((target("avx2,popcnt"))) inline void list_bits_avx2(const uint64* mask, int64 first, int64 length,
                                                                  int64 ranges, int64 base, int32_t* indices,
                                                                  int64* offsets) {
  int64 count = 0;
  for (int64 range = 0; range < ranges; ++range) {
    offsets[range] = base + count;
    for (int64 i = 0; i < length; i += 64) {
      const int64 start = range * length + i;
      uint64 bits = load_bits(mask, first + start, std::min<int64>(64, length - i));
      for (int byte = 0; byte < 8; ++byte, bits >>= 8) {
        const __m256i positions =
            _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kSetBitPositions[bits & 0xFF])));
        const __m256i elements = _mm256_add_epi32(positions, _mm256_set1_epi32(static_cast<int>(start + 8 * byte)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(indices + count), elements);
        count += __builtin_popcountll(bits & 0xFF);
      }
    }
  }
}
#endif

// Counts the bits [first, first + length) of a mask that are set.
inline int64 count_bits(const uint64* mask, int64 first, int64 length) {
#if defined(__x86_64__)
  if (instruction_set() != InstructionSet::kBaseline) return count_bits_popcnt(mask, first, length);
#endif
  int64 count = 0;
  for (int64 i = 0; i < length; i += 64) {
    count += __builtin_popcountll(load_bits(mask, first + i, std::min<int64>(64, length - i)));
  }
  return count;
}

// Lists the set bits of `ranges` adjacent ranges of `length` bits. The first range begins at bit `first`, and positions
// are counted from there. offsets[i] is `base` plus the number of positions listed before range i. `indices` must have
// room for kListSlack more entries than there are set bits.
inline void list_bits(const uint64* mask, int64 first, int64 length, int64 ranges, int64 base, int32_t* indices,
                      int64* offsets) {
#if defined(__x86_64__)
  if (instruction_set() != InstructionSet::kBaseline) {
    return list_bits_avx2(mask, first, length, ranges, base, indices, offsets);
  }
#endif
  int64 count = 0;
  for (int64 range = 0; range < ranges; ++range) {
    offsets[range] = base + count;
    for (int64 i = 0; i < length; i += 64) {
      const int64 start = range * length + i;
      for (uint64 bits = load_bits(mask, first + start, std::min<int64>(64, length - i)); bits != 0; bits &= bits - 1) {
        indices[count++] = static_cast<int32_t>(start + __builtin_ctzll(bits));
      }
    }
  }
}

}  // namespace asgl::cpu
