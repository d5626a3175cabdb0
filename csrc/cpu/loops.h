// Vectorised loops of the CPU kernels, most of them over the neurons of a tile. Each loop is a type that cpu/clones.h
// compiles for each instruction set. Rows are contiguous and do not overlap, except where a loop updates a row in
// place.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "cpu/clones.h"
#include "math/adaptive.h"
#include "params/neuron.h"

namespace asgl::cpu {

constexpr int64 kTile = 1024;  // neurons of a tile, and elements between rows

// The neurons of a tile that all have the same value of each parameter.
template <class Real>
struct UniformNeuron {
  Neuron<Real> values;
  ASGL_HOST_DEVICE const Neuron<Real>& operator[](int64) const { return values; }
};

// The neurons of a tile, with a row of values for each parameter.
template <class Real>
struct NeuronRows {
  Neuron<const Real*> row;
  ASGL_HOST_DEVICE Neuron<Real> operator[](int64 i) const {
    return {row.decay[i],      row.v_threshold[i], row.reset[i],     row.inverse_width[i],
            row.input_gain[i], row.input_bias[i],  row.input_mean[i]};
  }
};

// Like NeuronRows, but without rows for input_gain, input_bias and input_mean, which settled loops do not read.
template <class Real>
struct SettledRows {
  const Real *decay, *v_threshold, *reset, *inverse_width;

  ASGL_HOST_DEVICE Neuron<Real> operator[](int64 i) const {
    return {decay[i], v_threshold[i], reset[i], inverse_width[i], Real(1), Real(0), Real(0)};
  }
};

// The rows that a loop prefetches, a few cache lines at a time, before they are needed. Hardware prefetchers stop at
// page boundaries, and a row of kTile float32 values is as long as a page of 4 KiB. A null pointer stands for no row.
struct PrefetchRows {
  int64 element_size;
  const char* rows[4];  // read, then written
  int64 stride = 0;     // elements between steps, for loops over steps

  ASGL_HOST_DEVICE bool empty() const { return !rows[0] && !rows[1] && !rows[2] && !rows[3]; }
};

// Prefetches `count` elements of each row of step k, from element `first` on. Loops over a single step pass k = 0.
ASGL_HOST_DEVICE void prefetch_block(const PrefetchRows& ahead, int64 k, int64 first, int64 count) {
  constexpr int64 kCacheLine = 64;
  const int64 begin = (k * ahead.stride + first) * ahead.element_size, bytes = count * ahead.element_size;
  for (const char* row : ahead.rows) {
    if (row == nullptr) continue;
    for (int64 i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(row + begin + i);
  }
}

constexpr int64 kNeuronsPerPrefetch = 128;

// Divides the neurons into blocks of kNeuronsPerPrefetch. For each block, prefetches the same range of the rows `ahead`
// and calls f(begin, end). If there is nothing to prefetch, calls f once for all neurons, because each call of f begins
// with some 40 instructions.
template <class F>
ASGL_HOST_DEVICE void for_each_prefetch(const PrefetchRows& ahead, int64 length, F&& f) {
  const int64 each = ahead.empty() ? length : kNeuronsPerPrefetch;
  for (int64 begin = 0; begin < length; begin += each) {
    const int64 end = begin + each < length ? begin + each : length;
    prefetch_block(ahead, 0, begin, end - begin);
    f(begin, end);
  }
}

// Calls f(model). For adaptive neurons computed in float32, f is compiled for each combination of the adaptation and
// the reset, so that these rules are constants and need no masks. With AVX-512, 32 neurons then take 71 to 88
// instructions in forward instead of 99, and 96 to 128 in backward instead of 155.
template <class Model, class Real, class F>
ASGL_HOST_DEVICE void with_constant_rules(const LIFByOptions<Real>& options, F&& f) {
  if constexpr (Model::kHasAdaptation && sizeof(Real) == sizeof(float)) {
    Model model = Model::from_options(options);
    const auto with_adaptation = [&](uint8 adaptation) __attribute__((always_inline)) {
      model.adaptation = adaptation;
      model.hard_reset = !model.adapts_reset();
      if (model.hard_reset && options.hard_reset) return f(model);
      model.hard_reset = false;
      f(model);
    };
    if (model.adapts_current()) return with_adaptation(kAdaptsCurrent);
    if (!model.adapts_reset()) return with_adaptation(kAdaptsThreshold);
    model.adapts_threshold() ? with_adaptation(kAdaptsThreshold | kAdaptsReset) : with_adaptation(kAdaptsReset);
  } else {
    f(Model::from_options(options));
  }
}

// Whether an element is analog, given its draw of 16 random bits. The comparison is signed: SSE2 and AVX2 have no
// less-than instruction for unsigned integers.
ASGL_HOST_DEVICE bool is_analog(uint16 draw, uint32 analog_below) { return draw < static_cast<int>(analog_below); }

// The number of versions of a loop that are compiled for a model. If the model reads the surrogate at run time, each
// surrogate has its own version, because a loop with a branch is not vectorised. Adaptive neurons do not support the
// last surrogate, kInteger.
static_assert(static_cast<int>(Surrogate::kInteger) == kNumSurrogates - 1);
template <class Model>
constexpr int kSurrogateLoops = Model::kHasAdaptation ? static_cast<int>(Surrogate::kInteger)
                                : Model::kOnlyGeneral ? kNumSurrogates
                                                      : 1;

// Computes one step: the potential h before reset, the output s and the next states, from x and the states. If the
// model has two states, its function `step` computes all of these, as in AdaptiveLIF.
template <class Real, class Model, class Neurons>
struct StepLoop {
  struct Args {
    Neurons neurons;
    LIFByOptions<Real> options;
    uint32 analog_below;
    int64 length;
    const Real* x;
    const uint16* draws;
    Real *v, *next_v, *h, *s;
    PrefetchRows ahead;
    const Real* second;  // the second state, of models that have one
    Real* next_second;
    bool compared;  // whether to store compared_potential as h, for models with a second state
  };

  // Runs the loop that was compiled for the surrogate of the call. Without noise (analog_below = 0), the surrogate
  // matters only if it is kInteger. Adaptive neurons always run the loop with kNoise, in which no element is analog if
  // analog_below is 0.
  template <int kId = 0>
  static ASGL_HOST_DEVICE void run(Args args) {
    if constexpr (kId + 1 < kSurrogateLoops<Model>) {
      const bool used = args.analog_below > 0 || args.options.counts_spikes();
      if (used && static_cast<int>(args.options.surrogate) != kId) return run<kId + 1>(args);
    }
    args.options.surrogate = static_cast<Surrogate>(kId);  // unused by LIF
    if constexpr (!Model::kHasAdaptation && (kId == 0 || static_cast<Surrogate>(kId) == Surrogate::kInteger)) {
      if (args.analog_below == 0) return run_loop<false>(args);
    }
    run_loop<true>(args);
  }

  // Computes all neurons. Without kNoise no element is analog.
  template <bool kNoise>
  static ASGL_HOST_DEVICE void run_loop(Args args) {
    const Firing<Real> firing(args.options);
    with_constant_rules<Model>(args.options, [&](const auto& model) __attribute__((always_inline)) {
      for_each_prefetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
        for (int64 i = begin; i < end; ++i) {
          const Neuron<Real>& neuron = args.neurons[i];
          const bool analog = kNoise && is_analog(args.draws[i], args.analog_below);
          Real v = args.v[i], h, s;
          static_assert(Model::kNumStates <= 2);
          if constexpr (Model::kNumStates == 2) {
            const Real second = args.second[i];
            Real next_second = second;
            const Real charged = model.step(args.x[i], analog, neuron, firing, v, next_second, s);
            h = choose(args.compared, model.compared_potential(charged, second), charged);
            args.next_second[i] = next_second;
          } else {
            const Real c = input_current<Input::kGeneral>(args.x[i], neuron);
            h = Model::template charge<Input::kGeneral>(c, v, neuron, args.options);
            s = model.fire(h, analog, neuron, firing);
            v = model.reset(h, s, neuron);
          }
          args.h[i] = h;
          args.s[i] = s;
          args.next_v[i] = v;
        }
      });
    });
  }
};

// Which parameters' gradients AdjointLoop itself sums:
//   kNone        none; AdjointLoop stores the terms of the sums as rows
//   kWidth       the width
//   kAdaptation  the width and the parameters of the adaptation
//   kAll         all parameters of adaptive neurons
//   kRecurrent   width, decay, threshold and reset of recurrent neurons
// With kRecurrent, Args::h is the potential that is compared with v_threshold.
enum class Sums { kNone, kWidth, kAdaptation, kAll, kRecurrent };

// Computes the adjoint of a step: the gradients of x and the states, from the gradients of s, h and the next states.
template <class Real, class Model, class Neurons, Sums kSums>
struct AdjointLoop {
  struct Args {
    Neurons neurons;
    LIFByOptions<Real> options;
    int64 length;
    bool carried;                // whether v after the step has a gradient, see LIF::step_adjoint
    const Real *g, *gh, *h, *s;  // g and gh: the gradients of s and h
    Real* dv;                    // the gradient of v after the step on entry, before it on return
    Real *d_reset, *distance, *dy, *dh, *dx;
    PrefetchRows ahead;
    const Real *v, *second;  // the states before the step, the second of models that have one
    Real* d_second;          // the gradient of the second state, as dv
    Real* sums;              // [kNumParameters, sums_stride]
    int64 sums_stride;
  };

  // Runs the loop that was compiled for the surrogate of the call.
  template <int kId = 0>
  static ASGL_HOST_DEVICE void run(Args args) {
    if constexpr (kId + 1 < kSurrogateLoops<Model>) {
      if (static_cast<int>(args.options.surrogate) != kId) return run<kId + 1>(args);
    }
    args.options.surrogate = static_cast<Surrogate>(kId);  // unused by LIF
    // A constant stride needs no register.
    const int64 stride = kSums == Sums::kRecurrent ? args.sums_stride : kTile;
    with_constant_rules<Model>(args.options, [&](const auto& model) __attribute__((always_inline)) {
      for_each_prefetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
        for (int64 i = begin; i < end; ++i) {
          const auto sum = [&](ParameterId id)
                               __attribute__((always_inline)) -> Real& { return args.sums[id * stride + i]; };
          const Neuron<Real>& neuron = args.neurons[i];
          const Real h = args.h[i], s = args.s[i];
          Real dv = args.dv[i];
          StepGradient<Real> step;
          Real distance, d_reset, d_second;
          if constexpr (Model::kNumStates == 2) {
            constexpr bool kCompared = kSums == Sums::kRecurrent;
            const Real second = args.second[i];
            d_second = args.d_second[i];
            const Real compared = kCompared ? h : model.compared_potential(h, second);
            const Real charged = kCompared ? model.charged_potential(h, second) : h;
            if constexpr (Model::kHasAdaptation && (kSums == Sums::kAdaptation || kSums == Sums::kAll)) {
              const Real v = model.potential_after_reset(h, s, model.with_adapted_reset(neuron, second));
              sum(kAdaptDecay) += keep_if(args.carried, d_second * second);
              sum(kAdaptPotential) += keep_if(args.carried, d_second * (v - args.options.v_rest));
              sum(kAdaptSpike) += keep_if(args.carried, d_second * s);
            }
            const auto gradient =
                model.adjoint(args.g[i], args.gh[i], charged, compared, s, second, args.carried, neuron, dv, d_second);
            step = gradient.step;
            distance = gradient.distance;
            d_reset = gradient.reset;
          } else {
            dv = model.floor_adjoint(h, s, neuron, dv);
            d_reset = model.reset_parameter_gradient(dv, s);
            distance = model.distance(h, neuron);
            const Real ds = model.spike_gradient(args.g[i], h, args.carried && !args.options.detach_reset, neuron, dv);
            step = model.step_adjoint(ds, args.gh[i], h, s, args.carried, neuron, args.options, dv);
          }
          args.dx[i] = Model::kHasAdaptation ? step.dc : neuron.input_gain * step.dc;
          if constexpr (Model::kNumStates == 2) args.d_second[i] = d_second;
          args.dv[i] = dv;
          if constexpr (kSums == Sums::kNone) {
            args.d_reset[i] = d_reset;
            args.distance[i] = distance;
            args.dy[i] = step.dy;
            args.dh[i] = step.dh;
          } else {
            sum(kWidth) += step.dy * distance;
          }
          if constexpr (kSums >= Sums::kAll) {
            sum(kThreshold) -= step.dy * neuron.inverse_width;
            sum(kDecay) += step.dh * (args.v[i] - args.options.v_rest);
            sum(kReset) += keep_if(args.carried, d_reset);
          }
        }
      });
    });
  }
};

// The number of neurons of a block. A settled loop computes all its steps for one block before the next block, so that
// the block's states and potentials stay in the L1 cache. Blocks of 64 or 256 neurons are slower.
constexpr int64 kBlock = 128;

// The rows of adjacent steps of a tile: the row of step k begins at first + k * stride.
template <class Element>
struct StepRows {
  Element* first;
  int64 stride;

  ASGL_HOST_DEVICE Element* operator[](int64 k) const { return first + k * stride; }
};

// Calls f(first, count) for each block of `block` neurons. The last block may have fewer. If a block has kBlock
// neurons, `count` is a compile-time constant, so that the compiler can unroll loops.
template <class F>
ASGL_HOST_DEVICE void for_each_block(int64 length, int64 block, F&& f) {
  for (int64 first = 0; first < length; first += block) {
    const int64 count = length - first < block ? length - first : block;
    count == kBlock ? f(first, std::integral_constant<int64, kBlock>{}) : f(first, count);
  }
}

// A function that writes a block to memory and bypasses the cache. Ordinary stores would first read each cache line.
// With AVX-512, each streaming store writes a whole cache line. With stores of parts of a line, a layer takes up to 1.3
// times as long.
using StreamingStore = void (*)(float* to, const float* block, int64 count);

#if defined(__x86_64__)
// The streaming stores for each instruction set.
inline void stream_baseline(float* to, const float* block, int64 count) {
  for (int64 i = 0; i < count; i += 4) _mm_stream_ps(to + i, _mm_load_ps(block + i));
}
__attribute__((target("avx2"))) inline void stream_avx2(float* to, const float* block, int64 count) {
  for (int64 i = 0; i < count; i += 8) _mm256_stream_ps(to + i, _mm256_load_ps(block + i));
}
ASGL_TARGET_AVX512 inline void stream_avx512(float* to, const float* block, int64 count) {
  for (int64 i = 0; i < count; i += 16) _mm512_stream_ps(to + i, _mm512_load_ps(block + i));
}
// The streaming store for instruction_set(), or null on processors other than x86-64.
inline StreamingStore streaming_store() {
  const InstructionSet set = instruction_set();
  return set == InstructionSet::kAvx512 ? stream_avx512 : set == InstructionSet::kAvx2 ? stream_avx2 : stream_baseline;
}
// Makes this thread's streaming stores visible to other threads. Call it before another thread reads what was stored.
inline void fence_streaming_stores() { _mm_sfence(); }
#else
inline StreamingStore streaming_store() { return nullptr; }
inline void fence_streaming_stores() {}
#endif

// The loop of the settled forward kernels (cpu/neuron_settled.cpp). For each block of a tile, it computes the spikes of
// all given steps from rows of the input current.
template <class Real, class Model, class Neurons>
struct SettledStepLoop {
  struct Args {
    Neurons neurons;
    NeuronOptions<Real> options;
    uint32 analog_below;
    int64 length, block, steps;
    StepRows<const Real> current;
    StepRows<const uint16> draws;
    Real* v;
    StepRows<Real> s;
    StreamingStore stream;  // null: s is stored in the cache; else blocks have kBlock neurons
    PrefetchRows ahead;
  };

  static ASGL_HOST_DEVICE void run(Args args) { args.analog_below > 0 ? run_loop<true>(args) : run_loop<false>(args); }

  // Computes all blocks. Without kNoise no element is analog.
  template <bool kNoise>
  static ASGL_HOST_DEVICE void run_loop(Args args) {
    const Firing<Real> firing(args.options);
    alignas(64) Real streamed[kBlock];
    for_each_block(args.length, args.block, [&](int64 first, auto count) __attribute__((always_inline)) {
      Real* v = args.v + first;
      for (int64 k = 0; k < args.steps; ++k) {
        const Real* current = args.current[k] + first;
        const uint16* draws = args.draws[k] + first;
        Real* s = args.stream == nullptr ? args.s[k] + first : streamed;
        prefetch_block(args.ahead, k, first, count);
#pragma GCC ivdep
        for (int64 i = 0, end = count; i < end; ++i) {
          const Neuron<Real>& neuron = args.neurons[first + i];
          const Real h = Model::template charge<Input::kPlain>(current[i], v[i], neuron, args.options);
          s[i] = Model::fire(h, kNoise && is_analog(draws[i], args.analog_below), neuron, firing);
          v[i] = Model::reset(h, s[i], neuron);
        }
        if (args.stream != nullptr) args.stream(args.s[k] + first, streamed, count);
      }
    });
  }
};

// The parameters whose gradients SettledAdjointLoop sums. kNone: none; kWidth: the width; kAll: width, decay, threshold
// and the amount of a soft reset.
enum class SettledSums { kNone, kWidth, kAll };

// The stored slopes of the neurons of a block. If they are not stored, each element is NoSlope, and the adjoint
// computes the slope.
template <class Real, bool kKept>
struct KeptSlopes {
  const Real* row;

  ASGL_HOST_DEVICE auto operator[](int64 i) const {
    if constexpr (kKept) {
      return row[i];
    } else {
      return NoSlope{};
    }
  }
};

// The loop of the settled backward kernels. For each block of a tile, it computes the potentials of all steps of a
// segment, then the gradients. With noise, compute_potentials also stores the spikes, and for surrogates with kHasSlope
// the slopes. This saves time: a sigmoid and its slope, for example, share an exp. `d_current` may be the same rows as
// `current`.
template <class Real, class Model, class Neurons, SettledSums kSums>
struct SettledAdjointLoop {
  struct Args {
    Neurons neurons;
    NeuronOptions<Real> options;
    uint32 analog_below;
    int64 length, steps;
    bool carried;
    StepRows<const Real> current;
    StepRows<const uint16> draws;
    StepRows<Real> v;        // before each step, and after the last
    Real *h, *s, *slope;     // [steps, kBlock], of a block
    StepRows<const Real> g;  // the gradient of s
    Real* dv;                // the gradient of v after the last step on entry, before the first on return
    Real *width, *decay, *threshold, *reset;  // rows of the sums of the parameters' gradients
    StepRows<Real> d_current;
    StreamingStore stream;  // null: d_current is stored in the cache; else blocks have kBlock neurons
    PrefetchRows input_ahead, gradients_ahead;
  };

  static ASGL_HOST_DEVICE void run(Args args) { args.analog_below > 0 ? run_loop<true>(args) : run_loop<false>(args); }

  // Computes all blocks. Without kNoise no element is analog.
  template <bool kNoise>
  static ASGL_HOST_DEVICE void run_loop(Args args) {
    for_each_block(args.length, kBlock, [&](int64 first, auto count) __attribute__((always_inline)) {
      compute_potentials<kNoise>(args, first, count);
      compute_gradients<kNoise>(args, first, count);
    });
  }

  // Computes the potentials of all steps, for `count` neurons from `first` on.
  template <bool kNoise, class Count>
  static ASGL_HOST_DEVICE void compute_potentials(const Args& args, int64 first, Count count) {
    const Firing<Real> firing(args.options);
    for (int64 k = 0; k < args.steps; ++k) {
      const Real *current = args.current[k] + first, *v = args.v[k] + first;
      const uint16* draws = args.draws[k] + first;
      Real *h = args.h + k * kBlock, *kept_s = args.s + k * kBlock, *slope = args.slope + k * kBlock;
      Real* next_v = args.v[k + 1] + first;
      prefetch_block(args.input_ahead, k, first, count);
#pragma GCC ivdep
      for (int64 i = 0, end = count; i < end; ++i) {
        const Neuron<Real>& neuron = args.neurons[first + i];
        const Real potential = Model::template charge<Input::kPlain>(current[i], v[i], neuron, args.options);
        const Real s = Model::fire(potential, kNoise && is_analog(draws[i], args.analog_below), neuron, firing);
        if constexpr (kNoise && Model::kHasSlope) slope[i] = Model::slope(potential, neuron);
        if constexpr (kNoise) kept_s[i] = s;
        next_v[i] = Model::reset(potential, s, neuron);
        h[i] = potential;
      }
    }
  }

  // Computes the gradients of all steps, from the last to the first, for `count` neurons from `first` on.
  template <bool kNoise, class Count>
  static ASGL_HOST_DEVICE void compute_gradients(const Args& args, int64 first, Count count) {
    const Firing<Real> firing(args.options);
    alignas(64) Real streamed[kBlock];
    Real *gradient = args.dv + first, *width = args.width + first;
    Real *decay = args.decay + first, *threshold = args.threshold + first, *reset = args.reset + first;
    for (int64 k = args.steps - 1; k >= 0; --k) {
      const Real *g = args.g[k] + first, *v = args.v[k] + first;
      const Real *h = args.h + k * kBlock, *kept_s = args.s + k * kBlock;
      const KeptSlopes<Real, kNoise && Model::kHasSlope> slope = {args.slope + k * kBlock};
      Real* d_current = args.stream == nullptr ? args.d_current[k] + first : streamed;
      prefetch_block(args.gradients_ahead, k, first, count);
      const auto compute_step = [&](auto carried, auto through_reset) __attribute__((always_inline)) {
#pragma GCC ivdep
        for (int64 i = 0, end = count; i < end; ++i) {
          const Neuron<Real>& neuron = args.neurons[first + i];
          const Real s = kNoise ? kept_s[i] : Model::fire(h[i], false, neuron, firing);
          Real dv = gradient[i];
          if constexpr (kSums == SettledSums::kAll && !Model::kResetsHard) reset[i] -= keep_if(carried, dv * s);
          const Real ds = Model::spike_gradient(g[i], h[i], through_reset, neuron, dv);
          const StepGradient<Real> step =
              Model::step_adjoint(ds, NoGradient{}, h[i], s, carried, neuron, args.options, dv, slope[i]);
          if constexpr (kSums != SettledSums::kNone) width[i] += step.dy * Model::distance(h[i], neuron);
          if constexpr (kSums == SettledSums::kAll) {
            threshold[i] -= step.dy * neuron.inverse_width;
            decay[i] += step.dh * v[i];
          }
          d_current[i] = step.dc;
          gradient[i] = dv;
        }
      };
      // If carried and through_reset are both true, they are passed as constants, so that the loop needs no masks. Both
      // are true at every step, except under detach_reset and at the last step of a sequence whose v_last has no
      // gradient.
      const bool carried = args.carried || k + 1 < args.steps, through_reset = carried && !args.options.detach_reset;
      through_reset ? compute_step(std::true_type{}, std::true_type{}) : compute_step(carried, false);
      if (args.stream != nullptr) args.stream(args.d_current[k] + first, streamed, count);
    }
  }
};

// One value per neuron, in `row`. If `row` is null, all neurons have the one `value`.
template <class Real>
struct Operand {
  const Real* row;
  Real value;

  template <bool kRow>
  ASGL_HOST_DEVICE Real at(int64 i) const {
    return kRow ? row[i] : value;
  }
};

// The gain, bias and mean of the input. Each is one value, or with kRows a row of `period` values that repeats.
template <class Real, bool kRows>
struct InputParameters {
  Operand<Real> gain, bias, mean;
  int64 period;

  ASGL_HOST_DEVICE Neuron<Real> operator[](int64 i) const {
    Neuron<Real> neuron{};
    neuron.input_gain = gain.template at<kRows>(i);
    neuron.input_bias = bias.template at<kRows>(i);
    neuron.input_mean = mean.template at<kRows>(i);
    return neuron;
  }

  // Calls f(first, length) for each repetition of the rows: neurons first to first + length - 1.
  template <class F>
  ASGL_HOST_DEVICE void for_each_period(int64 length, F&& f) const {
    for (int64 first = 0; first < length; first += period) f(first, length - first < period ? length - first : period);
  }
};

template <class Real, bool kRows, bool kResidual>
struct InputCurrentLoop {
  struct Args {
    const Real *x, *residual;
    Real residual_gain;
    InputParameters<Real, kRows> parameters;
    Real* current;
    int64 length;
  };

  // current[i] = input_gain * (x[i] - input_mean) + input_bias, plus residual_gain * residual[i] with kResidual
  static ASGL_HOST_DEVICE void run(Args args) {
    args.parameters.for_each_period(args.length, [=](int64 first, int64 length) __attribute__((always_inline)) {
      const Real *x = args.x + first, *residual = kResidual ? args.residual + first : nullptr;
      Real* current = args.current + first;
#pragma GCC ivdep
      for (int64 i = 0; i < length; ++i) {
        const Real c = input_current<Input::kNormalised>(x[i], args.parameters[i]);
        current[i] = kResidual ? c + args.residual_gain * residual[i] : c;
      }
    });
  }
};

template <class Real, class Neurons>
struct ResidualCurrentLoop {
  struct Args {
    Neurons neurons;
    const Real *x, *residual;
    Real residual_gain;
    Real* current;
    int64 length;
  };

  // Computes the current with a residual, for the general loops. Neurons is UniformNeuron or NeuronRows.
  static ASGL_HOST_DEVICE void run(Args args) {
#pragma GCC ivdep
    for (int64 i = 0; i < args.length; ++i) {
      args.current[i] =
          input_current<Input::kGeneral>(args.x[i], args.neurons[i]) + args.residual_gain * args.residual[i];
    }
  }
};

// The number of partial sums for the gradient of a parameter that neurons share. Each partial sum adds every 64th term,
// so that the additions are vectorised in a fixed order.
constexpr int64 kInputSums = 64;

template <class Real, bool kRows>
struct InputCurrentAdjointLoop {
  struct Args {
    const Real *x, *dh;
    InputParameters<Real, kRows> parameters;
    Real *gain_sum, *bias_sum, *dx;
    int64 length;
  };

  // Computes the adjoint of InputCurrentLoop: dx[i] = input_gain * dh[i]. Also adds the terms of the gradients of gain
  // and bias to `period` partial sums each.
  static ASGL_HOST_DEVICE void run(Args args) {
    if constexpr (!kRows) return accumulate_in_registers(args);
    args.parameters.for_each_period(args.length, [=](int64 first, int64 length) __attribute__((always_inline)) {
      accumulate(args, first, length, args.gain_sum, args.bias_sum);
    });
  }

 private:
  // Accumulates in registers, for parameters that have one value.
  static ASGL_HOST_DEVICE void accumulate_in_registers(const Args& args) {
    int64 first = 0;
    if (args.length >= kInputSums) {
      Real gain_sum[kInputSums], bias_sum[kInputSums];
      for (int64 i = 0; i < kInputSums; ++i) gain_sum[i] = args.gain_sum[i], bias_sum[i] = args.bias_sum[i];
      for (; first + kInputSums <= args.length; first += kInputSums)
        accumulate(args, first, kInputSums, gain_sum, bias_sum);
      for (int64 i = 0; i < kInputSums; ++i) args.gain_sum[i] = gain_sum[i], args.bias_sum[i] = bias_sum[i];
    }
    accumulate(args, first, args.length - first, args.gain_sum, args.bias_sum);
  }

  // Computes dx of `length` neurons from `first` on, and adds the neurons' terms to the sums.
  static ASGL_HOST_DEVICE void accumulate(const Args& args, int64 first, int64 length, Real* gain_sum, Real* bias_sum) {
    const Real *x = args.x + first, *dh = args.dh + first;
    Real* dx = args.dx + first;
#pragma GCC ivdep
    for (int64 i = 0; i < length; ++i) {
      const Neuron<Real> neuron = args.parameters[i];
      gain_sum[i] += dh[i] * (x[i] - neuron.input_mean);
      bias_sum[i] += dh[i];
      dx[i] = neuron.input_gain * dh[i];
    }
  }
};

template <class Real>
struct AccumulateLoop {
  struct Args {
    int64 length;
    Real factor;
    const Real* a;
    Operand<Real> b, c;
    Real* sum;
  };

  // sum[i] += factor * (a[i] * (b[i] - c[i]))
  template <bool kRowB, bool kRowC>
  static ASGL_HOST_DEVICE void run_loop(Args args) {
#pragma GCC ivdep
    for (int64 i = 0; i < args.length; ++i) {
      args.sum[i] += args.factor * (args.a[i] * (args.b.template at<kRowB>(i) - args.c.template at<kRowC>(i)));
    }
  }

  static ASGL_HOST_DEVICE void run(Args args) {
    if (args.b.row != nullptr) {
      args.c.row != nullptr ? run_loop<true, true>(args) : run_loop<true, false>(args);
    } else {
      args.c.row != nullptr ? run_loop<false, true>(args) : run_loop<false, false>(args);
    }
  }
};

// The sum of a row. Eight partial sums each add every eighth element, so that the additions are vectorised in a fixed
// order.
template <class Real>
ASGL_HOST_DEVICE double row_sum(const Real* row, int64 length) {
  double lanes[8] = {};
  int64 i = 0;
  for (; i + 8 <= length; i += 8) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += static_cast<double>(row[i + lane]);
  }
  for (int lane = 0; i < length; ++i, ++lane) lanes[lane] += static_cast<double>(row[i]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

template <class Real>
struct SumLoop {
  struct Args {
    const Real* row;
    int64 length;
    double* sum;
  };

  // *sum = row_sum(row, length)
  static ASGL_HOST_DEVICE void run(Args args) { *args.sum = row_sum(args.row, args.length); }
};

// Divides the `length` neurons of a tile into runs of adjacent neurons, for example those that share a parameter's
// value. The first run has `first` neurons, and each later run `inner`. The end of the tile may cut off the last run.
struct Runs {
  int64 first, inner, length;

  // Calls f(run, offset, length) for each run: its index, its first neuron and its number of neurons.
  template <class F>
  ASGL_HOST_DEVICE void for_each(F&& f) const {
    int64 run = 0, end = first;
    for (int64 begin = 0; begin < length; end += inner) {
      const int64 stop = end < length ? end : length;
      f(run++, begin, stop - begin);
      begin = stop;
    }
  }
};

template <class Real>
struct RunSumsLoop {
  struct Args {
    const Real* row;
    Runs runs;
    Real* sums;
  };

  // sums[run] = sum of the values of the neurons of that run
  static ASGL_HOST_DEVICE void run(Args args) {
    args.runs.for_each([=](int64 run, int64 offset, int64 length) __attribute__((always_inline)) {
      args.sums[run] = static_cast<Real>(row_sum(args.row + offset, length));
    });
  }
};

template <class Real>
struct FillLoop {
  struct Args {
    Real value;
    Real* row;
    int64 length;
  };

  // row[i] = value
  static ASGL_HOST_DEVICE void run(Args args) {
    for (int64 i = 0; i < args.length; ++i) args.row[i] = args.value;
  }
};

template <class Real>
struct FillRunsLoop {
  struct Args {
    const Real* values;
    int64 index, count;  // index of the first run's value; number of values
    Runs runs;
    bool inverse;
    Real* row;
  };

  // Fills the neurons of each run with the run's value, or with its inverse. Values repeat after `count` runs.
  static ASGL_HOST_DEVICE void run(Args args) {
    int64 index = args.index;
    args.runs.for_each([=, &index](int64, int64 offset, int64 length) __attribute__((always_inline)) {
      const Real value = args.inverse ? inverse_of_width(args.values[index]) : args.values[index];
      Real* row = args.row + offset;
      for (int64 i = 0; i < length; ++i) row[i] = value;
      index = index + 1 == args.count ? 0 : index + 1;
    });
  }
};

template <class Real>
struct AddLoop {
  struct Args {
    const Real* row;
    double* total;
    int64 length;
  };

  // total[i] += row[i]
  static ASGL_HOST_DEVICE void run(Args args) {
#pragma GCC ivdep
    for (int64 i = 0; i < args.length; ++i) args.total[i] += static_cast<double>(args.row[i]);
  }
};

template <class Real>
struct InverseLoop {
  struct Args {
    Real* row;
    int64 length;
  };

  // row[i] = 1 / row[i]
  static ASGL_HOST_DEVICE void run(Args args) {
#pragma GCC ivdep
    for (int64 i = 0; i < args.length; ++i) args.row[i] = inverse_of_width(args.row[i]);
  }
};

template <class From, class To>
struct ConvertLoop {
  struct Args {
    const From* from;
    To* to;
    int64 length;
  };

  // to[i] = from[i], in another type
  static ASGL_HOST_DEVICE void run(Args args) {
#pragma GCC ivdep
    for (int64 i = 0; i < args.length; ++i) args.to[i] = from_real<To>(to_real(args.from[i]));
  }
};

template <class Real>
struct MultiplyLoop {
  struct Args {
    const Real* a;
    Operand<Real> b;
    Real* to;
    int64 length;
  };

  // to[i] = a[i] * b[i]
  template <bool kRow>
  static ASGL_HOST_DEVICE void run_loop(Args args) {
#pragma GCC ivdep
    for (int64 i = 0; i < args.length; ++i) args.to[i] = args.a[i] * args.b.template at<kRow>(i);
  }

  static ASGL_HOST_DEVICE void run(Args args) { args.b.row != nullptr ? run_loop<true>(args) : run_loop<false>(args); }
};

}  // namespace asgl::cpu
