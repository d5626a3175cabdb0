// Decides by the noise of math/philox.h which elements are analog, for the neurons of a thread and the steps of a
// segment.
#pragma once

#include "cuda/access.cuh"

namespace asgl {

constexpr int kNoiseGroup = 4;  // neurons of a NoiseBlock, for two steps

// Draws the random numbers of a call, by neuron and pair of steps.
class NoiseSource {
 public:
  __device__ __forceinline__ explicit NoiseSource(const NoiseParams& params) {
    const NoiseParams noise = params.resolved();
    needs_draws_ = noise.needs_draws();
    key_ = needs_draws_ ? noise_key(noise.rng_state) : NoiseKey{};
    limit_ = needs_draws_ ? noise.analog_below << 16 : static_cast<uint32>(noise.analog_below > 0);
  }

  // Hides the key from the compiler, which would otherwise compute the keys of all ten rounds beforehand and keep them
  // in registers.
  __device__ __forceinline__ void hide_key_from_compiler() {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(key_.seed_low), "+r"(key_.seed_high));
#endif
  }
  // needs_draws() says whether random numbers decide which elements are analog. is_always_analog() says whether all
  // elements are analog without random numbers.
  __device__ __forceinline__ bool needs_draws() const { return needs_draws_; }
  __device__ __forceinline__ bool is_always_analog() const { return !needs_draws_ && limit_ > 0; }

  // The draws of neuron n's group for a pair of steps. If no random numbers are needed, all draws are 0, and is_analog
  // compares them with a limit_ of 1 if all elements are analog, or 0 if none is.
  __device__ __forceinline__ NoiseBlock draw(int64 n, int64 step_pair) const {
    if (!needs_draws_) return {};
    return noise_block(static_cast<uint64>(n) / kNoiseGroup, static_cast<uint32>(step_pair), key_);
  }

  // The draws of two adjacent pairs of steps. If both are computed together, they share the keys of the rounds of
  // Philox, which saves a sixth of the instructions.
  struct TwoBlocks {
    NoiseBlock blocks[2];
  };
  __device__ __forceinline__ TwoBlocks draw_two_blocks(int64 n, int64 step_pair) const {
    if (!needs_draws_) return {};
    const uint64 group = static_cast<uint64>(n) / kNoiseGroup;
    const uint32 first = static_cast<uint32>(step_pair);
    return {{noise_block(group, first, key_), noise_block(group, first + 1, key_)}};
  }

  // Whether neuron j of the group is analog in the first (odd_step = 0) or second step of the block. The 16 bits of its
  // draw are compared in the upper half of a word. The draw of an odd neuron is there already, and the lower half then
  // does not change the result.
  __device__ __forceinline__ bool is_analog(const NoiseBlock& block, int odd_step, int j) const {
    const uint32 word = static_cast<uint32>(block.draws[odd_step] >> (32 * (j / 2)));
    return (j % 2 == 1 ? word : word << 16) < limit_;
  }

 private:
  bool needs_draws_;
  NoiseKey key_;
  uint32 limit_;
};

// The noise of a thread's neurons in a segment of `length` steps, at most kSteps. The neurons are n to n + kLanes - 1,
// and the first step is `start`. is_analog(k, j) says whether neuron n + j is analog at step start + k.
template <int kLanes, int kSteps>
class SegmentNoise;

template <int kSteps>
class SegmentNoise<1, kSteps> {
 public:
  // The four neurons of a group belong to four threads. Each thread draws every fourth pair of steps for the whole
  // group. Then the threads exchange the results by shuffles.
  __device__ __forceinline__ SegmentNoise(const NoiseSource& source, int64 n, int64 start, int) {
    static_assert(kSteps == 8 || kSteps == 16);
    const int rank = static_cast<int>(threadIdx.x) % kNoiseGroup;
    uint32 drawn = 0;  // a byte a pair of steps: two bits a neuron, for even and odd step
#pragma unroll
    for (int i = 0; i < kSteps / 8; ++i) {
      const NoiseBlock block = source.draw(n, start / 2 + 4 * i + rank);
#pragma unroll
      for (int j = 0; j < kNoiseGroup; ++j) {
        drawn |= static_cast<uint32>(source.is_analog(block, 0, j)) << (8 * i + 2 * j);
        drawn |= static_cast<uint32>(source.is_analog(block, 1, j)) << (8 * i + 2 * j + 1);
      }
    }
#pragma unroll
    for (int other = 0; other < kNoiseGroup; ++other) {
      const uint32 exchanged = __shfl_sync(kWholeWarp, drawn, other, kNoiseGroup) >> (2 * rank);
#pragma unroll
      for (int i = 0; i < kSteps / 8; ++i) bits_ |= (exchanged >> (8 * i) & 3u) << (8 * i + 2 * other);
    }
  }

  __device__ __forceinline__ bool is_analog(int k, int) const { return bits_ >> k & 1u; }

  // The noise of the steps from start + first on.
  __device__ __forceinline__ SegmentNoise starting_at(int first) const {
    SegmentNoise later = *this;
    later.bits_ >>= first;
    return later;
  }

 private:
  uint32 bits_ = 0;
};

template <int kSteps>
class SegmentNoise<4, kSteps> {
 public:
  __device__ __forceinline__ SegmentNoise(const NoiseSource& source, int64 n, int64 start, int length) {
    static_assert(kSteps == 16);
    steps_0_to_7_ = draw_eight_steps(source, n, start, length);
    steps_8_to_15_ = draw_eight_steps(source, n, start + 8, length - 8);
  }

  __device__ __forceinline__ bool is_analog(int k, int j) const {
    return (k < 8 ? steps_0_to_7_ : steps_8_to_15_) >> (4 * (k % 8) + j) & 1u;
  }

  // The bits of the steps from start + first on, up to the next multiple of 8.
  struct LaterSteps {
    uint32 bits;

    __device__ __forceinline__ bool is_analog(int k, int j) const { return bits >> (4 * k + j) & 1u; }
  };
  // The bits are hidden from the compiler, which would otherwise choose the word and shift it again in each of the
  // unrolled steps.
  __device__ __forceinline__ LaterSteps starting_at(int first) const {
    LaterSteps few = {(first < 8 ? steps_0_to_7_ : steps_8_to_15_) >> (4 * (first % 8))};
    hide_from_compiler(few.bits);
    return few;
  }

 private:
  // Returns the bits of eight steps from `start` on. If `length` is less than 8, the bits of later steps have no
  // meaning. Bit 4 k + j says whether neuron n + j is analog at step start + k.
  static __device__ __forceinline__ uint32 draw_eight_steps(const NoiseSource& source, int64 n, int64 start,
                                                            int length) {
    if (!source.needs_draws()) return source.is_always_analog() ? 0xFFFFFFFFu : 0u;
    NoiseSource local = source;
    local.hide_key_from_compiler();
    uint32 bits = 0;
#pragma unroll 1
    for (int pair = 0; pair < 4 && 2 * pair < length; pair += 2) {
      const auto two = local.draw_two_blocks(n, start / 2 + pair);
      uint32 drawn = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        drawn |= static_cast<uint32>(source.is_analog(two.blocks[i / 8], i / 4 % 2, i % 4)) << i;
      }
      bits |= drawn << (8 * pair);
    }
    return bits;
  }

  uint32 steps_0_to_7_, steps_8_to_15_;
};

// For four steps, the draws themselves are kept in registers. is_analog compares a draw only when it is called.
template <>
class SegmentNoise<4, 4> {
 public:
  __device__ __forceinline__ SegmentNoise(const NoiseSource& source, int64 n, int64 start, int)
      : source_(source), two_(source.draw_two_blocks(n, start / 2)) {}

  __device__ __forceinline__ bool is_analog(int k, int j) const {
    return source_.is_analog(two_.blocks[k / 2], k % 2, j);
  }
  __device__ __forceinline__ const SegmentNoise& starting_at(int) const { return *this; }

 private:
  const NoiseSource& source_;
  NoiseSource::TwoBlocks two_;
};

}  // namespace asgl
