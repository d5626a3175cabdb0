// The CPU kernels of the neuron. The state of a tile of neurons stays in the cache, with steps as the outer loop and
// neurons as the inner one (cpu/loops.h).
#include <vector>

#include "cpu/tile.h"

namespace asgl::cpu {
namespace {

int64 segment_steps(int64 steps) { return steps <= 4 ? 4 : steps <= 8 ? 8 : kCheckpointSteps; }

template <class Params>
bool is_per_step(const Params& params) {
  return std::any_of(std::begin(params.parameters), std::end(params.parameters),
                     [](const auto& each) { return each.data != nullptr && each.step_stride != 0; });
}

// Adaptive neurons with rows of parameters: half a tile at a time, 14 rows of 2 KiB, which the L1 cache holds.
template <class Model, class Params>
int64 parts_of_tile(const Params& params) {
  return Model::kAdapts && !all_uniform(params.parameters) && !is_per_step(params) ? 2 : 1;
}

// ---- forward ----

// `shift`: elements between the checkpoints of v and those of this row, 0 or to those of w.
template <class Scalar>
void store_checkpoint(const ForwardParams<Scalar>& params, const Tile& tile, int64 steps, const Real_t<Scalar>* row,
                      int64 shift = 0) {
  if (steps % kCheckpointSteps == 0 && steps < params.shape.steps) {
    store_state(row, tile.length, behind(params.checkpoints, shift), checkpoint(tile, steps));
  }
}

// Row t of the residual; null without one.
template <class Scalar>
const Real_t<Scalar>* read_residual(const LIFParams<Scalar>& params, const Tile& tile, int64 t,
                                    Real_t<Scalar>* buffer) {
  return params.residual == nullptr ? nullptr : read_row(params.residual, tile, t, buffer);
}

template <class Model, class Scalar>
void run_general(const ForwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(5, kTile);
    Real *x_buffer = rows.take(), *s_buffer = rows.take(), *h_buffer = rows.take();
    Real *v = rows.take(), *w = rows.take();
    const int64 all = params.shape.neurons();
    TileNoise noise(params.noise);
    TileNeurons<Real> neurons(params.parameters, params.options, kNumParameters);
    GeneralInput<Scalar> input(params);
    const int64 parts = parts_of_tile<Model>(params), size = kTile / parts;
    for (int64 index = begin * parts; index < end * parts && index * size < all; ++index) {
      const Tile tile(params.shape, index, size);
      load_state(params.v_init, tile.first, params.options.v_rest, tile.length, v);
      if (Model::kAdapts) load_state(behind(params.v_init, all), tile.first, Real(0), tile.length, w);
      for (int64 t = 0; t < params.shape.steps; ++t) {
        const Real* x = read_row(params.x_seq, tile, t, x_buffer);
        Real* s = start_row(params.s_seq, tile, t, s_buffer);
        Real* h = start_row(params.h_seq, tile, t, h_buffer);
        const int64 later_t = (t + kRowsAhead) % params.shape.steps;
        const Tile later(params.shape, index + (t + kRowsAhead) / params.shape.steps, size);
        const Ahead ahead = {sizeof(Scalar),
                             {row_ahead(params.x_seq, later, later_t)},
                             {written_row_ahead(params.s_seq, later, later_t)}};
        neurons.move_to(tile, t);
        neurons.template visit<NeuronRows<Real>>([&](auto given) {
          input.visit(tile, t, x, given, [&](auto values, const Real* in) {
            run<StepLoop<Real, Model, decltype(values)>>({values, params.options, params.noise.analog_below,
                                                          tile.length, in, noise.row(tile, t), v, v, h, s, ahead, w, w,
                                                          /*compared=*/true});
          });
        });
        if (Model::kAdapts) store_checkpoint(params, tile, t + 1, w, checkpoint_stride(params.shape));
        if (params.options.scale_output) {
          run<MultiplyLoop<Real>>({s, neurons.v_threshold(), s_buffer, tile.length});
          s = s_buffer;
        }
        finish_row(s, params.s_seq, tile, t);
        finish_row(h, params.h_seq, tile, t);
        finish_row(v, params.v_seq, tile, t);
        store_checkpoint(params, tile, t + 1, v);
      }
      store_state(v, tile.length, params.v_last, tile.first);
      if (Model::kAdapts) store_state(w, tile.length, behind(params.v_last, all), tile.first);
    }
  });
}

template <class Model, class Scalar>
void run_settled(const ForwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const int64 steps = params.shape.steps;
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(4, kTile);
    Real *x_buffer = rows.take(), *s_buffer = rows.take(), *r_buffer = rows.take(), *v = rows.take();
    TileNoise noise(params.noise);
    TileNeurons<Real> neurons(params.parameters, params.options, kInputGain);
    TileInput<Real> input(params);
    for (int64 index = begin; index < end; ++index) {
      const Tile tile(params.shape, index);
      neurons.move_to(tile, 0);
      input.move_to(tile);
      load_state(params.v_init, tile.first, params.options.v_rest, tile.length, v);
      for (int64 t = 0; t < steps; ++t) {
        const Real* x = read_row(params.x_seq, tile, t, x_buffer);
        Real* s = start_row(params.s_seq, tile, t, s_buffer);
        const int64 next_t = (t + kRowsAhead) % steps;
        const Tile next(params.shape, index + (t + kRowsAhead) / steps);
        const Ahead ahead = {sizeof(Scalar),
                             {row_ahead(params.x_seq, next, next_t), row_ahead(params.residual, next, next_t)},
                             {written_row_ahead(params.s_seq, next, next_t)}};
        const Real* current = input.current(x, read_residual(params, tile, t, r_buffer));
        neurons.template visit<SettledRows<Real>>([&](auto values) {
          run<SettledStepLoop<Real, Model, decltype(values), true>>({values, params.options, params.noise.analog_below,
                                                                     tile.length, current, noise.row(tile, t), v, v, s,
                                                                     ahead});
        });
        finish_row(s, params.s_seq, tile, t);
        store_checkpoint(params, tile, t + 1, v);
      }
      store_state(v, tile.length, params.v_last, tile.first);
    }
  });
}

// ---- backward ----

// States kept of a segment: only the gradient of the decay needs the state before each step.
template <class Scalar>
int64 kept_states(const BackwardParams<Scalar>& params, int64 segment) {
  return params.wants(kDecay) ? segment + 1 : 1;
}

template <class Backward, class Scalar>
void run_backward(const BackwardParams<Scalar>& params) {
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    Backward backward(params);
    for (int64 index = begin; index < end; ++index) backward.run(Tile(params.shape, index));
  });
}

template <class Model, class Scalar>
class GeneralBackward {
  using Real = Real_t<Scalar>;

 public:
  explicit GeneralBackward(const BackwardParams<Scalar>& params) : params_(params) {
    std::fill_n(zeros_, kTile, Real(0));
  }

  void run(const Tile& tile) {
    whole_ = tile;
    for (int id = 0; id < kNumParameters; ++id) clear(id);
    for (int64 part = 0; part < parts_ && part * kTile / parts_ < tile.length; ++part) {
      run_part(Tile(tile.shape, tile.index * parts_ + part, kTile / parts_));
    }
    for (int id = 0; id < kNumParameters; ++id) {
      if (params_.wants(id) && params_.parameters[id].step_stride == 0) store(id, 0);
    }
  }

 private:
  void run_part(const Tile& tile) {
    tile_ = tile;
    load_state(params_.grad_v_last, tile.first, Real(0), tile.length, dv_);
    const int64 all = params_.shape.neurons();
    if (Model::kAdapts) load_state(behind(params_.grad_v_last, all), tile.first, Real(0), tile.length, dw_);
    carried_ = params_.grad_v_last != nullptr;
    const int64 steps = params_.shape.steps;
    for (int64 start = (steps - 1) / segment_ * segment_; start >= 0; start -= segment_) {
      const int64 stop = std::min(steps, start + segment_);
      compute_potentials(start, stop);
      for (int64 t = stop - 1; t >= start; --t) walk_back(t, t - start);
    }
    store_state(dv_, tile.length, params_.grad_v_init, tile.first);
    if (Model::kAdapts) store_state(dw_, tile.length, behind(params_.grad_v_init, all), tile.first);
  }

  Real* row(Real* rows, int64 k) const { return rows + k * rows_.stride(); }
  Real* v(int64 k) const { return row(v_, k % states_); }
  Ahead ahead(const Scalar* read, const Scalar* written, int64 t) const {
    if (t < 0 || t >= params_.shape.steps) return {};
    return {sizeof(Scalar), {row_ahead(read, tile_, t)}, {written_row_ahead(written, tile_, t)}};
  }
  // Row k of the adaptation; null for other models.
  Real* w(int64 k) const { return Model::kAdapts ? row(w_, k % w_states_) : nullptr; }
  bool wants(int begin, int end) const {
    return std::any_of(params_.partials + begin, params_.partials + end, [](const auto& each) { return each.data; });
  }
  Real* sums(int id) const { return row(sums_, id) + (tile_.first - whole_.first); }
  void clear(int id) { std::fill_n(row(sums_, id), whole_.length, Real(0)); }
  void store(int id, int64 t) {
    store_partials(params_.partials[id], params_.parameters[id], whole_, t, row(sums_, id));
  }
  void accumulate(ParameterId id, Real factor, const Real* a, Operand<Real> b, Operand<Real> c) {
    if (params_.wants(id)) cpu::run<AccumulateLoop<Real>>({tile_.length, factor, a, b, c, sums(id)});
  }

  void compute_potentials(int64 start, int64 stop) {
    load_start(params_, tile_, start, v(0), w(0));
    for (int64 t = start; t < stop; ++t) {
      const int64 k = t - start;
      const Real* x = read_row(params_.x_seq, tile_, t, x_buffer_);
      neurons_.move_to(tile_, t);
      neurons_.template visit<NeuronRows<Real>>([&](auto given) {
        input_.visit(tile_, t, x, given, [&](auto neurons, const Real* in) {
          cpu::run<StepLoop<Real, Model, decltype(neurons)>>(
              {neurons, params_.options, params_.noise.analog_below, tile_.length, in, noise_.row(tile_, t), v(k),
               v(k + 1), row(h_, k), row(s_, k), ahead(params_.x_seq, nullptr, t + kRowsAhead), w(k), w(k + 1)});
        });
      });
    }
  }

  // Step t, step k of its segment.
  void walk_back(int64 t, int64 k) {
    neurons_.move_to(tile_, t);
    const Real* g = zeros_;
    if (params_.grad_s_seq != nullptr) {
      g = read_row(params_.grad_s_seq, tile_, t, g_buffer_);
      if (params_.options.scale_output) {
        accumulate(kThreshold, Real(1), g, {row(s_, k), Real(0)}, kZero);
        cpu::run<MultiplyLoop<Real>>({g, neurons_.v_threshold(), scaled_g_, tile_.length});
        g = scaled_g_;
      }
    }
    const Real* gh = params_.grad_h_seq == nullptr ? zeros_ : read_row(params_.grad_h_seq, tile_, t, gh_buffer_);
    if (params_.grad_v_seq != nullptr) {
      const Real* gv = read_row(params_.grad_v_seq, tile_, t, x_buffer_);
      cpu::run<AccumulateLoop<Real>>({tile_.length, Real(1), gv, kOne, kZero, dv_});
      carried_ = true;
    }
    Real* dx = start_row(params_.grad_x_seq, tile_, t, dx_buffer_);
    neurons_.template visit<NeuronRows<Real>>([&](auto neurons) {
      const auto adjoint = [&](auto kSums) {
        cpu::run<AdjointLoop<Real, Model, decltype(neurons), kSums()>>(
            {.neurons = neurons,
             .options = params_.options,
             .length = tile_.length,
             .carried = carried_,
             .g = g,
             .gh = gh,
             .h = row(h_, k),
             .s = row(s_, k),
             .dv = dv_,
             .d_reset = d_reset_,
             .distance = distance_,
             .dy = dy_,
             .dh = dh_,
             .dx = dx,
             .ahead = ahead(params_.grad_s_seq, params_.grad_x_seq, t - kRowsAhead),
             .v = v(k),
             .w = w(k),
             .dw = dw_,
             .sums = sums(0)});
      };
      if constexpr (Model::kAdapts) {
        if (wants(kDecay, kInputGain)) return adjoint(std::integral_constant<Sums, Sums::kAll>{});
        if (wants(kAdaptDecay, kNumParameters)) return adjoint(std::integral_constant<Sums, Sums::kAdaptation>{});
        adjoint(std::integral_constant<Sums, Sums::kWidth>{});
      } else {
        adjoint(std::integral_constant<Sums, Sums::kNone>{});
      }
    });
    finish_row(dx, params_.grad_x_seq, tile_, t);
    finish_row(dh_, params_.grad_residual, tile_, t);
    if (carried_) accumulate(kReset, Real(1), d_reset_, kOne, kZero);
    if (!Model::kAdapts) add_gradients(t, k, dx);
    carried_ = true;
    store_step(t);
  }

  void add_gradients(int64 t, int64 k, const Real* dx) {
    accumulate(kWidth, Real(1), dy_, {distance_, Real(0)}, kZero);
    accumulate(kThreshold, Real(-1), dy_, neurons_.inverse_width(), kZero);
    accumulate(kDecay, Real(1), dh_, {v(k), Real(0)}, {nullptr, params_.options.v_rest});
    accumulate(kInputMean, Real(-1), dx, kOne, kZero);
    if (params_.wants(kInputGain)) {
      const Real* x = read_row(params_.x_seq, tile_, t, x_buffer_);
      accumulate(kInputGain, Real(1), dh_, {x, Real(0)}, neurons_.input_mean());
    }
    accumulate(kInputBias, Real(1), dh_, kOne, kZero);
  }

  // The sums of step t.
  void store_step(int64 t) {
    for (int id = 0; id < kNumParameters; ++id) {
      if (params_.wants(id) && params_.parameters[id].step_stride != 0) {
        store(id, t);
        clear(id);
      }
    }
  }

  static constexpr Operand<Real> kZero = {nullptr, Real(0)}, kOne = {nullptr, Real(1)};

  const BackwardParams<Scalar>& params_;
  const int64 segment_ = segment_steps(params_.shape.steps), states_ = kept_states(params_, segment_);
  // Of an adaptation that is subtracted from the current, backward reads only what the gradient of its decay takes.
  const int64 w_states_ =
      params_.wants(kAdaptDecay) || !AdaptiveLIF<Real>::of(params_.options).in_current() ? segment_ + 1 : 1;
  const int64 w_rows_ = Model::kAdapts ? w_states_ + 1 : 0;
  Rows<Real> rows_{2 * segment_ + states_ + 11 + kNumParameters + w_rows_, kTile};
  Real *const h_ = rows_.take(segment_), *const s_ = rows_.take(segment_), *const w_ = rows_.take(w_rows_);
  Real *const dw_ = w_ + w_states_ * rows_.stride(), *const v_ = rows_.take(states_), *const dv_ = rows_.take();
  Real *const x_buffer_ = rows_.take(), *const g_buffer_ = rows_.take(), *const gh_buffer_ = rows_.take();
  Real *const scaled_g_ = rows_.take(), *const dx_buffer_ = rows_.take(), *const dy_ = rows_.take();
  Real *const dh_ = rows_.take(), *const zeros_ = rows_.take(), *const d_reset_ = rows_.take();
  Real *const distance_ = rows_.take(), *const sums_ = rows_.take(kNumParameters);
  TileNoise noise_{params_.noise};
  TileNeurons<Real> neurons_{params_.parameters, params_.options, kNumParameters};
  GeneralInput<Scalar> input_{params_};
  const int64 parts_ = parts_of_tile<Model>(params_);
  Tile whole_{params_.shape, 0}, tile_{params_.shape, 0};
  bool carried_ = false;
};

template <class Model, class Scalar>
class SettledBackward {
  using Real = Real_t<Scalar>;

 public:
  explicit SettledBackward(const BackwardParams<Scalar>& params) : params_(params) {
    std::fill_n(zeros_, kTile, Real(0));
  }

  void run(const Tile& tile) {
    tile_ = tile;
    neurons_.move_to(tile, 0);
    input_.move_to(tile);
    load_state(params_.grad_v_last, tile.first, Real(0), tile.length, dv_);
    for (int id = 0; id < (more_ ? kInputGain : kDecay); ++id) std::fill_n(sums(id), tile.length, Real(0));
    carried_ = params_.grad_v_last != nullptr;
    for (int64 start = last_start_; start >= 0; start -= segment_) {
      const int64 stop = std::min(params_.shape.steps, start + segment_);
      compute_potentials(start, stop);
      walk_back(start, stop);
    }
    for (int id = 0; id < kInputGain; ++id) store(id, sums(id));
    store(kInputGain, input_.gain_sums());
    store(kInputBias, input_.bias_sums());
    store_state(dv_, tile.length, params_.grad_v_init, tile.first);
  }

 private:
  Real* h(int64 k) const { return h_ + k * rows_.stride(); }
  Real* sums(int id) const { return sums_ + id * rows_.stride(); }
  Real* v(int64 k) const { return v_ + k % states_ * rows_.stride(); }
  void store(int id, const Real* sums) {
    if (params_.wants(id)) store_partials(params_.partials[id], params_.parameters[id], tile_, 0, sums);
  }

  // The rows of kRowsAhead rows after row `used` of a segment: x forward, g and dx backward, then x of the next segment
  // or tile.
  Ahead ahead(int64 start, int64 stop, int64 used) const {
    const int64 next = used + kRowsAhead, steps = stop - start;
    const auto input = [&](const Tile& tile, int64 t) {
      return Ahead{sizeof(Scalar), {row_ahead(params_.x_seq, tile, t), row_ahead(params_.residual, tile, t)}};
    };
    if (next < steps) return input(tile_, start + next);
    if (next < 2 * steps) {
      const int64 t = stop - 1 - (next - steps);
      return {sizeof(Scalar),
              {row_ahead(params_.grad_s_seq, tile_, t)},
              {written_row_ahead(params_.grad_x_seq, tile_, t), written_row_ahead(params_.grad_residual, tile_, t)}};
    }
    const int64 next_start = start > 0 ? start - segment_ : last_start_;
    const int64 t = std::min(next_start + next - 2 * steps, params_.shape.steps - 1);
    return input(start > 0 ? tile_ : Tile(params_.shape, tile_.index + 1), t);
  }

  void compute_potentials(int64 start, int64 stop) {
    load_start(params_, tile_, start, v(0));
    for (int64 t = start; t < stop; ++t) {
      const int64 k = t - start;
      const Real* x = read_row(params_.x_seq, tile_, t, x_buffer_);
      const Real* current = input_.current(x, read_residual(params_, tile_, t, r_buffer_));
      neurons_.template visit<SettledRows<Real>>([&](auto neurons) {
        cpu::run<SettledStepLoop<Real, Model, decltype(neurons), false>>(
            {neurons, params_.options, params_.noise.analog_below, tile_.length, current, noise_.row(tile_, t), v(k),
             v(k + 1), h(k), ahead(start, stop, k)});
      });
    }
  }

  void walk_back(int64 start, int64 stop) {
    for (int64 t = stop - 1; t >= start; --t) {
      const Real* g = params_.grad_s_seq == nullptr ? zeros_ : read_row(params_.grad_s_seq, tile_, t, g_buffer_);
      Scalar* const grad_x_seq = params_.grad_x_seq;
      Scalar* const grad_residual = params_.grad_residual;
      Real* dx = start_row(dx_is_dc_ && grad_x_seq == nullptr ? grad_residual : grad_x_seq, tile_, t, dx_buffer_);
      Real* dc = dx_is_dc_ ? dx : start_row(grad_residual, tile_, t, input_.gradient_row());
      neurons_.template visit<SettledRows<Real>>([&](auto neurons) {
        const auto adjoint = [&](auto kMore) {
          cpu::run<SettledAdjointLoop<Real, Model, decltype(neurons), kMore()>>(
              {.neurons = neurons,
               .options = params_.options,
               .analog_below = params_.noise.analog_below,
               .length = tile_.length,
               .carried = carried_,
               .g = g,
               .h = h(t - start),
               .draws = noise_.row(tile_, t),
               .dv = dv_,
               .v = v(t - start),
               .width = sums(kWidth),
               .decay = sums(kDecay),
               .threshold = sums(kThreshold),
               .reset = sums(kReset),
               .d_current = dc,
               .ahead = ahead(start, stop, 2 * stop - start - 1 - t)});
        };
        more_ ? adjoint(std::true_type{}) : adjoint(std::false_type{});
      });
      carried_ = true;
      if (!dx_is_dc_) input_.backward(read_row(params_.x_seq, tile_, t, x_buffer_), dc, dx);
      finish_row(dx, grad_x_seq, tile_, t);
      finish_row(dc, grad_residual, tile_, t);
    }
  }

  const BackwardParams<Scalar>& params_;
  const int64 segment_ = segment_steps(params_.shape.steps), states_ = kept_states(params_, segment_);
  const int64 last_start_ = (params_.shape.steps - 1) / segment_ * segment_;
  const bool more_ = params_.wants(kDecay) || params_.wants(kThreshold) || params_.wants(kReset);
  const bool dx_is_dc_ = params_.is_input_plain();
  Rows<Real> rows_{segment_ + states_ + 6 + kInputGain, kTile};
  Real *const h_ = rows_.take(segment_), *const v_ = rows_.take(states_), *const dv_ = rows_.take();
  Real *const sums_ = rows_.take(kInputGain), *const zeros_ = rows_.take();
  Real *const x_buffer_ = rows_.take(), *const g_buffer_ = rows_.take(), *const dx_buffer_ = rows_.take();
  Real* const r_buffer_ = rows_.take();
  TileNoise noise_{params_.noise};
  TileNeurons<Real> neurons_{params_.parameters, params_.options, kInputGain};
  TileInput<Real> input_{params_};
  Tile tile_{params_.shape, 0};
  bool carried_ = false;
};

template <class Model, class Scalar>
void run_general(const BackwardParams<Scalar>& params) {
  run_backward<GeneralBackward<Model, Scalar>>(params);
}

template <class Model, class Scalar>
void run_settled(const BackwardParams<Scalar>& params) {
  run_backward<SettledBackward<Model, Scalar>>(params);
}

// ---- launchers ----

// Whether the settled loops compute all wanted outputs, apart from gradients of the input's parameters.
template <class Scalar>
bool settled_suffices(const ForwardParams<Scalar>& params) {
  return params.v_seq == nullptr && params.h_seq == nullptr;
}
template <class Scalar>
bool settled_suffices(const BackwardParams<Scalar>& params) {
  return params.grad_v_seq == nullptr && params.grad_h_seq == nullptr &&
         !(params.wants(kReset) && params.options.hard_reset);
}

template <class Scalar>
bool only_width(const BackwardParams<Scalar>& params) {
  return !params.wants(kDecay) && !params.wants(kThreshold) && !params.wants(kReset) && !params.wants(kInputMean);
}
bool only_width(const auto&) { return true; }

// With a gain, bias or mean of the input, the other parameters must be uniform, and only width, gain and bias may want
// gradients: the settled kernels sum gradients of gain and bias in another order than the general ones.
template <class Params>
bool is_settled(const Params& params) {
  if (!params.is_input_plain()) {
    return only_width(params) && settled_suffices(params) && !params.options.scale_output &&
           params.input() == Input::kNormalised && all_uniform(params.parameters, kInputGain);
  }
  return !is_per_step(params) && settled_suffices(params) && params.options.v_rest == 0 && !params.options.scale_output;
}

template <class Params>
void run_model(Params params) {
  using Real = typename Params::Real;
  params.noise = params.noise.resolved();
  if (params.options.adapts()) return run_general<AdaptiveLIF<Real>>(params);
  with_model(params.options, [&](auto model) {
    using Model = decltype(model);
    if constexpr (std::is_same_v<Real, float> && !Model::kOnlyGeneral) {
      if (is_settled(params)) return run_settled<Model>(params);
    }
    run_general<Model>(params);
  });
}

// Sums the slots of an interleaved parameter in memory order.
template <class Real>
void sum_interleaved(const GradientSum<Real>& sum, const GradientPart<Real>& part) {
  const int64 count = part.parameter.count;
  std::vector<double> totals(static_cast<size_t>(count), 0.0);
  for (int64 index = 0; index < num_tiles(sum.shape); ++index) {
    const Tile tile(sum.shape, index);
    const Real* slots = part.partials.data + tile.first;
    const int64 used = std::min(count, tile.length), turn = tile.first % count,
                before_turn = std::min(used, count - turn);
    run<AddLoop<Real>>({slots, totals.data() + turn, before_turn});
    run<AddLoop<Real>>({slots + before_turn, totals.data(), used - before_turn});
  }
  for (int64 element = 0; element < count; ++element) part.store(element, totals[static_cast<size_t>(element)]);
}

// Sums the slots of adjacent elements in memory order: for each element, by runs and their tiles.
template <class Real>
void sum_in_order(const GradientSum<Real>& sum, const GradientPart<Real>& part, int64 element, int64 length) {
  const ParameterView<Real>& parameter = part.parameter;
  const int64 inner = parameter.inner, step = element / parameter.count, first = element % parameter.count;
  const Real* slots = part.partials.data + step * part.partials.slots;
  std::array<double, kTile> totals{};
  for (int64 run = first; run * inner < sum.shape.neurons(); run += parameter.count) {
    if (inner == 1) {
      asgl::cpu::run<AddLoop<Real>>({slots + run, totals.data(), length});
      continue;
    }
    int64 tile = run * inner / sum.tile;
    for (int64 i = 0; i < length; ++i) {
      const int64 end = (run + i + 1) * inner;
      totals[i] += static_cast<double>(slots[run + i + tile]);
      for (; (tile + 1) * sum.tile < end; ++tile) totals[i] += static_cast<double>(slots[run + i + tile + 1]);
      tile += (tile + 1) * sum.tile == end;
    }
  }
  for (int64 i = 0; i < length; ++i) part.store(element + i, totals[i]);
}

}  // namespace

// If this file is compiled without OpenMP, at::parallel_for is silently serial.
int num_threads() {
#if defined(_OPENMP)
  return at::get_num_threads();
#else
  return 1;
#endif
}

template <class Real>
void plan_on(Device, GradientSum<Real>&) {}

template <class Scalar>
void launch_on(Device, const ForwardParams<Scalar>& params) {
  if (params.zeros != nullptr) std::fill_n(params.zeros, 2, Real_t<Scalar>(0));
  run_model(params);
}

template <class Scalar>
void launch_on(Device, const BackwardParams<Scalar>& params) {
  run_model(params);
}

template <class Real>
void launch_on(Device, const GradientSum<Real>& sum) {
  for (int id = 0; id < sum.count; ++id) {
    const GradientPart<Real>& part = sum.parts[id];
    if (is_interleaved(part.parameter)) {
      sum_interleaved(sum, part);
      continue;
    }
    at::parallel_for(0, part.elements(sum.shape), 2048, [&](int64_t begin, int64_t end) {
      const int64 count = part.parameter.count;
      for (int64 element = begin; element < end;) {
        const int64 length = std::min({kTile, end - element, count - element % count});
        sum_in_order(sum, part, element, length);
        element += length;
      }
    });
  }
}

template void plan_tiles(ForwardParams<Half>&);
template void plan_tiles(ForwardParams<BFloat16>&);
template void plan_tiles(ForwardParams<float>&);
template void plan_tiles(ForwardParams<double>&);
template void plan_tiles(BackwardParams<Half>&);
template void plan_tiles(BackwardParams<BFloat16>&);
template void plan_tiles(BackwardParams<float>&);
template void plan_tiles(BackwardParams<double>&);
template void launch(const ForwardParams<Half>&);
template void launch(const ForwardParams<BFloat16>&);
template void launch(const ForwardParams<float>&);
template void launch(const ForwardParams<double>&);
template void launch(const BackwardParams<Half>&);
template void launch(const BackwardParams<BFloat16>&);
template void launch(const BackwardParams<float>&);
template void launch(const BackwardParams<double>&);
template void plan_tiles(GradientSum<float>&);
template void plan_tiles(GradientSum<double>&);
template void launch(const GradientSum<float>&);
template void launch(const GradientSum<double>&);

}  // namespace asgl::cpu
