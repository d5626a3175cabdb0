// Packs spikes into one bit per element, the form in which they are kept for backward, and unpacks them.
#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/product.h"
#include "cpu/spikes.h"

namespace asgl::cpu {
namespace {

// A bit for each of the first eight elements, set if the element is not zero.
template <class Real>
uint8 mask_of(const Real* x, int64 length) {
#if defined(__x86_64__)
  if (length >= 8 && instruction_set() != InstructionSet::kBaseline) return static_cast<uint8>(which_nonzero(x));
#endif
  int32_t indices[8];
  const int64 count = list_nonzero_after<Real>(0, x, std::min<int64>(length, 8), indices, 0);
  int mask = 0;
  for (int64 n = 0; n < count; ++n) mask |= 1 << indices[n];
  return static_cast<uint8>(mask);
}

// x = 1 where a bit is set, else 0
template <class Real>
struct UnpackLoop {
  struct Args {
    const uint8* mask;
    int64 bytes;
    Real* x;  // [bytes, 8]
  };

  static ASGL_HOST_DEVICE void run(Args args) {
    for (int64 i = 0; i < args.bytes; ++i) {
      for (int bit = 0; bit < 8; ++bit) args.x[8 * i + bit] = static_cast<Real>(args.mask[i] >> bit & 1);
    }
  }
};

// Elements per task, a multiple of the 64 elements of a word of the mask.
constexpr int64 kChunk = 16384;

}  // namespace

template <class Real>
SpikeCount mask_spikes(const Real* x, int64 length, uint8* mask) {
  SpikeCount found = {0, true};
  for (int64 first = 0; first < length; first += kChunk) {
    const int64 elements = std::min(kChunk, length - first);
    int64 count;
    run<CountNonzeroLoop<Real>>({x + first, 1, elements, &count, &found.all_ones});
    found.nonzero += count;
    for (int64 i = 0; i < elements; i += 8) *mask++ = mask_of(x + first + i, elements - i);
  }
  for (int64 i = (length + 7) / 8; i % 8 != 0; ++i) *mask++ = 0;
  return found;
}

template <class Real>
void copy_spikes(const Real* x, int64 length, Real* values) {
  int32_t indices[kChunk];
  for (int64 first = 0; first < length; first += kChunk) {
    const int64 count = list_nonzero(x + first, std::min(kChunk, length - first), indices);
    for (int64 n = 0; n < count; ++n) *values++ = x[first + indices[n]];
  }
}

template <class Real>
void unpack_spikes(const uint8* mask, const Real* values, int64 length, Real* x) {
  const auto bit = [&](int64 i) { return mask[i / 8] >> i % 8 & 1; };
  if (values != nullptr) {
    for (int64 i = 0; i < length; ++i) x[i] = bit(i) != 0 ? *values++ : Real(0);
    return;
  }
  at::parallel_for(0, (length + kChunk - 1) / kChunk, 4, [&](int64_t begin, int64_t end) {
    const int64 first = begin * kChunk, bytes = (std::min(end * kChunk, length) - first) / 8;
    run<UnpackLoop<Real>>({mask + first / 8, bytes, x + first});
  });
  for (int64 i = length / 8 * 8; i < length; ++i) x[i] = static_cast<Real>(bit(i));
}

template SpikeCount mask_spikes(const float*, int64, uint8*);
template SpikeCount mask_spikes(const double*, int64, uint8*);
template void copy_spikes(const float*, int64, float*);
template void copy_spikes(const double*, int64, double*);
template void unpack_spikes(const uint8*, const float*, int64, float*);
template void unpack_spikes(const uint8*, const double*, int64, double*);

}  // namespace asgl::cpu
