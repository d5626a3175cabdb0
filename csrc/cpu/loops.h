// The loops of the CPU kernels over the neurons of a tile: what runs in vector registers, one clone per instruction
// set. Each is a type for cpu_clones.h. Rows are contiguous and none overlaps another, but for a loop that updates one
// in place.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu_clones.h"
#include "lif_params.h"
#include "philox.h"

namespace asgl::cpu {

// The neuron's parameters in a tile: one value for all, or a row each.
template <class Real>
struct UniformNeuron {
  Neuron<Real> values;
  ASGL_HOST_DEVICE Neuron<Real> operator[](int64) const { return values; }
};

template <class Real>
struct NeuronRows {
  const Real *inverse_width, *decay, *v_threshold, *reset, *input_gain, *input_bias, *input_mean;
  ASGL_HOST_DEVICE Neuron<Real> operator[](int64 i) const {
    return {decay[i], v_threshold[i], reset[i], inverse_width[i], input_gain[i], input_bias[i], input_mean[i]};
  }
};

// The value that an element emits; without noise, no analog one is computed.
template <bool kNoise, Surrogate kSurrogate, class Real>
ASGL_HOST_DEVICE Real emit(Real h, uint16 draw, uint32 analog_below, const Neuron<Real>& neuron,
                           bool strict_threshold) {
  return kNoise ? fire<kSurrogate>(h, draw < analog_below, neuron, strict_threshold)
                : hard_spike(h - neuron.v_threshold, strict_threshold);
}

template <class Real, Surrogate kSurrogate, bool kHardReset, class Neurons>
struct StepLoop {
  struct Args {
    Neurons neurons;
    NeuronOptions<Real> options;
    uint32 analog_below;
    int64 length;
    const Real* x;
    const Real* v;
    const uint16* draws;
    Real* h;
    Real* s;
    Real* v_next;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) { args.analog_below > 0 ? loop<true>(args) : loop<false>(args); }

  template <bool kNoise>
  static ASGL_HOST_DEVICE void loop(const Args& args) {
    const Neurons neurons = args.neurons;
    const NeuronOptions<Real> options = args.options;
    const uint32 analog_below = args.analog_below;
    const Real* x = args.x;
    const Real* v = args.v;
    const uint16* draws = args.draws;
    Real* h_row = args.h;
    Real* s_row = args.s;
    Real* v_next = args.v_next;
    const int64 length = args.length;
#pragma GCC ivdep
    for (int64 i = 0; i < length; ++i) {
      const Neuron<Real> neuron = neurons[i];
      const Real h = charge<Input::kGeneral>(x[i], v[i], neuron, options.v_rest);
      const Real s =
          emit<kNoise, kSurrogate>(h, kNoise ? draws[i] : uint16(0), analog_below, neuron, options.strict_threshold);
      h_row[i] = h;
      s_row[i] = s;
      v_next[i] = reset<kHardReset>(h, s, neuron);
    }
  }
};

template <class Real, Surrogate kSurrogate, bool kHardReset, class Neurons>
struct AdjointLoop {
  struct Args {
    Neurons neurons;
    NeuronOptions<Real> options;
    int64 length;
    bool carried;
    const Real* g;
    const Real* gh;
    const Real* h;
    const Real* s;
    Real* dv;  // of v[t] on entry, of v[t-1] on return
    Real* dy;
    Real* dh;
    Real* dx;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const Neurons neurons = args.neurons;
    const NeuronOptions<Real> options = args.options;
    const bool carried = args.carried;
    const Real* g = args.g;
    const Real* gh = args.gh;
    const Real* h = args.h;
    const Real* s = args.s;
    Real* dv = args.dv;
    Real* dy = args.dy;
    Real* dh = args.dh;
    Real* dx = args.dx;
    const int64 length = args.length;
#pragma GCC ivdep
    for (int64 i = 0; i < length; ++i) {
      const Neuron<Real> neuron = neurons[i];
      const StepGradient<Real> step =
          step_adjoint<kSurrogate, kHardReset>(g[i], gh[i], dv[i], h[i], s[i], carried, neuron, options);
      dy[i] = step.dy;
      dh[i] = step.dh;
      dx[i] = neuron.input_gain * step.dh;
      dv[i] = neuron.decay * step.dh;
    }
  }
};

// Rows that will be read and written next. Hardware prefetchers stop at page boundaries, and a row of a tile is about a
// page; asked for by hand, a few lines at a time, they arrive while this row is computed.
struct Ahead {
  const char* read;   // null: nothing
  const char* write;  // null: nothing
  int64 element_size;
};

constexpr int64 kNeuronsPerFetch = 128;

// Calls f(begin, end) for stretches of kNeuronsPerFetch neurons, having asked for as much of the rows ahead.
template <class F>
ASGL_HOST_DEVICE void for_each_fetch(const Ahead& ahead, int64 length, F&& f) {
  constexpr int64 kCacheLine = 64;
  for (int64 begin = 0; begin < length; begin += kNeuronsPerFetch) {
    const int64 end = begin + kNeuronsPerFetch < length ? begin + kNeuronsPerFetch : length;
    if (ahead.read != nullptr) {
      for (int64 i = begin * ahead.element_size; i < end * ahead.element_size; i += kCacheLine) {
        __builtin_prefetch(ahead.read + i, 0);
      }
    }
    if (ahead.write != nullptr) {
      for (int64 i = begin * ahead.element_size; i < end * ahead.element_size; i += kCacheLine) {
        __builtin_prefetch(ahead.write + i, 1);
      }
    }
    f(begin, end);
  }
}

// The common case: the same parameters for all neurons, the plain input current, and nothing wanted but spikes, or but
// the gradients of x and width. These loops compute and store as little as they can.
template <class Real, Surrogate kSurrogate, bool kHardReset, bool kSpikes>
struct UniformStepLoop {
  struct Args {
    Neuron<Real> neuron;
    NeuronOptions<Real> options;
    uint32 analog_below;
    int64 length;
    const Real* x;
    const uint16* draws;
    Real* v;    // before the step on entry, after it on return
    Real* out;  // s with kSpikes, else h
    Ahead ahead;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) { args.analog_below > 0 ? loop<true>(args) : loop<false>(args); }

  template <bool kNoise>
  static ASGL_HOST_DEVICE void loop(const Args& args) {
    const Neuron<Real> neuron = args.neuron;
    const NeuronOptions<Real> options = args.options;
    const uint32 analog_below = args.analog_below;
    const Real* x = args.x;
    const uint16* draws = args.draws;
    Real* v = args.v;
    Real* out = args.out;
    for_each_fetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (int64 i = begin; i < end; ++i) {
        const Real h = charge<Input::kPlain>(x[i], v[i], neuron, options.v_rest);
        const Real s =
            emit<kNoise, kSurrogate>(h, kNoise ? draws[i] : uint16(0), analog_below, neuron, options.strict_threshold);
        out[i] = kSpikes ? s : h;
        v[i] = reset<kHardReset>(h, s, neuron);
      }
    });
  }
};

template <class Real, Surrogate kSurrogate, bool kHardReset>
struct UniformAdjointLoop {
  struct Args {
    Neuron<Real> neuron;
    NeuronOptions<Real> options;
    uint32 analog_below;
    int64 length;
    bool carried;
    const Real* g;
    const Real* h;
    const uint16* draws;
    Real* dv;     // of v[t] on entry, of v[t-1] on return
    Real* width;  // adds up dy * u
    Real* dx;
    Ahead ahead;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) { args.analog_below > 0 ? loop<true>(args) : loop<false>(args); }

  template <bool kNoise>
  static ASGL_HOST_DEVICE void loop(const Args& args) {
    const Neuron<Real> neuron = args.neuron;
    const NeuronOptions<Real> options = args.options;
    const uint32 analog_below = args.analog_below;
    const bool carried = args.carried;
    const Real* g = args.g;
    const Real* h = args.h;
    const uint16* draws = args.draws;
    Real* dv = args.dv;
    Real* width = args.width;
    Real* dx = args.dx;
    for_each_fetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (int64 i = begin; i < end; ++i) {
        const Real s = emit<kNoise, kSurrogate>(h[i], kNoise ? draws[i] : uint16(0), analog_below, neuron,
                                                options.strict_threshold);
        const StepGradient<Real> step =
            step_adjoint<kSurrogate, kHardReset>(g[i], NoGradient{}, dv[i], h[i], s, carried, neuron, options);
        width[i] += step.dy * (h[i] - neuron.v_threshold);
        dx[i] = step.dh;
        dv[i] = neuron.decay * step.dh;
      }
    });
  }
};

// One value for all lanes where row is null.
template <class Real>
struct Operand {
  const Real* row;
  Real value;
};

// The parameters of the input for some neurons: one value each for all, or rows that repeat after `period` neurons.
// kRows says which for all three.
template <class Real, bool kRows>
struct InputParameters {
  Operand<Real> gain, bias, mean;
  int64 period;

  ASGL_HOST_DEVICE Neuron<Real> operator[](int64 i) const {
    Neuron<Real> neuron{};
    neuron.input_gain = kRows ? gain.row[i] : gain.value;
    neuron.input_bias = kRows ? bias.row[i] : bias.value;
    neuron.input_mean = kRows ? mean.row[i] : mean.value;
    return neuron;
  }
};

// to[i] = input_gain * (x[i] - input_mean) + input_bias
template <class Real, bool kRows>
struct InputCurrentLoop {
  struct Args {
    const Real* x;
    InputParameters<Real, kRows> parameters;
    Real* to;
    int64 length;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const InputParameters<Real, kRows> parameters = args.parameters;
    for (int64 first = 0; first < args.length; first += parameters.period) {
      const Real* x = args.x + first;
      Real* to = args.to + first;
      const int64 length = args.length - first < parameters.period ? args.length - first : parameters.period;
#pragma GCC ivdep
      for (int64 i = 0; i < length; ++i) to[i] = input_current(x[i], parameters[i]);
    }
  }
};

// Its adjoint: dx[i] = input_gain * dh[i], and what is to be added up for the gradients of gain and bias, `period` sums
// of each.
template <class Real, bool kRows>
struct InputCurrentAdjointLoop {
  struct Args {
    const Real* x;
    const Real* dh;
    InputParameters<Real, kRows> parameters;
    Real *gain_sum, *bias_sum;
    Real* dx;
    int64 length;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const InputParameters<Real, kRows> parameters = args.parameters;
    Real* gain_sum = args.gain_sum;
    Real* bias_sum = args.bias_sum;
    for (int64 first = 0; first < args.length; first += parameters.period) {
      const Real* x = args.x + first;
      const Real* dh = args.dh + first;
      Real* dx = args.dx + first;
      const int64 length = args.length - first < parameters.period ? args.length - first : parameters.period;
#pragma GCC ivdep
      for (int64 i = 0; i < length; ++i) {
        const Neuron<Real> neuron = parameters[i];
        gain_sum[i] += dh[i] * (x[i] - neuron.input_mean);
        bias_sum[i] += dh[i];
        dx[i] = neuron.input_gain * dh[i];
      }
    }
  }
};

struct NoiseLoop {
  struct Args {
    NoiseKey key;
    uint64 first_group;
    int64 groups;
    uint32 step_pair;
    uint64* even;
    uint64* odd;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const NoiseKey key = args.key;
    const uint64 first_group = args.first_group;
    const uint32 step_pair = args.step_pair;
    uint64* even = args.even;
    uint64* odd = args.odd;
    const int64 groups = args.groups;
#pragma GCC ivdep
    for (int64 i = 0; i < groups; ++i) {
      const NoiseBlock block = noise_block(first_group + static_cast<uint64>(i), step_pair, key);
      even[i] = block.draws[0];
      odd[i] = block.draws[1];
    }
  }
};

constexpr int64 kNoiseGroups = 32;

#if defined(__x86_64__)
// The same numbers by the 32 x 32 -> 64 bit product of vectors, which GCC does not find in the loop above. They come in
// whole vectors: the rows must have room for a multiple of kNoiseGroups.
template <>
__attribute__((target("avx2"))) inline void run_avx2<NoiseLoop>(const NoiseLoop::Args& args) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0),
                multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF), lanes = _mm256_set_epi64x(3, 2, 1, 0);
  for (int64 i = 0; i < args.groups; i += 4) {
    const __m256i group = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64>(args.first_group) + i), lanes);
    __m256i c0 = group, c1 = _mm256_srli_epi64(group, 32);
    __m256i c2 = _mm256_set1_epi64x(args.step_pair), c3 = _mm256_set1_epi64x(args.key.offset);
    uint32 key0 = args.key.seed_low, key1 = args.key.seed_high;
    for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
      const __m256i product0 = _mm256_mul_epu32(multiplier0, c0), product1 = _mm256_mul_epu32(multiplier1, c2);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1), _mm256_set1_epi64x(key0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3), _mm256_set1_epi64x(key1));
      c1 = product1;
      c3 = product0;
    }
    const __m256i even = _mm256_or_si256(_mm256_and_si256(c0, low), _mm256_slli_epi64(c1, 32));
    const __m256i odd = _mm256_or_si256(_mm256_and_si256(c2, low), _mm256_slli_epi64(c3, 32));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.even + i), even);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.odd + i), odd);
  }
}

// Four chains at a time: the ten rounds of one depend on each other, and alone would leave the processor waiting.
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

// sum[i] += factor * (a[i] * (b[i] - c[i]))
template <class Real>
struct AccumulateLoop {
  struct Args {
    int64 length;
    Real factor;
    const Real* a;
    Operand<Real> b, c;
    Real* sum;
  };

  template <class B, class C>
  static ASGL_HOST_DEVICE void loop(const Args& args, B b, C c) {
    const Real factor = args.factor;
    const Real* a = args.a;
    Real* sum = args.sum;
    const int64 length = args.length;
#pragma GCC ivdep
    for (int64 i = 0; i < length; ++i) {
      sum[i] += factor * (a[i] * (b(i) - c(i)));
    }
  }

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const Real* b_row = args.b.row;
    const Real* c_row = args.c.row;
    const Real b_value = args.b.value, c_value = args.c.value;
    const auto b_lane = [=](int64 i) __attribute__((always_inline)) { return b_row[i]; };
    const auto c_lane = [=](int64 i) __attribute__((always_inline)) { return c_row[i]; };
    const auto b_same = [=](int64) __attribute__((always_inline)) { return b_value; };
    const auto c_same = [=](int64) __attribute__((always_inline)) { return c_value; };
    if (b_row != nullptr) {
      c_row != nullptr ? loop(args, b_lane, c_lane) : loop(args, b_lane, c_same);
    } else {
      c_row != nullptr ? loop(args, b_same, c_lane) : loop(args, b_same, c_same);
    }
  }
};

// Eight interleaved sums: a fixed order of additions that needs no licence to reorder them.
template <class Real>
struct SumLoop {
  struct Args {
    const Real* row;
    int64 length;
    double* sum;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const Real* row = args.row;
    double lanes[8] = {};
    int64 i = 0;
    for (; i + 8 <= args.length; i += 8) {
      for (int lane = 0; lane < 8; ++lane) {
        lanes[lane] += static_cast<double>(row[i + lane]);
      }
    }
    for (int lane = 0; i < args.length; ++i, ++lane) {
      lanes[lane] += static_cast<double>(row[i]);
    }
    *args.sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  }
};

// total[i] += row[i]
template <class Real>
struct AddLoop {
  struct Args {
    const Real* row;
    double* total;
    int64 length;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const Real* row = args.row;
    double* total = args.total;
    const int64 length = args.length;
#pragma GCC ivdep
    for (int64 i = 0; i < length; ++i) total[i] += static_cast<double>(row[i]);
  }
};

template <class From, class To>
struct ConvertLoop {
  struct Args {
    const From* from;
    To* to;
    int64 length;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const From* from = args.from;
    To* to = args.to;
    const int64 length = args.length;
#pragma GCC ivdep
    for (int64 i = 0; i < length; ++i) {
      to[i] = from_real<To>(to_real(from[i]));
    }
  }
};

// to[i] = a[i] * b[i], or a[i] * b.value
template <class Real>
struct MultiplyLoop {
  struct Args {
    const Real* a;
    Operand<Real> b;
    Real* to;
    int64 length;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const Real* a = args.a;
    const Real* b = args.b.row;
    Real* to = args.to;
    const Real value = args.b.value;
    const int64 length = args.length;
    if (b != nullptr) {
#pragma GCC ivdep
      for (int64 i = 0; i < length; ++i) to[i] = a[i] * b[i];
    } else {
#pragma GCC ivdep
      for (int64 i = 0; i < length; ++i) to[i] = a[i] * value;
    }
  }
};

}  // namespace asgl::cpu
