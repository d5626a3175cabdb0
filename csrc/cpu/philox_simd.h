// The loop that draws random bits for the neurons of a tile. is_analog in loops.h decides by these bits whether an
// element is analog. The loop is vectorised by hand for AVX2 and AVX-512.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/clones.h"
#include "math/philox.h"

namespace asgl::cpu {

struct NoiseLoop {
  struct Args {
    NoiseKey key;
    uint64 first_group;  // a multiple of kNoiseGroups, so that groups of an iteration share the upper word
    int64 groups;
    uint32 step_pair;
    uint64* even;
    uint64* odd;
  };

  // Computes the random draws of adjacent groups of four neurons, for an even step and the odd step after it.
  static ASGL_HOST_DEVICE void run(Args args) {
#pragma GCC ivdep
    for (int64 i = 0; i < args.groups; ++i) {
      const NoiseBlock block = noise_block(args.first_group + static_cast<uint64>(i), args.step_pair, args.key);
      args.even[i] = block.draws[0];
      args.odd[i] = block.draws[1];
    }
  }
};

constexpr int64 kNoiseGroups = 32;  // a multiple of the groups that an iteration of each vector loop computes

#if defined(__x86_64__)
// NoiseLoop with vector products 32 x 32 -> 64 bits, which GCC does not generate from the loop above. Whole vectors are
// stored, so the rows must have room for `groups` rounded up to a multiple of kNoiseGroups. Each of the ten rounds
// depends on the one before. To hide this latency, the loop computes four vectors (chains) at a time. Rounds are
// unrolled, because a loop would copy the words of a round to the registers of the next round. Args are read in each
// iteration, because they would not fit in the sixteen vector registers during the whole loop.
template <>
__attribute__((target("avx2"))) inline void run_avx2<NoiseLoop>(const NoiseLoop::Args& args) {
  constexpr int kChains = 4;
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  __m256i group = _mm256_set_epi64x(3, 2, 1, 0);
  group = _mm256_add_epi64(group, _mm256_set1_epi64x(static_cast<int64>(args.first_group)));
  for (int64 i = 0; i < args.groups; i += 4 * kChains) {
    const __m256i upper = _mm256_set1_epi64x(static_cast<int64>(args.first_group + static_cast<uint64>(i)) >> 32);
    __m256i c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    for (int chain = 0; chain < kChains; ++chain) {
      c0[chain] = group;
      c1[chain] = upper;
      c2[chain] = _mm256_set1_epi64x(args.step_pair);
      c3[chain] = _mm256_set1_epi64x(args.key.offset);
      group = _mm256_add_epi64(group, _mm256_set1_epi64x(4));
    }
    uint32 key0 = args.key.seed_low, key1 = args.key.seed_high;
#pragma GCC unroll kPhiloxRounds
    for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
      const __m256i keys0 = _mm256_set1_epi64x(key0), keys1 = _mm256_set1_epi64x(key1);
      for (int chain = 0; chain < kChains; ++chain) {
        const __m256i product0 = _mm256_mul_epu32(multiplier0, c0[chain]);
        const __m256i product1 = _mm256_mul_epu32(multiplier1, c2[chain]);
        c0[chain] = _mm256_xor_si256(_mm256_srli_epi64(product1, 32), _mm256_xor_si256(c1[chain], keys0));
        c2[chain] = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_xor_si256(c3[chain], keys1));
        c1[chain] = product1;
        c3[chain] = product0;
      }
    }
    for (int chain = 0; chain < kChains; ++chain) {
      const __m256i even = _mm256_blend_epi32(c0[chain], _mm256_slli_epi64(c1[chain], 32), 0xAA);
      const __m256i odd = _mm256_blend_epi32(c2[chain], _mm256_slli_epi64(c3[chain], 32), 0xAA);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.even + i + 4 * chain), even);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.odd + i + 4 * chain), odd);
    }
  }
}

// NoiseLoop with AVX-512, by the same method as with AVX2. GCC unrolls these rounds without a pragma.
template <>
ASGL_TARGET_AVX512 inline void run_avx512<NoiseLoop>(const NoiseLoop::Args& args) {
  constexpr int kChains = 4, kXor3 = 0x96;
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF), lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  for (int64 i = 0; i < args.groups; i += 8 * kChains) {
    __m512i c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    for (int chain = 0; chain < kChains; ++chain) {
      const auto first = static_cast<int64>(args.first_group) + i + 8 * chain;
      c0[chain] = _mm512_add_epi64(_mm512_set1_epi64(first), lanes);
      c1[chain] = _mm512_srli_epi64(c0[chain], 32);
      c2[chain] = _mm512_set1_epi64(args.step_pair);
      c3[chain] = _mm512_set1_epi64(args.key.offset);
    }
    uint32 key0 = args.key.seed_low, key1 = args.key.seed_high;
    for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
      const __m512i keys0 = _mm512_set1_epi64(key0), keys1 = _mm512_set1_epi64(key1);
      for (int chain = 0; chain < kChains; ++chain) {
        const __m512i product0 = _mm512_mul_epu32(multiplier0, c0[chain]);
        const __m512i product1 = _mm512_mul_epu32(multiplier1, c2[chain]);
        c0[chain] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[chain], keys0, kXor3);
        c2[chain] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[chain], keys1, kXor3);
        c1[chain] = product1;
        c3[chain] = product0;
      }
    }
    for (int chain = 0; chain < kChains; ++chain) {
      const __m512i even = _mm512_or_si512(_mm512_and_si512(c0[chain], low), _mm512_slli_epi64(c1[chain], 32));
      const __m512i odd = _mm512_or_si512(_mm512_and_si512(c2[chain], low), _mm512_slli_epi64(c3[chain], 32));
      _mm512_storeu_si512(args.even + i + 8 * chain, even);
      _mm512_storeu_si512(args.odd + i + 8 * chain, odd);
    }
  }
}
#endif

}  // namespace asgl::cpu
