// What a task keeps in the cache for its tile of neurons: noise, parameters, input current and state.
#pragma once

#include <ATen/Parallel.h>

#include <array>

#include "cpu/overloads.h"
#include "cpu/philox_simd.h"
#include "cpu/rows.h"

namespace asgl::cpu {

template <class Real>
struct ExpLoop {
  struct Args {
    Real* row;
    int64 length;
  };

  // Replaces a row of logarithms of widths by the widths.
  static ASGL_HOST_DEVICE void run(Args args) {
    for (int64 i = 0; i < args.length; ++i) args.row[i] = exp_within_bound(args.row[i]);
  }
};

template <class Real>
struct SigmoidLoop {
  using Args = typename ExpLoop<Real>::Args;

  // Replaces a row of logits of decays by the decays.
  static ASGL_HOST_DEVICE void run(Args args) {
    for (int64 i = 0; i < args.length; ++i) args.row[i] = sigmoid_within_bound(args.row[i]);
  }
};

// Calls task(begin, end) for ranges of tiles, on as many threads as torch.get_num_threads() allows.
template <class Task>
void for_each_tile_range(const SequenceShape& shape, Task&& task) {
  const int64 grain = std::max<int64>(1, kElementsPerTask / (kTile * shape.steps));
  at::parallel_for(0, num_tiles(shape), grain, [&](int64_t begin, int64_t end) { task(begin, end); });
}

// Sets the size and the number of the tiles.
template <class Scalar>
void plan_tiles_on(Device, LIFParams<Scalar>& params) {
  params.tiles = {kTile, num_tiles(params.shape)};
}

// Fills a row with a parameter's value, or its inverse, for each neuron of a tile at step t.
template <class Real>
void fill_parameter_row(const ParameterView<Real>& parameter, const Tile& tile, int64 t, Real* row,
                        bool inverse = false) {
  if (parameter.data != nullptr && parameter.inner == 1) {
    const Real* data = parameter.data + t * parameter.step_stride;
    for_each_stretch(tile, parameter.count, [&](int64 n, int64 offset, int64 length) {
      std::copy_n(data + n % parameter.count, length, row + offset);
    });
    if (inverse) run<InverseLoop<Real>>({row, tile.length});
    return;
  }
  const Real* values = parameter.data == nullptr ? &parameter.constant : parameter.data + t * parameter.step_stride;
  const bool one = parameter.is_same_for_all();
  run<FillRunsLoop<Real>>({values, one ? 0 : parameter.index(tile.first), parameter.count,
                           one ? Runs{tile.length, tile.length, tile.length} : tile_runs(tile, parameter.inner),
                           inverse, row});
}

// The random draws of a tile for the steps of a segment. If analog_prob is 0 or 1, nothing is drawn, and all draws are
// 0. For analog_prob = 0, no element is then analog, because analog_below is 0. For analog_prob = 1, every element is.
class TileNoise {
 public:
  explicit TileNoise(const NoiseParams& noise)
      : drawn_(noise.needs_draws()),
        key_(drawn_ ? noise_key(noise.rng_state) : NoiseKey{}),
        rows_(kCheckpointSteps, kTile / 4) {
    if (!drawn_) std::fill_n(rows_.row(0), rows_.stride(), 0);
  }

  // Returns the draws of a tile for step t, one per neuron.
  const uint16* draws(const Tile& tile, int64 t) {
    if (!drawn_) return reinterpret_cast<const uint16*>(rows_.row(0));
    if (tile.first != first_) {
      first_ = tile.first;
      pairs_.fill(-1);
    }
    const int64 pair = t / 2, slot = pair % kPairs;
    if (pairs_[slot] != pair) {
      pairs_[slot] = pair;
      run<NoiseLoop>({key_, static_cast<uint64>(tile.first / 4), (tile.length + 3) / 4, static_cast<uint32>(pair),
                      rows_.row(2 * slot), rows_.row(2 * slot + 1)});
    }
    return reinterpret_cast<const uint16*>(rows_.row(2 * slot + t % 2));
  }

  // Returns the draws for the `count` steps of a segment from step t on.
  StepRows<const uint16> draws_of_steps(const Tile& tile, int64 t, int64 count) {
    for (int64 step = t; step < t + count; ++step) draws(tile, step);
    return {draws(tile, t), drawn_ ? 4 * rows_.stride() : 0};
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

// The first `count` parameters for the neurons of a tile. Either all neurons share one value of each parameter, or each
// parameter has a row of values. Parameters are read again only if they may differ for a new tile or step.
template <class Real>
class TileNeurons {
 public:
  TileNeurons(const ParameterView<Real> (&parameters)[kNumParameters], const NeuronOptions<Real>& options, int count)
      : parameters_(parameters),
        options_(options),
        count_(count),
        rows_(all_uniform(parameters, count) ? 0 : count, kTile) {
    for (int id = 0; id < count; ++id) per_step_ = per_step_ || is_per_step(id);
    patterns_.fill({-1, -1});
  }

  // Reads the parameters for tile `tile` at step t.
  void move_to(const Tile& tile, int64 t) {
    if (tile.first == first_ && (t == t_ || !per_step_)) return;
    first_ = tile.first;
    t_ = t;
    shared_ = true;
    for (int id = 0; id < count_; ++id) {
      const ParameterView<Real>& parameter = parameters_[id];
      shared_ =
          shared_ && (parameter.is_same_for_all() || tile.first % parameter.inner + tile.length <= parameter.inner);
    }
    if (shared_) {
      values_ = make_neuron<Real>(
          [&](ParameterId id) { return parameter_value(id, parameters_[id].at(tile.first, t), options_); });
    } else {
      for (int id = 0; id < count_; ++id) fill_row(id, tile, t);
    }
  }

  // Calls f(neurons). If the neurons share all parameters, `neurons` is a UniformNeuron. Otherwise its type is
  // `Neurons`, which is NeuronRows or SettledRows.
  template <class Neurons, class F>
  void with_neurons(F&& f) const {
    if (shared_) return f(UniformNeuron<Real>{values_});
    if constexpr (std::is_same_v<Neurons, SettledRows<Real>>) {
      f(Neurons{row_[kDecay], row_[kThreshold], row_[kReset], row_[kWidth]});
    } else {
      f(Neurons{{row_[kDecay], row_[kThreshold], row_[kReset], row_[kWidth], row_[kInputGain], row_[kInputBias],
                 row_[kInputMean]}});
    }
  }
  // A parameter of the tile as an operand of loops: a row, or one value.
  Operand<Real> v_threshold() const { return operand(kThreshold, values_.v_threshold); }
  Operand<Real> inverse_width() const { return operand(kWidth, values_.inverse_width); }
  Operand<Real> input_mean() const { return operand(kInputMean, values_.input_mean); }

 private:
  bool is_per_step(int id) const { return parameters_[id].data != nullptr && parameters_[id].step_stride != 0; }
  Operand<Real> operand(ParameterId id, Real value) const { return {shared_ ? nullptr : row_[id], value}; }

  // Lets row_[id] point to the parameter's values for the tile: in place where possible, otherwise in a filled row.
  void fill_row(int id, const Tile& tile, int64 t) {
    const ParameterView<Real>& parameter = parameters_[id];
    // Tiles that start at the same phase of a parameter's pattern use the same row. A row that was filled for an
    // earlier tile is long enough, because no tile is longer than the tiles before it.
    const int64 phase = parameter.is_same_for_all() ? 0 : tile.first % (parameter.inner * parameter.count);
    const std::array<int64, 2> pattern = {phase, is_per_step(id) ? t : 0};
    if (patterns_[id] == pattern) return;
    patterns_[id] = pattern;
    const bool is_log_width = id == kWidth && options_.log_width, is_logit = id == kDecay && options_.logit_decay;
    const bool in_place = id != kWidth && !is_logit && parameter.data != nullptr && parameter.inner == 1 &&
                          phase + tile.length <= parameter.count;
    row_[id] = in_place ? parameter.data + t * parameter.step_stride + phase : rows_.row(id);
    if (in_place) return;
    fill_parameter_row(parameter, tile, t, rows_.row(id), id == kWidth && !is_log_width);
    if (is_log_width) {
      run<ExpLoop<Real>>({rows_.row(id), tile.length});
      run<InverseLoop<Real>>({rows_.row(id), tile.length});
    }
    if (is_logit) run<SigmoidLoop<Real>>({rows_.row(id), tile.length});
  }

  const ParameterView<Real>* parameters_;
  NeuronOptions<Real> options_;
  int count_;
  Rows<Real> rows_;
  bool per_step_ = false, shared_ = false;
  Neuron<Real> values_{};
  const Real* row_[kNumParameters] = {};
  std::array<std::array<int64, 2>, kNumParameters> patterns_;
  int64 first_ = -1, t_ = -1;
};

// Whether the parameter does not change over time, and its values repeat within a tile. Each neuron then has one slot
// for partial sums. A tile stores one sum for each value, at most parameter.count, in the slots of its first neurons.
template <class Real>
bool is_interleaved(const ParameterView<Real>& parameter) {
  return parameter.step_stride == 0 && parameter.is_interleaved_in(kTile);
}

// The address of the tile's first slot for partial sums, at step t if the parameter changes over time.
template <class Real>
Real* first_slot(const GradientPartials<Real>& partials, const ParameterView<Real>& parameter, const Tile& tile,
                 int64 t) {
  return partials.data + (parameter.step_stride != 0 ? t * partials.slots : 0) +
         partials.slot_index(parameter.inner, tile.first / parameter.inner, tile.index);
}

// Sums the tile's row of gradient terms, and stores the sums in the tile's slots. An interleaved parameter has one sum
// for each value. Any other parameter has one sum for each run of neurons that share a value.
template <class Real>
void store_partial_sums(const GradientPartials<Real>& partials, const ParameterView<Real>& parameter, const Tile& tile,
                        int64 t, const Real* row) {
  Real* slots = first_slot(partials, parameter, tile, t);
  if (is_interleaved(parameter)) {
    std::array<double, kTile / 2> sums{};
    for (int64 i = 0; i < tile.length; i += parameter.count) {
      run<AddLoop<Real>>({row + i, sums.data(), std::min(parameter.count, tile.length - i)});
    }
    std::transform(sums.begin(), sums.begin() + std::min(parameter.count, tile.length), slots,
                   [](double sum) { return static_cast<Real>(sum); });
    return;
  }
  if (parameter.inner == 1) {
    std::copy_n(row, tile.length, slots);
    return;
  }
  run<RunSumsLoop<Real>>({row, tile_runs(tile, parameter.inner), slots});
}

// The input current of a tile, for a gain, bias and mean that do not change over time. The current is x itself (a plain
// input) if these parameters change nothing and there is no residual. If long stretches of neurons share the
// parameters, loops use scalars. Otherwise loops use rows. If the parameters repeat within a tile, a row may contain
// only one or a few periods, to save cache.
template <class Real>
class TileInput {
 public:
  template <class Scalar>
  explicit TileInput(const LIFParams<Scalar>& params)
      : parameters_(params.parameters),
        residual_gain_(params.residual_gain),
        plain_(params.is_input_plain() && params.residual == nullptr),
        rows_(plain_ ? 0 : 5, kTile),
        tile_(params.shape, 0) {
    if (plain_) return;
    for (Real** row : {&gain_, &bias_, &mean_, &gain_sum_, &bias_sum_}) *row = rows_.allocate();
    bool alike = true;  // whether all non-uniform parameters have the same inner and count
    for (int id = kInputGain; id < kNumParameters; ++id) {
      const ParameterView<Real>& parameter = parameters_[id];
      if (parameter.is_uniform()) continue;
      alike = alike && (inner_ == 0 || (parameter.inner == inner_ && parameter.count == count_));
      inner_ = parameter.inner;
      count_ = parameter.count;
    }
    // Rows are used if the parameters are not alike, or if stretches are shorter than two blocks of kInputSums neurons.
    in_rows_ = !alike || (inner_ > 0 && inner_ < 2 * kInputSums);
    if (alike && inner_ == 1 && count_ <= kTile) period_ = std::max<int64>(1, kInputSums / count_) * count_;
  }

  // Whether the current is x itself.
  bool is_plain() const { return plain_; }

  // Reads the parameters for a tile. Rows shorter than a tile are kept if the tile before started at the same position
  // of the period.
  void move_to(const Tile& tile) {
    if (plain_) return;
    const bool same_rows = filled_ && period_ < kTile && tile.first % count_ == tile_.first % count_;
    tile_ = tile;
    if (in_rows_ && !same_rows) {
      filled_ = true;
      Tile period = tile;
      period.length = period_;
      fill_parameter_row(parameters_[kInputGain], period, 0, gain_);
      fill_parameter_row(parameters_[kInputBias], period, 0, bias_);
      fill_parameter_row(parameters_[kInputMean], period, 0, mean_);
    }
  }

  // Sets the sums of the gradients of gain and bias to 0, before the steps of a tile.
  void clear_sums() {
    if (plain_) return;
    std::fill_n(gain_sum_, kTile, Real(0));
    std::fill_n(bias_sum_, kTile, Real(0));
  }

  // Computes a row of the current from a row of x, for an input that is not plain. `residual` is null without a
  // residual.
  void compute_current(const Real* x, const Real* residual, Real* current) {
    residual == nullptr ? compute_current_row<false>(x, nullptr, current)
                        : compute_current_row<true>(x, residual, current);
  }

  // Computes a row of dx from dc, a row of the gradient of the current, for an input that is not plain. Adds the row's
  // terms to the sums for the gradients of gain and bias.
  void compute_input_gradient(const Real* x, const Real* dc, Real* dx) {
    if (in_rows_) {
      run<InputCurrentAdjointLoop<Real, true>>({x, dc, rows(), gain_sum_, bias_sum_, dx, tile_.length});
    } else {
      for_each_shared_stretch(
          [&](int64 stretch, int64 i, int64 length, const InputParameters<Real, false>& parameters) {
            const int64 sum = stretch * kInputSums;
            run<InputCurrentAdjointLoop<Real, false>>(
                {x + i, dc + i, parameters, gain_sum_ + sum, bias_sum_ + sum, dx + i, length});
          });
    }
  }

  // Stores the tile's partial sums of the gradient of kInputGain or kInputBias. If loops use scalars, gain_ is not a
  // row of the gain, and serves as a buffer here.
  void store_partial_sums(ParameterId id, const GradientPartials<Real>& partials) {
    const ParameterView<Real>& parameter = parameters_[id];
    const Real* sums = id == kInputGain ? gain_sum_ : bias_sum_;
    if (in_rows_) {
      Tile repeated = tile_;
      if (is_interleaved(parameter)) repeated.length = std::min(period_, tile_.length);
      return cpu::store_partial_sums(partials, parameter, repeated, 0, sums);
    }
    const bool by_stretch = parameter.inner == inner_;
    Real* slots = by_stretch ? first_slot(partials, parameter, tile_, 0) : gain_;
    if (!by_stretch) std::fill_n(gain_, kTile, Real(0));
    for_each_shared_stretch([&](int64 stretch, int64 first, auto&&...) {
      double sum;
      run<SumLoop<Real>>({sums + stretch * kInputSums, kInputSums, &sum});
      slots[by_stretch ? stretch : first] = static_cast<Real>(sum);
    });
    if (!by_stretch) cpu::store_partial_sums(partials, parameter, tile_, 0, gain_);
  }

 private:
  // compute_current, compiled with a residual and without.
  template <bool kResidual>
  void compute_current_row(const Real* x, const Real* residual, Real* current) {
    if (in_rows_) {
      run<InputCurrentLoop<Real, true, kResidual>>({x, residual, residual_gain_, rows(), current, tile_.length});
    } else {
      for_each_shared_stretch([&](int64, int64 i, int64 length, const InputParameters<Real, false>& parameters) {
        run<InputCurrentLoop<Real, false, kResidual>>(
            {x + i, kResidual ? residual + i : nullptr, residual_gain_, parameters, current + i, length});
      });
    }
  }

  // The parameters of the input as rows.
  InputParameters<Real, true> rows() const { return {{gain_, Real(0)}, {bias_, Real(0)}, {mean_, Real(0)}, period_}; }

  // Calls f(stretch, offset, length, parameters) for each stretch of neurons that share the parameters of the input.
  template <class F>
  void for_each_shared_stretch(F&& f) {
    int64 stretch = 0;
    for_each_stretch(tile_, inner_ == 0 ? kTile : inner_, [&](int64 n, int64 offset, int64 length) {
      const auto at = [&](ParameterId id) { return Operand<Real>{nullptr, parameters_[id].at(n, 0)}; };
      f(stretch++, offset, length,
        InputParameters<Real, false>{at(kInputGain), at(kInputBias), at(kInputMean), kInputSums});
    });
  }

  const ParameterView<Real>* parameters_;
  Real residual_gain_;
  bool plain_, in_rows_ = false;
  int64 inner_ = 0, count_ = 1;  // inner and count of the non-uniform parameters; inner is 0 if there are none
  // The length of the rows. It is kTile, unless gain, bias and mean repeat every count_ neurons. In that case it is the
  // largest multiple of count_ that is at most kInputSums, or count_ itself if count_ is larger.
  int64 period_ = kTile;
  Rows<Real> rows_;
  Real *gain_ = nullptr, *bias_ = nullptr, *mean_ = nullptr;
  Real *gain_sum_ = nullptr, *bias_sum_ = nullptr;
  Tile tile_;
  bool filled_ = false;
};

// The input of the general loops, which is x, or the current if there is a residual. For a current, loops need neurons
// with gain 1, bias 0 and mean 0.
template <class Scalar>
class GeneralInput {
  using Real = Real_t<Scalar>;

 public:
  explicit GeneralInput(const LIFParams<Scalar>& params)
      : params_(params), rows_(params.residual == nullptr ? 0 : 4, kTile) {
    if (params.residual == nullptr) return;
    for (Real** row : {&buffer_, &current_, &ones_, &zeros_}) *row = rows_.allocate();
    std::fill_n(ones_, kTile, Real(1));
    std::fill_n(zeros_, kTile, Real(0));
  }

  // Calls f(neurons, row). Without a residual, these are the given neurons and x. With a residual, they are the neurons
  // with gain 1, bias 0 and mean 0, and the current.
  template <class Neurons, class F>
  void with_input(const Tile& tile, int64 t, const Real* x, const Neurons& neurons, F&& f) {
    if (params_.residual == nullptr) return f(neurons, x);
    const Real* residual = read_row(params_.residual, tile, t, buffer_);
    run<ResidualCurrentLoop<Real, Neurons>>({neurons, x, residual, params_.residual_gain, current_, tile.length});
    f(with_unit_gain(neurons), current_);
  }

 private:
  // The neurons with gain 1, bias 0 and mean 0, for an input that is already the current.
  UniformNeuron<Real> with_unit_gain(UniformNeuron<Real> neuron) const {
    neuron.values.input_gain = Real(1);
    neuron.values.input_bias = neuron.values.input_mean = Real(0);
    return neuron;
  }
  NeuronRows<Real> with_unit_gain(NeuronRows<Real> neurons) const {
    neurons.row.input_gain = ones_;
    neurons.row.input_bias = neurons.row.input_mean = zeros_;
    return neurons;
  }

  const LIFParams<Scalar>& params_;
  Rows<Real> rows_;
  Real *buffer_ = nullptr, *current_ = nullptr, *ones_ = nullptr, *zeros_ = nullptr;
};

// Reads a row of a state, which begins at from[offset]. If `from` is null, fills the row with `otherwise`.
template <class Real>
void load_state(const Real* from, int64 offset, Real otherwise, int64 length, Real* row) {
  if (from == nullptr) return run<FillLoop<Real>>({otherwise, row, length});
  std::copy_n(from + offset, length, row);
}

// Stores a row of a state at to[offset], unless `to` is null.
template <class Real>
void store_state(const Real* row, int64 length, Real* to, int64 offset) {
  if (to != nullptr) std::copy_n(row, length, to + offset);
}

// The offset of the tile's v after `steps` steps in the checkpoints.
inline int64 checkpoint_offset(const Tile& tile, int64 steps) {
  return (steps / kCheckpointSteps - 1) * tile.shape.neurons() + tile.first;
}

// A row for each state of a model, v first. At rest v is v_rest, and other states are 0.
template <size_t kNumStates, class Real>
using StateRows = std::array<Real*, kNumStates>;

// Returns {v}, or for models with two states {v, second}.
template <class Model, class Real>
StateRows<Model::kNumStates, Real> state_rows(Real* v, Real* second) {
  if constexpr (Model::kNumStates == 1) {
    return {v};
  } else {
    return {v, second};
  }
}

// Reads the states of a tile from an array [kNumStates, elements]. If the array is null, the neurons are at rest.
template <size_t kNumStates, class Real>
void load_states(const Real* from, int64 elements, int64 offset, Real v_rest, int64 length,
                 const StateRows<kNumStates, Real>& rows) {
  for (size_t k = 0; k < kNumStates; ++k) {
    load_state(from, static_cast<int64>(k) * elements + offset, k == 0 ? v_rest : Real(0), length, rows[k]);
  }
}

// Stores the states of a tile in an array [kNumStates, elements], unless the array is null.
template <size_t kNumStates, class Real>
void store_states(const StateRows<kNumStates, Real>& rows, int64 length, Real* to, int64 elements, int64 offset) {
  for (size_t k = 0; k < kNumStates; ++k) {
    store_state(rows[k], length, to, static_cast<int64>(k) * elements + offset);
  }
}

// Reads the states before step `start`, the first step of a segment. They are in a checkpoint, or are the initial
// states if `start` is 0.
template <size_t kNumStates, class Scalar>
void load_start_states(const BackwardParams<Scalar>& params, const Tile& tile, int64 start,
                       const StateRows<kNumStates, Real_t<Scalar>>& rows) {
  const auto load = [&](const Real_t<Scalar>* from, int64 elements, int64 offset) {
    load_states(from, elements, offset, params.options.v_rest, tile.length, rows);
  };
  start > 0 ? load(params.checkpoints, checkpoint_stride(tile.shape), checkpoint_offset(tile, start))
            : load(params.v_init, tile.shape.neurons(), tile.first);
}

}  // namespace asgl::cpu
