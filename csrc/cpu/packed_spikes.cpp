// Packs the input of spike layers into a mask of one bit per element, followed by the elements that are not zero,
// unless all of these are 1. Spike layers read this form, and keep it for backward.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/product.h"
#include "cpu/spike_mask.h"
#include "cpu/spikes.h"

namespace asgl::cpu {
namespace {

// The number of elements that a task packs at a time. It is a multiple of 64, so that no two chunks share a word of 64
// bits.
constexpr int64 kChunkElements = 16384;

// Packs up to 64 elements. Returns a bit for each element, set if the element is not zero. Clears `all_ones` if an
// element is neither 0 nor 1.
template <class Real>
uint64 pack_word(const Real* x, int64 length, bool& all_ones) {
  using Bits = std::conditional_t<sizeof(Real) == 4, uint32, uint64>;
  uint64 word = 0;
  for (int64 i = 0; i < length; ++i) {
    const Bits bits = bit_cast<Bits>(x[i]);
    const bool nonzero = (bits << 1) != 0;  // without the sign
    word |= static_cast<uint64>(nonzero) << i;
    all_ones &= !nonzero || bits == bit_cast<Bits>(Real(1));
  }
  return word;
}

#if defined(__x86_64__)
// Returns a bit for each of eight elements, set if the element is 1.
__attribute__((target("avx2"))) inline int one_bits(const float* x) {
  return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_set1_ps(1), _CMP_EQ_OQ));
}
__attribute__((target("avx2"))) inline int one_bits(const double* x) {
  const auto half = [](const double* from) __attribute__((target("avx2"), always_inline)) {
    return _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(from), _mm256_set1_pd(1), _CMP_EQ_OQ));
  };
  return half(x) | half(x + 4) << 4;
}

// pack_word for 64 elements.
template <class Real>
__attribute__((target("avx2"))) uint64 pack_word_avx2(const Real* x, bool& all_ones) {
  uint64 word = 0, ones = 0;
  for (int i = 0; i < 64; i += 8) {
    word |= static_cast<uint64>(nonzero_bits(x + i)) << i;
    ones |= static_cast<uint64>(one_bits(x + i)) << i;
  }
  all_ones &= word == ones;
  return word;
}
#endif

}  // namespace

template <class Real>
bool pack_spike_mask(const Real* x, int64 length, uint64* mask) {
  std::atomic<bool> all_ones = true;
  at::parallel_for(0, (length + kChunkElements - 1) / kChunkElements, 4, [&](int64_t begin, int64_t end) {
    bool ones = true;
    for (int64 chunk = begin; chunk < end; ++chunk) {
      const int64 first = chunk * kChunkElements, elements = std::min(kChunkElements, length - first);
      int64 whole = 0;
#if defined(__x86_64__)
      if (instruction_set() != InstructionSet::kBaseline) {
        for (; whole + 64 <= elements; whole += 64)
          mask[(first + whole) / 64] = pack_word_avx2(x + first + whole, ones);
      }
#endif
      for (; whole < elements; whole += 64) {
        mask[(first + whole) / 64] = pack_word(x + first + whole, std::min<int64>(64, elements - whole), ones);
      }
    }
    if (!ones) all_ones = false;
  });
  return all_ones;
}

template <class Real>
void pack_spike_values(const Real* x, int64 length, const uint64* mask, Real* values) {
  std::vector<Real*> chunk_values;
  for (int64 first = 0; first < length; first += kChunkElements) {
    chunk_values.push_back(values);
    values += count_bits(mask, first, std::min(kChunkElements, length - first));
  }
  at::parallel_for(0, static_cast<int64_t>(chunk_values.size()), 4, [&](int64_t begin, int64_t end) {
    int32_t indices[kChunkElements];
    for (int64 chunk = begin; chunk < end; ++chunk) {
      const Real* from = x + chunk * kChunkElements;
      const int64 listed = list_nonzero(from, std::min(kChunkElements, length - chunk * kChunkElements), indices);
      for (int64 n = 0; n < listed; ++n) chunk_values[static_cast<size_t>(chunk)][n] = from[indices[n]];
    }
  });
}

int64 count_spikes(const uint64* mask, int64 length) { return count_bits(mask, 0, length); }

template bool pack_spike_mask(const float*, int64, uint64*);
template bool pack_spike_mask(const double*, int64, uint64*);
template void pack_spike_values(const float*, int64, const uint64*, float*);
template void pack_spike_values(const double*, int64, const uint64*, double*);

}  // namespace asgl::cpu
