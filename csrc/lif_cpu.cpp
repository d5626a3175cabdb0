// The CPU kernels. A task owns a tile of neurons, whose state stays in the cache; steps are the outer loop and neurons the
// inner one, which is vectorised. Everything inside that loop comes from the headers that the CUDA kernels share.
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <memory>

#include "cpu_clones.h"
#include "dispatch.h"
#include "lif_launch.h"
#include "philox.h"

namespace asgl::cpu {
namespace {

constexpr int64 kForwardTile = 1024;
constexpr int64 kBackwardRows = 4096;  // neurons times steps of a segment, whose h and s are kept
constexpr int64 kElementsPerTask = 32768;

int64 segment_steps(int64 steps) { return steps <= 4 ? 4 : steps <= 8 ? 8 : kCheckpointSteps; }

// ---- loops over the neurons of a tile, one clone per instruction set ----

// Rows that will be read and written next. Hardware prefetchers stop at page boundaries, and a row of a tile is about a
// page; asked for by hand, a few lines at a time, they arrive while this row is computed.
struct Ahead {
  template <class Read, class Write>
  Ahead(const Read* read, Write* write)
      : read(reinterpret_cast<const char*>(read)), write(reinterpret_cast<char*>(write)), read_size(sizeof(Read)),
        write_size(sizeof(Write)) {}

  ASGL_HOST_DEVICE void fetch(int64 first, int64 length) const {
    constexpr int64 kCacheLine = 64;
    if (read != nullptr) {
      for (int64 at = first * read_size; at < (first + length) * read_size; at += kCacheLine) __builtin_prefetch(read + at, 0);
    }
    if (write != nullptr) {
      for (int64 at = first * write_size; at < (first + length) * write_size; at += kCacheLine) __builtin_prefetch(write + at, 1);
    }
  }

  const char* read;
  char* write;
  int64 read_size, write_size;
};

constexpr int64 kNeuronsPerFetch = 128;

// The neuron's parameters in a tile: one value for all, or a row each.
template <class Real>
struct UniformNeuron {
  Neuron<Real> values;
  ASGL_HOST_DEVICE Neuron<Real> operator[](int64) const { return values; }
};

template <class Real>
struct NeuronRows {
  const Real *inverse_width, *decay, *v_threshold, *reset, *input_gain, *input_bias;
  ASGL_HOST_DEVICE Neuron<Real> operator[](int64 i) const {
    return {decay[i], v_threshold[i], reset[i], inverse_width[i], input_gain[i], input_bias[i]};
  }
};

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
    Ahead ahead;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
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
    for (int64 begin = 0; begin < length; begin += kNeuronsPerFetch) {
      const int64 end = begin + kNeuronsPerFetch < length ? begin + kNeuronsPerFetch : length;
      args.ahead.fetch(begin, end - begin);
#pragma GCC ivdep
    for (int64 i = begin; i < end; ++i) {
      const Neuron<Real> neuron = neurons[i];
      const Real h = charge(x[i], v[i], neuron, options.v_rest);
      const Real s = fire<kSurrogate>(h, draws[i] < analog_below, neuron, options.strict_threshold);
      h_row[i] = h;
      s_row[i] = s;
      v_next[i] = reset<kHardReset>(h, s, neuron);
    }
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
    Ahead ahead;
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
    for (int64 begin = 0; begin < length; begin += kNeuronsPerFetch) {
      const int64 end = begin + kNeuronsPerFetch < length ? begin + kNeuronsPerFetch : length;
      args.ahead.fetch(begin, end - begin);
#pragma GCC ivdep
    for (int64 i = begin; i < end; ++i) {
      const Neuron<Real> neuron = neurons[i];
      const StepGradient<Real> step =
          step_adjoint<kSurrogate, kHardReset>(g[i], gh[i], dv[i], h[i], s[i], carried, neuron, options);
      dy[i] = step.dy;
      dh[i] = step.dh;
      dx[i] = neuron.input_gain * step.dh;
      dv[i] = neuron.decay * step.dh;
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

// One value for all lanes where row is null.
template <class Real>
struct Operand {
  const Real* row;
  Real value;
};

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

// ---- a tile's rows in memory ----

// Calls f(offset in the tile, element in the sequence, length) for each stretch of the tile that is contiguous at step t.
template <class F>
void for_each_stretch(const SequenceShape& shape, int64 first, int64 length, int64 t, F&& f) {
  for (int64 i = 0; i < length;) {
    const int64 n = first + i;
    const int64 stretch = std::min(length - i, shape.inner - n % shape.inner);
    f(i, shape.element(n, t), stretch);
    i += stretch;
  }
}

// Row t of a sequence as contiguous numbers of the arithmetic's type: where it lies, if it is so already, else in `buffer`.
template <class Element>
const Real_t<Element>* read_row(const Element* sequence, const SequenceShape& shape, int64 first, int64 length, int64 t,
                                Real_t<Element>* buffer) {
  using Real = Real_t<Element>;
  if constexpr (std::is_same_v<Element, Real>) {
    if (first % shape.inner + length <= shape.inner) {
      return sequence + shape.element(first, t);
    }
  }
  for_each_stretch(shape, first, length, t, [&](int64 offset, int64 element, int64 stretch) {
    run<ConvertLoop<Element, Real>>({sequence + element, buffer + offset, stretch});
  });
  return buffer;
}

// Where row t is to be written: in place, or in `buffer`, which finish_row then stores.
template <class Element>
Real_t<Element>* start_row(Element* sequence, const SequenceShape& shape, int64 first, int64 length, int64 t,
                           Real_t<Element>* buffer) {
  if constexpr (std::is_same_v<Element, Real_t<Element>>) {
    if (sequence != nullptr && first % shape.inner + length <= shape.inner) {
      return sequence + shape.element(first, t);
    }
  }
  return buffer;
}

template <class Element>
void finish_row(const Real_t<Element>* row, Element* sequence, const SequenceShape& shape, int64 first, int64 length,
                int64 t) {
  if (sequence == nullptr) {
    return;
  }
  if constexpr (std::is_same_v<Element, Real_t<Element>>) {
    if (first % shape.inner + length <= shape.inner && row == sequence + shape.element(first, t)) {
      return;
    }
  }
  for_each_stretch(shape, first, length, t, [&](int64 offset, int64 element, int64 stretch) {
    run<ConvertLoop<Real_t<Element>, Element>>({row + offset, sequence + element, stretch});
  });
}

// Where row t lies, for a hint to the cache; null where it is not one stretch or not there.
template <class Element>
Element* row_ahead(Element* sequence, const SequenceShape& shape, int64 first, int64 length, int64 t) {
  const bool in_one_stretch = first < shape.neurons() && first % shape.inner + length <= shape.inner;
  return sequence != nullptr && in_one_stretch ? sequence + shape.element(first, t) : nullptr;
}

template <class Real>
void fill_parameter_row(const ParameterView<Real>& parameter, int64 first, int64 length, int64 t, Real* row) {
  if (parameter.data == nullptr) {
    std::fill_n(row, length, parameter.constant);
    return;
  }
  const Real* data = parameter.data + t * parameter.step_stride;
  for (int64 i = 0; i < length;) {
    const int64 n = first + i;
    const int64 index = (n / parameter.inner) % parameter.count;
    if (parameter.inner == 1) {
      const int64 stretch = std::min(length - i, parameter.count - index);
      std::copy_n(data + index, stretch, row + i);
      i += stretch;
    } else {
      const int64 stretch = std::min(length - i, parameter.inner - n % parameter.inner);
      std::fill_n(row + i, stretch, data[index]);
      i += stretch;
    }
  }
}

// ---- what a task keeps in the cache ----

template <class Real>
class Rows {
 public:
  Rows(int64 count, int64 length)
      : length_((length + 15) / 16 * 16), storage_(new Real[static_cast<size_t>(count * length_) + 16]) {
    constexpr uintptr_t kCacheLine = 64;
    const auto address = reinterpret_cast<uintptr_t>(storage_.get());
    next_ = reinterpret_cast<Real*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
  }

  Real* take(int64 count = 1) {
    Real* rows = next_;
    next_ += count * length_;
    return rows;
  }
  int64 stride() const { return length_; }

 private:
  int64 length_;
  std::unique_ptr<Real[]> storage_;
  Real* next_;
};

// The noise of a tile, two steps at a time. Without draws every row is 0: below any analog_below but 0.
class TileNoise {
 public:
  TileNoise(const NoiseParams& noise, int64 tile)
      : drawn_(noise.drawn()), key_(drawn_ ? noise_key(noise.rng_state) : NoiseKey{}), groups_((tile + 3) / 4),
        draws_(static_cast<size_t>(2 * groups_), 8) {}

  const uint16* row(int64 first, int64 length, int64 t) {
    const int64 pair = t / 2;
    if (drawn_ && (pair != pair_ || first != first_)) {
      run<NoiseLoop>({key_, static_cast<uint64>(first / 4), (length + 3) / 4, static_cast<uint32>(pair), draws_.data(),
                      draws_.data() + groups_});
      pair_ = pair;
      first_ = first;
    }
    return reinterpret_cast<const uint16*>(draws_.data() + (t % 2) * groups_);
  }

 private:
  struct AlignedWords {
    AlignedWords(size_t count, size_t spare) : storage(new uint64[count + spare]()) {
      first = reinterpret_cast<uint64*>((reinterpret_cast<uintptr_t>(storage.get()) + 63) / 64 * 64);
    }
    uint64* data() { return first; }
    std::unique_ptr<uint64[]> storage;
    uint64* first;
  };

  bool drawn_;
  NoiseKey key_;
  int64 groups_;
  AlignedWords draws_;
  int64 pair_ = -1;
  int64 first_ = -1;
};

template <class Real>
bool is_uniform(const ParameterView<Real>& parameter) {
  return parameter.data == nullptr || (parameter.count == 1 && parameter.step_stride == 0);
}

// The six parameters in a tile, read anew at every step only where one of them depends on it.
template <class Real>
class TileNeurons {
 public:
  TileNeurons(const ParameterView<Real>* parameters, int64 tile)
      : parameters_(parameters), rows_(all_uniform(parameters) ? 0 : kNumParameters, tile) {
    for (int id = 0; id < kNumParameters; ++id) {
      per_step_ |= parameters[id].data != nullptr && parameters[id].step_stride != 0;
      row_[id] = uniform() ? nullptr : rows_.take();
    }
    if (uniform()) {
      values_ = {value(kDecay), value(kThreshold), value(kReset), Real(1) / value(kWidth), value(kInputGain),
                 value(kInputBias)};
    }
  }

  static bool all_uniform(const ParameterView<Real>* parameters) {
    return std::all_of(parameters, parameters + kNumParameters, is_uniform<Real>);
  }
  bool uniform() const { return rows_.stride() == 0 || all_uniform(parameters_); }

  void move_to(int64 first, int64 length, int64 t) {
    if (uniform() || (first == first_ && (t == t_ || !per_step_))) {
      return;
    }
    for (int id = 0; id < kNumParameters; ++id) {
      if (first != first_ || (parameters_[id].data != nullptr && parameters_[id].step_stride != 0)) {
        fill_parameter_row(parameters_[id], first, length, t, row_[id]);
        if (id == kWidth) {
          std::transform(row_[id], row_[id] + length, row_[id], [](Real width) { return Real(1) / width; });
        }
      }
    }
    first_ = first;
    t_ = t;
  }

  operator UniformNeuron<Real>() const { return {values_}; }
  operator NeuronRows<Real>() const {
    return {row_[kWidth], row_[kDecay], row_[kThreshold], row_[kReset], row_[kInputGain], row_[kInputBias]};
  }
  Operand<Real> v_threshold() const { return {row_[kThreshold], values_.v_threshold}; }
  Operand<Real> inverse_width() const { return {row_[kWidth], values_.inverse_width}; }

 private:
  Real value(ParameterId id) const { return parameters_[id].data == nullptr ? parameters_[id].constant : *parameters_[id].data; }

  const ParameterView<Real>* parameters_;
  Rows<Real> rows_;
  std::array<Real*, kNumParameters> row_;
  Neuron<Real> values_{};
  bool per_step_ = false;
  int64 first_ = -1;
  int64 t_ = -1;
};

int64 num_tiles(const SequenceShape& shape, int64 tile) { return (shape.neurons() + tile - 1) / tile; }

// Calls task(tile index range) on as many threads as torch.get_num_threads() allows.
template <class Task>
void for_each_tile_range(const SequenceShape& shape, int64 tile, Task&& task) {
  const int64 tiles = num_tiles(shape, tile);
  const int64 grain = std::max<int64>(1, kElementsPerTask / (tile * shape.steps));
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { task(begin, end); });
}

// ---- forward ----

template <class Scalar, Surrogate kSurrogate, bool kHardReset, class Neurons>
void forward(const ForwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  using Step = StepLoop<Real, kSurrogate, kHardReset, Neurons>;
  const SequenceShape& shape = params.shape;
  for_each_tile_range(shape, kForwardTile, [&](int64 begin, int64 end) {
    Rows<Real> rows(5, kForwardTile);
    Real *x_buffer = rows.take(), *s_buffer = rows.take(), *h_buffer = rows.take();
    std::array<Real*, 2> v = {rows.take(), rows.take()};
    TileNoise noise(params.noise, kForwardTile);
    TileNeurons<Real> neurons(params.parameters, kForwardTile);
    for (int64 tile = begin; tile < end; ++tile) {
      const int64 first = tile * kForwardTile;
      const int64 length = std::min(kForwardTile, shape.neurons() - first);
      if (params.v_init != nullptr) {
        std::copy_n(params.v_init + first, length, v[0]);
      } else {
        std::fill_n(v[0], length, params.options.v_rest);
      }
      for (int64 t = 0; t < shape.steps; ++t) {
        const Real* x = read_row(params.x_seq, shape, first, length, t, x_buffer);
        Real* s = start_row(params.s_seq, shape, first, length, t, s_buffer);
        Real* h = start_row(params.h_seq, shape, first, length, t, h_buffer);
        neurons.move_to(first, length, t);
        const int64 next_first = t + 1 < shape.steps ? first : first + kForwardTile, next_t = (t + 1) % shape.steps;
        const Ahead ahead(row_ahead(params.x_seq, shape, next_first, length, next_t),
                          row_ahead(params.s_seq, shape, next_first, length, next_t));
        run<Step>({neurons, params.options, params.noise.analog_below, length, x, v[0], noise.row(first, length, t), h, s,
                   v[1], ahead});
        std::swap(v[0], v[1]);
        if (params.options.scale_output) {
          run<MultiplyLoop<Real>>({s, neurons.v_threshold(), s_buffer, length});
          s = s_buffer;
        }
        finish_row(s, params.s_seq, shape, first, length, t);
        finish_row(h, params.h_seq, shape, first, length, t);
        finish_row(v[0], params.v_seq, shape, first, length, t);
        if (params.checkpoints != nullptr && (t + 1) % kCheckpointSteps == 0 && t + 1 < shape.steps) {
          std::copy_n(v[0], length, params.checkpoints + (t / kCheckpointSteps) * shape.neurons() + first);
        }
      }
      if (params.v_last != nullptr) {
        std::copy_n(v[0], length, params.v_last + first);
      }
    }
  });
}

// ---- backward ----

// Adds the tile's row of sums, run by run, into the slots of GradientPartials.
template <class Real>
void store_partials(const GradientPartials<Real>& partials, const ParameterView<Real>& parameter, int64 tile_index,
                    int64 first, int64 length, int64 t, const Real* row) {
  Real* slots = partials.data + (parameter.step_stride != 0 ? t * partials.slots : 0) + tile_index;
  if (parameter.inner == 1) {
    std::copy_n(row, length, slots + first);
    return;
  }
  for (int64 i = 0; i < length;) {
    const int64 n = first + i;
    const int64 stretch = std::min(length - i, parameter.inner - n % parameter.inner);
    double sum;
    run<SumLoop<Real>>({row + i, stretch, &sum});
    slots[n / parameter.inner] = static_cast<Real>(sum);
    i += stretch;
  }
}

template <class Scalar, Surrogate kSurrogate, bool kHardReset, class Neurons>
void backward(const BackwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  using Step = StepLoop<Real, kSurrogate, kHardReset, Neurons>;
  using Adjoint = AdjointLoop<Real, kSurrogate, kHardReset, Neurons>;
  using Accumulate = AccumulateLoop<Real>;
  constexpr Operand<Real> kZero = {nullptr, Real(0)}, kOne = {nullptr, Real(1)};
  const SequenceShape& shape = params.shape;
  const NeuronOptions<Real>& options = params.options;
  const int64 segment = segment_steps(shape.steps);
  const int64 tile_size = backward_tiles(shape).tile;
  const auto wanted = [&](ParameterId id) { return params.partials[id].data != nullptr; };
  // The potentials before each step are needed again only for the gradient of decay.
  const int64 v_rows = wanted(kDecay) ? segment + 1 : 2;

  for_each_tile_range(shape, tile_size, [&](int64 begin, int64 end) {
    Rows<Real> rows(2 * segment + v_rows + 9 + kNumParameters, tile_size);
    Real *h = rows.take(segment), *s = rows.take(segment), *v = rows.take(v_rows);
    Real *x_buffer = rows.take(), *g_buffer = rows.take(), *gh_buffer = rows.take(), *gv_buffer = rows.take();
    Real *dx_buffer = rows.take(), *dv = rows.take(), *dy = rows.take(), *dh = rows.take(), *zeros = rows.take();
    std::fill_n(zeros, tile_size, Real(0));
    std::array<Real*, kNumParameters> sums;
    for (Real*& sum : sums) sum = rows.take();
    TileNoise noise(params.noise, tile_size);
    TileNeurons<Real> neurons(params.parameters, tile_size);

    for (int64 tile = begin; tile < end; ++tile) {
      const int64 first = tile * tile_size;
      const int64 length = std::min(tile_size, shape.neurons() - first);
      const auto row = [&](Real* rows_of, int64 k) { return rows_of + k * rows.stride(); };
      const auto accumulate = [&](ParameterId id, Real factor, const Real* a, Operand<Real> b, Operand<Real> c) {
        if (wanted(id)) run<Accumulate>({length, factor, a, b, c, sums[id]});
      };
      const auto clear = [&](int id) { std::fill_n(sums[id], length, Real(0)); };
      const auto store = [&](int id, int64 t) {
        store_partials(params.partials[id], params.parameters[id], tile, first, length, t, sums[id]);
      };
      for (int id = 0; id < kNumParameters; ++id) clear(id);
      if (params.grad_v_last != nullptr) {
        std::copy_n(params.grad_v_last + first, length, dv);
      } else {
        std::fill_n(dv, length, Real(0));
      }
      bool carried = params.grad_v_last != nullptr;

      const int64 last_start = (shape.steps - 1) / segment * segment;
      for (int64 start = last_start; start >= 0; start -= segment) {
        const int64 stop = std::min(shape.steps, start + segment);
        if (start > 0) {
          std::copy_n(params.checkpoints + (start / kCheckpointSteps - 1) * shape.neurons() + first, length, v);
        } else if (params.v_init != nullptr) {
          std::copy_n(params.v_init + first, length, v);
        } else {
          std::fill_n(v, length, options.v_rest);
        }
        for (int64 t = start; t < stop; ++t) {
          const int64 k = t - start;
          const Real* x = read_row(params.x_seq, shape, first, length, t, x_buffer);
          neurons.move_to(first, length, t);
          const Scalar* next = t + 1 < stop ? row_ahead(params.x_seq, shape, first, length, t + 1)
                                            : row_ahead(params.grad_s_seq, shape, first, length, t);
          const Ahead ahead(next, t + 1 < stop ? nullptr : row_ahead(params.grad_x_seq, shape, first, length, t));
          run<Step>({neurons, options, params.noise.analog_below, length, x, row(v, k % v_rows),
                     noise.row(first, length, t), row(h, k), row(s, k), row(v, (k + 1) % v_rows), ahead});
        }
        for (int64 t = stop - 1; t >= start; --t) {
          const int64 k = t - start;
          neurons.move_to(first, length, t);
          const Real* g = zeros;
          if (params.grad_s_seq != nullptr) {
            g = read_row(params.grad_s_seq, shape, first, length, t, g_buffer);
            if (options.scale_output) {
              accumulate(kThreshold, Real(1), g, {row(s, k), Real(0)}, kZero);
              run<MultiplyLoop<Real>>({g, neurons.v_threshold(), gv_buffer, length});
              g = gv_buffer;
            }
          }
          const Real* gh = params.grad_h_seq == nullptr
                               ? zeros
                               : read_row(params.grad_h_seq, shape, first, length, t, gh_buffer);
          if (params.grad_v_seq != nullptr) {
            const Real* gv = read_row(params.grad_v_seq, shape, first, length, t, x_buffer);
            run<Accumulate>({length, Real(1), gv, kOne, kZero, dv});
            carried = true;
          }
          if (carried) {
            accumulate(kReset, kHardReset ? Real(1) : Real(-1), dv, {row(s, k), Real(0)}, kZero);
          }
          Real* dx = start_row(params.grad_x_seq, shape, first, length, t, dx_buffer);
          const Scalar* next = t > start ? row_ahead(params.grad_s_seq, shape, first, length, t - 1)
                               : start > 0 ? row_ahead(params.x_seq, shape, first, length, start - segment)
                                           : row_ahead(params.x_seq, shape, first + tile_size, length, last_start);
          const Ahead ahead(next, t > start ? row_ahead(params.grad_x_seq, shape, first, length, t - 1) : nullptr);
          run<Adjoint>({neurons, options, length, carried, g, gh, row(h, k), row(s, k), dv, dy, dh, dx, ahead});
          carried = true;
          finish_row(dx, params.grad_x_seq, shape, first, length, t);
          accumulate(kWidth, Real(1), dy, {row(h, k), Real(0)}, neurons.v_threshold());
          accumulate(kThreshold, Real(-1), dy, neurons.inverse_width(), kZero);
          accumulate(kDecay, Real(1), dh, {row(v, k % v_rows), Real(0)}, {nullptr, options.v_rest});
          if (wanted(kInputGain)) {
            const Real* x = read_row(params.x_seq, shape, first, length, t, x_buffer);
            accumulate(kInputGain, Real(1), dh, {x, Real(0)}, kZero);
          }
          accumulate(kInputBias, Real(1), dh, kOne, kZero);
          for (int id = 0; id < kNumParameters; ++id) {
            if (wanted(static_cast<ParameterId>(id)) && params.parameters[id].step_stride != 0) {
              store(id, t);
              clear(id);
            }
          }
        }
      }
      for (int id = 0; id < kNumParameters; ++id) {
        if (wanted(static_cast<ParameterId>(id)) && params.parameters[id].step_stride == 0) store(id, 0);
      }
      if (params.grad_v_init != nullptr) {
        std::copy_n(dv, length, params.grad_v_init + first);
      }
    }
  });
}

template <class Scalar, class F>
void with_neuron(Surrogate surrogate, bool hard_reset, const ParameterView<Real_t<Scalar>>* parameters, F&& f) {
  using Real = Real_t<Scalar>;
  with_surrogate(surrogate, [&](auto kind) {
    with_bool(hard_reset, [&](auto hard) {
      with_bool(TileNeurons<Real>::all_uniform(parameters), [&](auto uniform) {
        using Neurons = std::conditional_t<uniform, UniformNeuron<Real>, NeuronRows<Real>>;
        f(kind, hard, static_cast<Neurons*>(nullptr));
      });
    });
  });
}

}  // namespace

TilePlan backward_tiles(const SequenceShape& shape) {
  const int64 tile = kBackwardRows / segment_steps(shape.steps);
  return {tile, num_tiles(shape, tile)};
}

template <class Scalar>
void launch_forward(Surrogate surrogate, bool hard_reset, const ForwardParams<Scalar>& params) {
  with_neuron<Scalar>(surrogate, hard_reset, params.parameters, [&](auto kind, auto hard, auto* neurons) {
    forward<Scalar, kind.value, hard.value, std::remove_pointer_t<decltype(neurons)>>(params);
  });
}

template <class Scalar>
void launch_backward(Surrogate surrogate, bool hard_reset, const BackwardParams<Scalar>& params) {
  with_neuron<Scalar>(surrogate, hard_reset, params.parameters, [&](auto kind, auto hard, auto* neurons) {
    backward<Scalar, kind.value, hard.value, std::remove_pointer_t<decltype(neurons)>>(params);
  });
}

template <class Real>
void launch_gradient_sum(const GradientSum<Real>& sum) {
  const ParameterView<Real>& parameter = sum.parameter;
  const int64 repeats = sum.shape.neurons() / (parameter.inner * parameter.count);
  const int64 rows = parameter.step_stride != 0 ? sum.shape.steps : 1;
  at::parallel_for(0, rows * parameter.count, 2048, [&](int64_t begin, int64_t end) {
    for (int64 index = begin; index < end; ++index) {
      const int64 t = index / parameter.count, i = index % parameter.count;
      double total = 0;
      for (int64 repeat = 0; repeat < repeats; ++repeat) {
        const int64 run_index = repeat * parameter.count + i;
        const int64 first_tile = run_index * parameter.inner / sum.tile;
        const int64 last_tile = ((run_index + 1) * parameter.inner - 1) / sum.tile;
        for (int64 tile = first_tile; tile <= last_tile; ++tile) {
          total += static_cast<double>(sum.partials.data[t * sum.partials.slots + run_index + tile]);
        }
      }
      const double width = sum.is_width ? static_cast<double>(parameter.at(i * parameter.inner, t)) : 1;
      sum.gradient[index] = static_cast<Real>(sum.is_width ? -total / (width * width) : total);
    }
  });
}

#define ASGL_INSTANTIATE(Scalar)                                                                  \
  template void launch_forward<Scalar>(Surrogate, bool, const ForwardParams<Scalar>&);            \
  template void launch_backward<Scalar>(Surrogate, bool, const BackwardParams<Scalar>&);
ASGL_INSTANTIATE(Half)
ASGL_INSTANTIATE(BFloat16)
ASGL_INSTANTIATE(float)
ASGL_INSTANTIATE(double)
#undef ASGL_INSTANTIATE
template void launch_gradient_sum<float>(const GradientSum<float>&);
template void launch_gradient_sum<double>(const GradientSum<double>&);

}  // namespace asgl::cpu
