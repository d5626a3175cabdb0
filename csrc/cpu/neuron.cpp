// The CPU kernels. A task owns a tile of neurons, whose state stays in the cache; steps are the outer loop and neurons
// the inner one (cpu_loops.h).
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu_loops.h"
#include "cpu_rows.h"
#include "dispatch.h"
#include "lif_launch.h"

namespace asgl::cpu {
namespace {

int64 segment_steps(int64 steps) { return steps <= 4 ? 4 : steps <= 8 ? 8 : kCheckpointSteps; }

// ---- parameters of a tile ----

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

// The noise of a tile for the steps of a segment. Without draws every row is 0: below any analog_below but 0.
class TileNoise {
 public:
  explicit TileNoise(const NoiseParams& noise)
      : drawn_(noise.drawn()),
        key_(drawn_ ? noise_key(noise.rng_state) : NoiseKey{}),
        rows_(kCheckpointSteps, kTile / 4) {
    pairs_.fill(-1);
    if (!drawn_) std::fill_n(rows_.row(0), rows_.stride(), 0);
  }

  const uint16* row(int64 first, int64 length, int64 t) {
    if (!drawn_) return reinterpret_cast<const uint16*>(rows_.row(0));
    if (first != first_) {
      first_ = first;
      pairs_.fill(-1);
    }
    const int64 pair = t / 2, slot = pair % kPairs;
    if (pairs_[slot] != pair) {
      pairs_[slot] = pair;
      run<NoiseLoop>({key_, static_cast<uint64>(first / 4), (length + 3) / 4, static_cast<uint32>(pair),
                      rows_.row(2 * slot), rows_.row(2 * slot + 1)});
    }
    return reinterpret_cast<const uint16*>(rows_.row(2 * slot + t % 2));
  }

 private:
  static constexpr int64 kPairs = kCheckpointSteps / 2;
  static_assert(kTile / 4 % kNoiseGroups == 0);

  bool drawn_;
  NoiseKey key_;
  Rows<uint64> rows_;
  int64 first_ = -1;
  std::array<int64, kPairs> pairs_;
};

// The parameters in a tile: one value for all, or rows, read anew at every step only where they depend on it.
template <class Real>
class TileNeurons {
 public:
  TileNeurons(const ParameterView<Real> (&parameters)[kNumParameters], int64 tile)
      : parameters_(parameters), uniform_(all_uniform(parameters)), rows_(uniform_ ? 0 : kNumParameters, tile) {
    if (uniform_) values_ = settled_neuron<Input::kPlain>(parameters, 0);
    for (Real*& row : row_) row = uniform_ ? nullptr : rows_.take();
  }

  void move_to(int64 first, int64 length, int64 t) {
    if (uniform_) return;
    for (int id = 0; id < kNumParameters; ++id) {
      const bool per_step = parameters_[id].data != nullptr && parameters_[id].step_stride != 0;
      if (first != first_ || (per_step && t != t_)) {
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
    return {row_[kWidth],     row_[kDecay],     row_[kThreshold], row_[kReset],
            row_[kInputGain], row_[kInputBias], row_[kInputMean]};
  }
  Operand<Real> v_threshold() const { return {row_[kThreshold], values_.v_threshold}; }
  Operand<Real> inverse_width() const { return {row_[kWidth], values_.inverse_width}; }
  Operand<Real> input_mean() const { return {row_[kInputMean], values_.input_mean}; }

 private:
  const ParameterView<Real>* parameters_;
  bool uniform_;
  Rows<Real> rows_;
  std::array<Real*, kNumParameters> row_;
  Neuron<Real> values_{};
  int64 first_ = -1;
  int64 t_ = -1;
};

// Interleaved sums of a stretch, so that their loop is vectorised without licence to reorder additions.
constexpr int64 kInputSums = 64;

// The input current of a tile where the parameters of the input are the same at all steps; x itself for kPlain. Where
// enough neighbours share them, each such stretch has numbers for all; else there are rows, as short as repetition
// allows, of which the cache keeps the more.
template <class Real>
class TileInput {
 public:
  TileInput(const ParameterView<Real> (&parameters)[kNumParameters], Input input)
      : parameters_(parameters), plain_(input == Input::kPlain), rows_(plain_ ? 0 : 6, kTile) {
    if (plain_) return;
    for (Real** row : {&current_, &gain_, &bias_, &mean_, &gain_sum_, &bias_sum_}) *row = rows_.take();
    bool alike = true;  // all that are not uniform
    for (int id = kInputGain; id < kNumParameters; ++id) {
      if (parameters[id].is_uniform()) continue;
      alike = alike && (shared_ == 0 || (parameters[id].inner == shared_ && parameters[id].count == count_));
      shared_ = parameters[id].inner;
      count_ = parameters[id].count;
    }
    in_rows_ = !alike || (shared_ > 0 && shared_ < 2 * kInputSums);
    if (alike && shared_ == 1 && count_ <= kTile) period_ = std::max<int64>(1, kInputSums / count_) * count_;
  }

  bool plain() const { return plain_; }

  void move_to(int64 first, int64 length) {
    if (plain_) return;
    const bool known = first_ >= 0 && period_ < kTile && first % count_ == first_ % count_;
    first_ = first;
    length_ = length;
    if (in_rows_ && !known) {
      fill_parameter_row(parameters_[kInputGain], first, period_, 0, gain_);
      fill_parameter_row(parameters_[kInputBias], first, period_, 0, bias_);
      fill_parameter_row(parameters_[kInputMean], first, period_, 0, mean_);
    }
    std::fill_n(gain_sum_, kTile, Real(0));
    std::fill_n(bias_sum_, kTile, Real(0));
  }

  const Real* current(const Real* x) {
    if (plain_) return x;
    if (in_rows_) {
      run<InputCurrentLoop<Real, true>>({x, rows(), current_, length_});
    } else {
      for_each_stretch([&](int64, int64 i, int64 length, const InputParameters<Real, false>& parameters) {
        run<InputCurrentLoop<Real, false>>({x + i, parameters, current_ + i, length});
      });
    }
    return current_;
  }

  // Where the gradient of the current is to be put, and what then makes that of x of it.
  Real* gradient_row() { return current_; }
  void backward(const Real* x, Real* dx) {
    if (in_rows_) {
      run<InputCurrentAdjointLoop<Real, true>>({x, current_, rows(), gain_sum_, bias_sum_, dx, length_});
    } else {
      for_each_stretch([&](int64 stretch, int64 i, int64 length, const InputParameters<Real, false>& parameters) {
        const int64 sum = stretch * kInputSums;
        run<InputCurrentAdjointLoop<Real, false>>(
            {x + i, current_ + i, parameters, gain_sum_ + sum, bias_sum_ + sum, dx + i, length});
      });
    }
  }

  // A row whose sum over the neurons that share a value is the gradient.
  const Real* gain_sums() { return in_place(gain_sum_); }
  const Real* bias_sums() { return in_place(bias_sum_); }

 private:
  InputParameters<Real, true> rows() const { return {{gain_, Real(0)}, {bias_, Real(0)}, {mean_, Real(0)}, period_}; }

  template <class F>
  void for_each_stretch(F&& f) {
    const int64 shared = shared_ == 0 ? kTile : shared_;
    int64 stretch = 0;
    for (int64 i = 0; i < length_; ++stretch) {
      const int64 n = first_ + i, length = std::min(length_ - i, shared - n % shared);
      const auto at = [&](ParameterId id) { return Operand<Real>{nullptr, parameters_[id].at(n, 0)}; };
      f(stretch, i, length, InputParameters<Real, false>{at(kInputGain), at(kInputBias), at(kInputMean), kInputSums});
      i += length;
    }
  }

  // Sums of stretches, which lie side by side, go to the first place of each.
  const Real* in_place(Real* sums) {
    if (plain_ || in_rows_) return sums;
    std::fill_n(gain_, kTile, Real(0));
    for_each_stretch([&](int64 stretch, int64 i, int64, const InputParameters<Real, false>&) {
      double sum;
      run<SumLoop<Real>>({sums + stretch * kInputSums, kInputSums, &sum});
      gain_[i] = static_cast<Real>(sum);
    });
    return gain_;
  }

  const ParameterView<Real>* parameters_;
  bool plain_, in_rows_ = false;
  int64 shared_ = 0, count_ = 1;  // inner and count of those that are not uniform, if these are alike
  int64 period_ = kTile;          // of the rows
  Rows<Real> rows_;
  Real *current_ = nullptr, *gain_ = nullptr, *bias_ = nullptr, *mean_ = nullptr;
  Real *gain_sum_ = nullptr, *bias_sum_ = nullptr;
  int64 first_ = -1, length_ = 0;
};

// The potential before the first step of a segment.
template <class Scalar>
void load_potential(const LIFParams<Scalar>& params, const Real_t<Scalar>* checkpoints, int64 start, int64 first,
                    int64 length, Real_t<Scalar>* v) {
  if (start > 0) {
    std::copy_n(checkpoints + (start / kCheckpointSteps - 1) * params.shape.neurons() + first, length, v);
  } else if (params.v_init != nullptr) {
    std::copy_n(params.v_init + first, length, v);
  } else {
    std::fill_n(v, length, params.options.v_rest);
  }
}

template <class Scalar>
void store_checkpoint(const ForwardParams<Scalar>& params, const Real_t<Scalar>* v, int64 steps, int64 first,
                      int64 length) {
  if (params.checkpoints != nullptr && steps % kCheckpointSteps == 0 && steps < params.shape.steps) {
    std::copy_n(v, length, params.checkpoints + (steps / kCheckpointSteps - 1) * params.shape.neurons() + first);
  }
}

int64 num_tiles(const SequenceShape& shape) { return (shape.neurons() + kTile - 1) / kTile; }

// Calls task(tile index range) on as many threads as torch.get_num_threads() allows.
template <class Task>
void for_each_tile_range(const SequenceShape& shape, Task&& task) {
  const int64 tiles = num_tiles(shape);
  const int64 grain = std::max<int64>(1, kElementsPerTask / (kTile * shape.steps));
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { task(begin, end); });
}

// ---- forward ----

template <class Scalar, Surrogate kSurrogate, bool kHardReset, class Neurons>
void forward(const ForwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  using Step = StepLoop<Real, kSurrogate, kHardReset, Neurons>;
  const SequenceShape& shape = params.shape;
  for_each_tile_range(shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(5, kTile);
    Real *x_buffer = rows.take(), *s_buffer = rows.take(), *h_buffer = rows.take();
    std::array<Real*, 2> v = {rows.take(), rows.take()};
    TileNoise noise(params.noise);
    TileNeurons<Real> neurons(params.parameters, kTile);
    for (int64 tile = begin; tile < end; ++tile) {
      const int64 first = tile * kTile;
      const int64 length = std::min(kTile, shape.neurons() - first);
      load_potential<Scalar>(params, nullptr, 0, first, length, v[0]);
      for (int64 t = 0; t < shape.steps; ++t) {
        const Real* x = read_row(params.x_seq, shape, first, length, t, x_buffer);
        Real* s = start_row(params.s_seq, shape, first, length, t, s_buffer);
        Real* h = start_row(params.h_seq, shape, first, length, t, h_buffer);
        neurons.move_to(first, length, t);
        run<Step>({neurons, params.options, params.noise.analog_below, length, x, v[0], noise.row(first, length, t), h,
                   s, v[1]});
        std::swap(v[0], v[1]);
        if (params.options.scale_output) {
          run<MultiplyLoop<Real>>({s, neurons.v_threshold(), s_buffer, length});
          s = s_buffer;
        }
        finish_row(s, params.s_seq, shape, first, length, t);
        finish_row(h, params.h_seq, shape, first, length, t);
        finish_row(v[0], params.v_seq, shape, first, length, t);
        store_checkpoint(params, v[0], t + 1, first, length);
      }
      if (params.v_last != nullptr) {
        std::copy_n(v[0], length, params.v_last + first);
      }
    }
  });
}

template <class Scalar, Surrogate kSurrogate, bool kHardReset>
void forward_uniform(const ForwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  using Step = UniformStepLoop<Real, kSurrogate, kHardReset, true>;
  const SequenceShape& shape = params.shape;
  const Neuron<Real> neuron = settled_neuron<Input::kPlain>(params.parameters, 0);
  for_each_tile_range(shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(3, kTile);
    Real *x_buffer = rows.take(), *s_buffer = rows.take(), *v = rows.take();
    TileNoise noise(params.noise);
    TileInput<Real> input(params.parameters, params.input());
    for (int64 tile = begin; tile < end; ++tile) {
      const int64 first = tile * kTile;
      const int64 length = std::min(kTile, shape.neurons() - first);
      input.move_to(first, length);
      load_potential<Scalar>(params, nullptr, 0, first, length, v);
      for (int64 t = 0; t < shape.steps; ++t) {
        const Real* x = read_row(params.x_seq, shape, first, length, t, x_buffer);
        Real* s = start_row(params.s_seq, shape, first, length, t, s_buffer);
        const int64 next_first = first + (t + kRowsAhead) / shape.steps * kTile,
                    next_t = (t + kRowsAhead) % shape.steps;
        const Ahead ahead = {row_ahead(params.x_seq, shape, next_first, length, next_t),
                             row_ahead(params.s_seq, shape, next_first, length, next_t), sizeof(Scalar)};
        run<Step>({neuron, params.options, params.noise.analog_below, length, input.current(x),
                   noise.row(first, length, t), v, s, ahead});
        finish_row(s, params.s_seq, shape, first, length, t);
        store_checkpoint(params, v, t + 1, first, length);
      }
      if (params.v_last != nullptr) {
        std::copy_n(v, length, params.v_last + first);
      }
    }
  });
}

// ---- backward ----

// Whether neurons that lie in turns share a value, several of each in a tile, as with one value a channel in
// channels_last. Of the tile's slots, one for each neuron, only as many as there are values are then used.
template <class Real>
bool is_folded(const ParameterView<Real>& parameter) {
  return parameter.inner == 1 && parameter.step_stride == 0 && 2 * parameter.count <= kTile;
}

// Adds the tile's row of sums, run by run, into the slots of GradientPartials.
template <class Real>
void store_partials(const GradientPartials<Real>& partials, const ParameterView<Real>& parameter, int64 tile_index,
                    int64 first, int64 length, int64 t, const Real* row) {
  Real* slots = partials.data + (parameter.step_stride != 0 ? t * partials.slots : 0) + tile_index;
  if (is_folded(parameter)) {
    std::array<double, kTile / 2> sums{};
    for (int64 i = 0; i < length; i += parameter.count) {
      run<AddLoop<Real>>({row + i, sums.data(), std::min(parameter.count, length - i)});
    }
    std::transform(sums.begin(), sums.begin() + std::min(parameter.count, length), slots + first,
                   [](double sum) { return static_cast<Real>(sum); });
    return;
  }
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
  const auto wanted = [&](ParameterId id) { return params.partials[id].data != nullptr; };
  // The potentials before each step are needed again only for the gradient of decay.
  const int64 v_rows = wanted(kDecay) ? segment + 1 : 2;

  for_each_tile_range(shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(2 * segment + v_rows + 9 + kNumParameters, kTile);
    Real *h = rows.take(segment), *s = rows.take(segment), *v = rows.take(v_rows);
    Real *x_buffer = rows.take(), *g_buffer = rows.take(), *gh_buffer = rows.take(), *scaled_g = rows.take();
    Real *dx_buffer = rows.take(), *dv = rows.take(), *dy = rows.take(), *dh = rows.take(), *zeros = rows.take();
    std::fill_n(zeros, kTile, Real(0));
    std::array<Real*, kNumParameters> sums;
    for (Real*& sum : sums) sum = rows.take();
    TileNoise noise(params.noise);
    TileNeurons<Real> neurons(params.parameters, kTile);

    for (int64 tile = begin; tile < end; ++tile) {
      const int64 first = tile * kTile;
      const int64 length = std::min(kTile, shape.neurons() - first);
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

      for (int64 start = (shape.steps - 1) / segment * segment; start >= 0; start -= segment) {
        const int64 stop = std::min(shape.steps, start + segment);
        load_potential<Scalar>(params, params.checkpoints, start, first, length, v);
        for (int64 t = start; t < stop; ++t) {
          const int64 k = t - start;
          const Real* x = read_row(params.x_seq, shape, first, length, t, x_buffer);
          neurons.move_to(first, length, t);
          run<Step>({neurons, options, params.noise.analog_below, length, x, row(v, k % v_rows),
                     noise.row(first, length, t), row(h, k), row(s, k), row(v, (k + 1) % v_rows)});
        }
        for (int64 t = stop - 1; t >= start; --t) {
          const int64 k = t - start;
          neurons.move_to(first, length, t);
          const Real* g = zeros;
          if (params.grad_s_seq != nullptr) {
            g = read_row(params.grad_s_seq, shape, first, length, t, g_buffer);
            if (options.scale_output) {
              accumulate(kThreshold, Real(1), g, {row(s, k), Real(0)}, kZero);
              run<MultiplyLoop<Real>>({g, neurons.v_threshold(), scaled_g, length});
              g = scaled_g;
            }
          }
          const Real* gh =
              params.grad_h_seq == nullptr ? zeros : read_row(params.grad_h_seq, shape, first, length, t, gh_buffer);
          if (params.grad_v_seq != nullptr) {
            const Real* gv = read_row(params.grad_v_seq, shape, first, length, t, x_buffer);
            run<Accumulate>({length, Real(1), gv, kOne, kZero, dv});
            carried = true;
          }
          if (carried) {
            accumulate(kReset, kHardReset ? Real(1) : Real(-1), dv, {row(s, k), Real(0)}, kZero);
          }
          Real* dx = start_row(params.grad_x_seq, shape, first, length, t, dx_buffer);
          run<Adjoint>({neurons, options, length, carried, g, gh, row(h, k), row(s, k), dv, dy, dh, dx});
          carried = true;
          finish_row(dx, params.grad_x_seq, shape, first, length, t);
          accumulate(kWidth, Real(1), dy, {row(h, k), Real(0)}, neurons.v_threshold());
          accumulate(kThreshold, Real(-1), dy, neurons.inverse_width(), kZero);
          accumulate(kInputMean, Real(-1), dx, kOne, kZero);
          accumulate(kDecay, Real(1), dh, {row(v, k % v_rows), Real(0)}, {nullptr, options.v_rest});
          if (wanted(kInputGain)) {
            const Real* x = read_row(params.x_seq, shape, first, length, t, x_buffer);
            accumulate(kInputGain, Real(1), dh, {x, Real(0)}, neurons.input_mean());
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

template <class Scalar, Surrogate kSurrogate, bool kHardReset>
void backward_uniform(const BackwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  using Step = UniformStepLoop<Real, kSurrogate, kHardReset, false>;
  using Adjoint = UniformAdjointLoop<Real, kSurrogate, kHardReset>;
  const SequenceShape& shape = params.shape;
  const Neuron<Real> neuron = settled_neuron<Input::kPlain>(params.parameters, 0);
  const int64 segment = segment_steps(shape.steps);
  const int64 last_start = (shape.steps - 1) / segment * segment;

  for_each_tile_range(shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(segment + 7, kTile);
    Real *h = rows.take(segment), *v = rows.take(), *dv = rows.take(), *width = rows.take(), *zeros = rows.take();
    Real *x_buffer = rows.take(), *g_buffer = rows.take(), *dx_buffer = rows.take();
    std::fill_n(zeros, kTile, Real(0));
    TileNoise noise(params.noise);
    TileInput<Real> input(params.parameters, params.input());

    for (int64 tile = begin; tile < end; ++tile) {
      const int64 first = tile * kTile;
      const int64 length = std::min(kTile, shape.neurons() - first);
      input.move_to(first, length);
      const auto h_row = [&](int64 k) { return h + k * rows.stride(); };
      bool carried = params.grad_v_last != nullptr;
      std::copy_n(carried ? params.grad_v_last + first : zeros, length, dv);
      std::fill_n(width, length, Real(0));

      for (int64 start = last_start; start >= 0; start -= segment) {
        const int64 stop = std::min(shape.steps, start + segment), steps = stop - start;
        // The rows of a segment in the order in which they are used: x forwards, then g and dx backwards; then the next
        // segment's, or the next tile's.
        const auto ahead = [&](int64 used) -> Ahead {
          const int64 next = used + kRowsAhead;
          if (next < steps) {
            return {row_ahead(params.x_seq, shape, first, length, start + next), nullptr, sizeof(Scalar)};
          }
          if (next < 2 * steps) {
            const int64 t = stop - 1 - (next - steps);
            return {row_ahead(params.grad_s_seq, shape, first, length, t),
                    row_ahead(params.grad_x_seq, shape, first, length, t), sizeof(Scalar)};
          }
          const int64 next_first = start > 0 ? first : first + kTile;
          const int64 next_start = start > 0 ? start - segment : last_start;
          const int64 t = std::min(next_start + next - 2 * steps, shape.steps - 1);
          return {row_ahead(params.x_seq, shape, next_first, length, t), nullptr, sizeof(Scalar)};
        };
        load_potential<Scalar>(params, params.checkpoints, start, first, length, v);
        for (int64 t = start; t < stop; ++t) {
          const Real* x = read_row(params.x_seq, shape, first, length, t, x_buffer);
          run<Step>({neuron, params.options, params.noise.analog_below, length, input.current(x),
                     noise.row(first, length, t), v, h_row(t - start), ahead(t - start)});
        }
        for (int64 t = stop - 1; t >= start; --t) {
          const Real* g =
              params.grad_s_seq == nullptr ? zeros : read_row(params.grad_s_seq, shape, first, length, t, g_buffer);
          Real* dx = start_row(params.grad_x_seq, shape, first, length, t, dx_buffer);
          run<Adjoint>({neuron, params.options, params.noise.analog_below, length, carried, g, h_row(t - start),
                        noise.row(first, length, t), dv, width, input.plain() ? dx : input.gradient_row(),
                        ahead(steps + stop - 1 - t)});
          carried = true;
          if (!input.plain()) {
            input.backward(read_row(params.x_seq, shape, first, length, t, x_buffer), dx);
          }
          finish_row(dx, params.grad_x_seq, shape, first, length, t);
        }
      }
      const auto wanted = [&](ParameterId id) { return params.partials[id].data != nullptr; };
      const auto store = [&](ParameterId id, const Real* sums) {
        store_partials(params.partials[id], params.parameters[id], tile, first, length, 0, sums);
      };
      if (wanted(kWidth)) store(kWidth, width);
      if (wanted(kInputGain)) store(kInputGain, input.gain_sums());
      if (wanted(kInputBias)) store(kInputBias, input.bias_sums());
      if (params.grad_v_init != nullptr) {
        std::copy_n(dv, length, params.grad_v_init + first);
      }
    }
  });
}

template <class Scalar, class F>
void with_neuron(Surrogate surrogate, bool hard_reset, const LIFParams<Scalar>& params, F&& f) {
  using Real = Real_t<Scalar>;
  with_surrogate(surrogate, [&](auto kind) {
    with_bool(hard_reset, [&](auto hard) {
      with_bool(all_uniform(params.parameters), [&](auto uniform) {
        using Neurons = std::conditional_t<uniform, UniformNeuron<Real>, NeuronRows<Real>>;
        f(kind, hard, static_cast<Neurons*>(nullptr));
      });
    });
  });
}

}  // namespace

// at::parallel_for is silently serial in code that was compiled without OpenMP: what counts is the flag of this file.
int num_threads() {
#if defined(_OPENMP)
  return at::get_num_threads();
#else
  return 1;
#endif
}

TilePlan backward_tiles(const SequenceShape& shape) { return {kTile, num_tiles(shape)}; }

template <class Scalar>
void launch_forward(Surrogate surrogate, bool hard_reset, const ForwardParams<Scalar>& given) {
  ForwardParams<Scalar> params = given;
  params.noise = given.noise.settled();
  if constexpr (std::is_same_v<Real_t<Scalar>, float>) {
    const bool only_spikes = params.v_seq == nullptr && params.h_seq == nullptr && !params.options.scale_output;
    if (only_spikes && params.input() != Input::kGeneral) {
      with_surrogate(surrogate, [&](auto kind) {
        with_bool(hard_reset, [&](auto hard) { forward_uniform<Scalar, kind, hard>(params); });
      });
      return;
    }
  }
  with_neuron<Scalar>(surrogate, hard_reset, params, [&](auto kind, auto hard, auto* neurons) {
    forward<Scalar, kind, hard, std::remove_pointer_t<decltype(neurons)>>(params);
  });
}

template <class Scalar>
void launch_backward(Surrogate surrogate, bool hard_reset, const BackwardParams<Scalar>& given) {
  BackwardParams<Scalar> params = given;
  params.noise = given.noise.settled();
  if constexpr (std::is_same_v<Real_t<Scalar>, float>) {
    const bool only_spikes =
        params.grad_v_seq == nullptr && params.grad_h_seq == nullptr && !params.options.scale_output;
    if (only_spikes && !wants_other_than_width_and_input(params) && params.input() != Input::kGeneral) {
      with_surrogate(surrogate, [&](auto kind) {
        with_bool(hard_reset, [&](auto hard) { backward_uniform<Scalar, kind, hard>(params); });
      });
      return;
    }
  }
  with_neuron<Scalar>(surrogate, hard_reset, params, [&](auto kind, auto hard, auto* neurons) {
    backward<Scalar, kind, hard, std::remove_pointer_t<decltype(neurons)>>(params);
  });
}

// For parameters that are folded: the slots in the order in which they lie in memory.
template <class Real>
void sum_folded(const GradientSum<Real>& sum) {
  const int64 count = sum.parameter.count, neurons = sum.shape.neurons();
  std::vector<double> totals(static_cast<size_t>(count), 0.0);
  for (int64 tile = 0; tile < num_tiles(sum.shape); ++tile) {
    const int64 first = tile * kTile, used = std::min(count, neurons - first);
    const Real* slots = sum.partials.data + first + tile;
    const int64 before_turn = std::min(used, count - first % count);
    run<AddLoop<Real>>({slots, totals.data() + first % count, before_turn});
    run<AddLoop<Real>>({slots + before_turn, totals.data(), used - before_turn});
  }
  for (int64 element = 0; element < count; ++element) sum.store(element, totals[static_cast<size_t>(element)]);
}

template <class Real>
void launch_gradient_sum(const GradientSum<Real>& sum) {
  if (is_folded(sum.parameter)) return sum_folded(sum);
  at::parallel_for(0, sum.elements(), 2048, [&](int64_t begin, int64_t end) {
    for (int64 element = begin; element < end; ++element) sum.store(element, sum.sum_slots(element, 0, 1));
  });
}

#define ASGL_INSTANTIATE(Scalar)                                                       \
  template void launch_forward<Scalar>(Surrogate, bool, const ForwardParams<Scalar>&); \
  template void launch_backward<Scalar>(Surrogate, bool, const BackwardParams<Scalar>&);
ASGL_INSTANTIATE(Half)
ASGL_INSTANTIATE(BFloat16)
ASGL_INSTANTIATE(float)
ASGL_INSTANTIATE(double)
#undef ASGL_INSTANTIATE
template void launch_gradient_sum<float>(const GradientSum<float>&);
template void launch_gradient_sum<double>(const GradientSum<double>&);

}  // namespace asgl::cpu
