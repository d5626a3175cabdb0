// Philox4x32-10 (Salmon, Moraes, Dror, Shaw; SC 2011) as a pure function of counter and key, and the noise drawn by it.
#pragma once

#include "math/host_device.h"

namespace asgl {

// Four words of 32 bits. On a CPU each is in the low half of a 64-bit lane, whose high half is ignored:
// 32 x 32 -> 64 bit products then need no shuffle in a vector register.
#if defined(__CUDA_ARCH__)
using PhiloxWord = uint32;
#else
using PhiloxWord = uint64;
#endif
struct PhiloxWords {
  PhiloxWord w[4];
};

constexpr uint64 kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32 kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Four random words, from a counter and a key.
ASGL_HOST_DEVICE PhiloxWords philox4x32(PhiloxWords counter, uint32 key0, uint32 key1) {
  constexpr uint64 kLow = 0xFFFFFFFFu;
  PhiloxWord c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64 product0 = kPhiloxMultiplier0 * (c0 & kLow);
    const uint64 product1 = kPhiloxMultiplier1 * (c2 & kLow);
    c0 = static_cast<PhiloxWord>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<PhiloxWord>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<PhiloxWord>(product1);
    c3 = static_cast<PhiloxWord>(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// analog_below for analog_prob = 1: above every 16-bit draw, so that all elements are analog.
constexpr uint32 kAlwaysAnalog = 65536;

// The draws of 4 adjacent neurons for two steps. Bits 16 j to 16 j + 15 of draws[t % 2] belong to neuron 4 * group + j
// at step t. `group` is an argument of noise_block.
struct NoiseBlock {
  uint64 draws[2];
};

// What distinguishes the draws of one call from those of another: the key of Philox, and one word of its counter.
struct NoiseKey {
  uint32 seed_low, seed_high, offset;
};

// Reads the key from rng_state, (seed, offset).
ASGL_HOST_DEVICE NoiseKey noise_key(const int64* rng_state) {
  const uint64 seed = static_cast<uint64>(rng_state[0]);
  return {static_cast<uint32>(seed), static_cast<uint32>(seed >> 32), static_cast<uint32>(rng_state[1])};
}

// The draws for steps 2 step_pair and 2 step_pair + 1. An element is analog where its draw is below
// round(analog_prob * kAlwaysAnalog).
ASGL_HOST_DEVICE NoiseBlock noise_block(uint64 group, uint32 step_pair, NoiseKey key) {
  const PhiloxWords counter = {{static_cast<uint32>(group), static_cast<uint32>(group >> 32), step_pair, key.offset}};
  const PhiloxWords words = philox4x32(counter, key.seed_low, key.seed_high);
  const auto join = [](uint64 low, uint64 high) { return (low & 0xFFFFFFFFu) | (high << 32); };
  return {{join(words.w[0], words.w[1]), join(words.w[2], words.w[3])}};
}

}  // namespace asgl
