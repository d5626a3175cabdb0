// The general CPU kernels of lif and adaptive_lif, which support every option. For each tile of neurons, steps are the
// outer loop and neurons the inner loop (cpu/loops.h), so that the state of the tile stays in the cache. The settled
// kernels, for parameters that do not change over time, are in cpu/neuron_settled.cpp.
//
// The files neuron*.cpp each instantiate some of the kernels, so that they compile in parallel.
#pragma once

#include "cpu/tile.h"

namespace asgl::cpu {

// The number of steps whose potentials backward computes together: 4, 8 or kCheckpointSteps.
inline int64 segment_steps(int64 steps) { return steps <= 4 ? 4 : steps <= 8 ? 8 : kCheckpointSteps; }

// Whether any parameter changes over time.
template <class Params>
bool is_per_step(const Params& params) {
  return std::any_of(std::begin(params.parameters), std::end(params.parameters),
                     [](const auto& each) { return each.data != nullptr && each.step_stride != 0; });
}

// The number of parts of a tile that are computed one after the other. It is 2 for models with two states if a
// parameter differs between neurons and no parameter changes over time. The L1 cache can then hold the rows of half a
// tile, 14 rows of 2 KiB in float32.
template <class Model, class Params>
int64 num_tile_parts(const Params& params) {
  return Model::kNumStates > 1 && !all_uniform(params.parameters) && !is_per_step(params) ? 2 : 1;
}

// ---- forward ----

// Stores the states as a checkpoint, if there is one after `steps` steps.
template <size_t kNumStates, class Scalar>
void store_checkpoint(const ForwardParams<Scalar>& params, const Tile& tile, int64 steps,
                      const StateRows<kNumStates, Real_t<Scalar>>& rows) {
  if (steps % kCheckpointSteps == 0 && steps < params.shape.steps) {
    store_states(rows, tile.length, params.checkpoints, checkpoint_stride(params.shape),
                 checkpoint_offset(tile, steps));
  }
}

// Runs the general forward pass of all tiles.
template <class Model, class Scalar>
void run_general_pass(const ForwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(5, kTile);
    Real *x_buffer = rows.allocate(), *s_buffer = rows.allocate(), *h_buffer = rows.allocate();
    Real *v = rows.allocate(), *second = rows.allocate();
    const auto states = state_rows<Model>(v, second);
    const int64 all = params.shape.neurons();
    TileNoise noise(params.noise);
    TileNeurons<Real> neurons(params.parameters, params.options, kNumParameters);
    GeneralInput<Scalar> input(params);
    const int64 parts = num_tile_parts<Model>(params), size = kTile / parts;
    for (int64 index = begin * parts; index < end * parts && index * size < all; ++index) {
      const Tile tile(params.shape, index, size);
      load_states(params.v_init, all, tile.first, params.options.v_rest, tile.length, states);
      for (int64 t = 0; t < params.shape.steps; ++t) {
        const Real* x = read_row(params.x_seq, tile, t, x_buffer);
        Real* s = start_row(params.s_seq, tile, t, s_buffer);
        Real* h = start_row(params.h_seq, tile, t, h_buffer);
        const int64 later_t = (t + kRowsAhead) % params.shape.steps;
        const Tile later(params.shape, index + (t + kRowsAhead) / params.shape.steps, size);
        const PrefetchRows ahead = {sizeof(Scalar),
                                    {recent_row_to_prefetch(params.x_seq, later, later_t),
                                     recent_row_to_prefetch(params.s_seq, later, later_t)}};
        neurons.move_to(tile, t);
        neurons.template with_neurons<NeuronRows<Real>>([&](auto given) {
          input.with_input(tile, t, x, given, [&](auto values, const Real* in) {
            run<StepLoop<Real, Model, decltype(values)>>({values, params.options, params.noise.analog_below,
                                                          tile.length, in, noise.draws(tile, t), v, v, h, s, ahead,
                                                          second, second, /*compared=*/true});
          });
        });
        if (params.options.scale_output) {
          run<MultiplyLoop<Real>>({s, neurons.v_threshold(), s_buffer, tile.length});
          s = s_buffer;
        }
        finish_row(s, params.s_seq, tile, t);
        finish_row(h, params.h_seq, tile, t);
        finish_row(v, params.v_seq, tile, t);
        store_checkpoint(params, tile, t + 1, states);
      }
      store_states(states, tile.length, params.v_last, all, tile.first);
    }
  });
}

// ---- backward ----

// The number of rows of v that backward keeps of a segment. Only the gradient of the decay needs v before each step.
template <class Scalar>
int64 num_v_rows(const BackwardParams<Scalar>& params, int64 segment) {
  return params.wants_gradient(kDecay) ? segment + 1 : 1;
}

// Computes row t of the residual's gradient from dc, the gradient of the input current, and stores the row. Does
// nothing if the residual's gradient is not wanted.
template <class Scalar>
void store_residual_gradient(const Real_t<Scalar>* dc, const BackwardParams<Scalar>& params, const Tile& tile, int64 t,
                             Real_t<Scalar>* buffer) {
  using Real = Real_t<Scalar>;
  if (params.grad_residual == nullptr) return;
  if (params.residual_gain != Real(1)) {
    Real* dr = start_row(params.grad_residual, tile, t, buffer);
    run<MultiplyLoop<Real>>({dc, {nullptr, params.residual_gain}, dr, tile.length});
    dc = dr;
  }
  finish_row(dc, params.grad_residual, tile, t);
}

// Runs the backward pass of all tiles. `Backward` is a class that computes one tile at a time.
template <class Backward, class Scalar>
void run_backward_pass(const BackwardParams<Scalar>& params) {
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    Backward backward(params);
    for (int64 index = begin; index < end; ++index) backward.compute_tile(Tile(params.shape, index));
  });
}

// Computes the general backward pass, one tile at a time, in segments from the last to the first.
template <class Model, class Scalar>
class GeneralBackward {
  using Real = Real_t<Scalar>;

 public:
  explicit GeneralBackward(const BackwardParams<Scalar>& params) : params_(params) {
    std::fill_n(zeros_, kTile, Real(0));
  }

  // Computes the gradients of a tile, and stores the tile's partial sums of the parameters' gradients.
  void compute_tile(const Tile& tile) {
    whole_ = tile;
    for (int id = 0; id < kNumParameters; ++id) clear_sums(id);
    for (int64 part = 0; part < parts_ && part * kTile / parts_ < tile.length; ++part) {
      compute_part(Tile(tile.shape, tile.index * parts_ + part, kTile / parts_));
    }
    for (int id = 0; id < kNumParameters; ++id) {
      if (params_.wants_gradient(id) && params_.parameters[id].step_stride == 0) store_sums(id, 0);
    }
  }

 private:
  // Computes the gradients of a part of the tile (num_tile_parts), and adds to the sums of the parameters' gradients.
  void compute_part(const Tile& tile) {
    tile_ = tile;
    const int64 all = params_.shape.neurons();
    const auto gradients = state_rows<Model>(dv_, d_second_);
    load_states(params_.grad_v_last, all, tile.first, Real(0), tile.length, gradients);
    carried_ = params_.grad_v_last != nullptr;
    const int64 steps = params_.shape.steps;
    for (int64 start = (steps - 1) / segment_ * segment_; start >= 0; start -= segment_) {
      const int64 stop = std::min(steps, start + segment_);
      compute_potentials(start, stop);
      for (int64 t = stop - 1; t >= start; --t) {
        backward_step(t, t - start, rows_to_prefetch(start, stop, 2 * stop - 1 - start - t));
      }
    }
    store_states(gradients, tile.length, params_.grad_v_init, all, tile.first);
  }

  // The k-th row from `rows` on.
  Real* row(Real* rows, int64 k) const { return rows + k * rows_.stride(); }
  // The row of v before step k of a segment.
  Real* v_row(int64 k) const { return row(v_, k % v_rows_); }
  // The rows to prefetch while row `position` of the segment [start, stop) is computed. Positions count rows in the
  // order of their use: first x of each step, then the gradients of each step from the last to the first, then x of the
  // segment that is computed next.
  PrefetchRows rows_to_prefetch(int64 start, int64 stop, int64 position) const {
    Tile tile = tile_;
    int64 used = position + kRowsAhead;
    if (used >= 2 * (stop - start)) {
      used -= 2 * (stop - start);
      if (start == 0) tile = Tile(tile.shape, tile.index + 1, kTile / parts_);
      stop = start > 0 ? start : params_.shape.steps;
      start = (stop - 1) / segment_ * segment_;
    }
    if (start + used < stop) return {sizeof(Scalar), {row_to_prefetch(params_.x_seq, tile, start + used)}};
    const int64 t = 2 * stop - 1 - start - used;
    return {sizeof(Scalar),
            {recent_row_to_prefetch(params_.grad_s_seq, tile, t), recent_row_to_prefetch(params_.grad_x_seq, tile, t)}};
  }
  // The row of the second state before step k of a segment, or null for models with one state.
  Real* second_row(int64 k) const { return Model::kNumStates > 1 ? row(second_, k % second_rows_) : nullptr; }
  // Whether a parameter with begin <= id < end wants a gradient.
  bool wants_any_gradient(int begin, int end) const {
    return std::any_of(params_.partials + begin, params_.partials + end, [](const auto& each) { return each.data; });
  }
  // The row of sums of a parameter's gradient, from the first neuron of the part on.
  Real* sums_row(int id) const { return row(sums_, id) + (tile_.first - whole_.first); }
  // Sets the sums of a parameter's gradient to 0, for all neurons of the tile.
  void clear_sums(int id) { std::fill_n(row(sums_, id), whole_.length, Real(0)); }
  // Stores the sums of a parameter's gradient as the partial sums of step t.
  void store_sums(int id, int64 t) {
    store_partial_sums(params_.partials[id], params_.parameters[id], whole_, t, row(sums_, id));
  }
  // Adds factor * (a * (b - c)) to the sums of a parameter's gradient, if that gradient is wanted.
  void accumulate(ParameterId id, Real factor, const Real* a, Operand<Real> b, Operand<Real> c) {
    if (params_.wants_gradient(id)) run<AccumulateLoop<Real>>({tile_.length, factor, a, b, c, sums_row(id)});
  }

  // Computes h and s of the steps [start, stop) again, and stores them in rows.
  void compute_potentials(int64 start, int64 stop) {
    load_start_states(params_, tile_, start, state_rows<Model>(v_row(0), second_row(0)));
    for (int64 t = start; t < stop; ++t) {
      const int64 k = t - start;
      const Real* x = read_row(params_.x_seq, tile_, t, x_buffer_);
      neurons_.move_to(tile_, t);
      neurons_.template with_neurons<NeuronRows<Real>>([&](auto given) {
        input_.with_input(tile_, t, x, given, [&](auto neurons, const Real* in) {
          run<StepLoop<Real, Model, decltype(neurons)>>(
              {neurons, params_.options, params_.noise.analog_below, tile_.length, in, noise_.draws(tile_, t), v_row(k),
               v_row(k + 1), row(h_, k), row(s_, k), rows_to_prefetch(start, stop, k), second_row(k),
               second_row(k + 1)});
        });
      });
    }
  }

  // Computes the gradients of step t, which is step k of its segment, and stores those of x and the residual.
  void backward_step(int64 t, int64 k, const PrefetchRows& ahead) {
    neurons_.move_to(tile_, t);
    const Real* g = zeros_;
    if (params_.grad_s_seq != nullptr) {
      g = read_row(params_.grad_s_seq, tile_, t, g_buffer_);
      if (params_.options.scale_output) {
        accumulate(kThreshold, Real(1), g, {row(s_, k), Real(0)}, kZero);
        run<MultiplyLoop<Real>>({g, neurons_.v_threshold(), scaled_g_, tile_.length});
        g = scaled_g_;
      }
    }
    const Real* gh = params_.grad_h_seq == nullptr ? zeros_ : read_row(params_.grad_h_seq, tile_, t, gh_buffer_);
    if (params_.grad_v_seq != nullptr) {
      const Real* gv = read_row(params_.grad_v_seq, tile_, t, x_buffer_);
      run<AccumulateLoop<Real>>({tile_.length, Real(1), gv, kOne, kZero, dv_});
      carried_ = true;
    }
    Real* dx = start_row(params_.grad_x_seq, tile_, t, dx_buffer_);
    neurons_.template with_neurons<NeuronRows<Real>>([&](auto neurons) {
      const auto adjoint = [&](auto kSums) {
        run<AdjointLoop<Real, Model, decltype(neurons), kSums()>>({.neurons = neurons,
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
                                                                   .ahead = ahead,
                                                                   .v = v_row(k),
                                                                   .second = second_row(k),
                                                                   .d_second = d_second_,
                                                                   .sums = sums_row(0)});
      };
      if constexpr (Model::kHasAdaptation) {
        if (wants_any_gradient(kDecay, kInputGain)) return adjoint(std::integral_constant<Sums, Sums::kAll>{});
        if (wants_any_gradient(kAdaptDecay, kNumParameters))
          return adjoint(std::integral_constant<Sums, Sums::kAdaptation>{});
        adjoint(std::integral_constant<Sums, Sums::kWidth>{});
      } else {
        adjoint(std::integral_constant<Sums, Sums::kNone>{});
      }
    });
    finish_row(dx, params_.grad_x_seq, tile_, t);
    store_residual_gradient(dh_, params_, tile_, t, x_buffer_);
    if (!Model::kHasAdaptation) add_gradients(t, k, dx);
    carried_ = true;
    store_step_sums(t);
  }

  // Adds the terms of step t to the sums of all parameters' gradients, from the rows that backward_step computed.
  void add_gradients(int64 t, int64 k, const Real* dx) {
    if (carried_) accumulate(kReset, Real(1), d_reset_, kOne, kZero);
    accumulate(kWidth, Real(1), dy_, {distance_, Real(0)}, kZero);
    accumulate(kThreshold, Real(-1), dy_, neurons_.inverse_width(), kZero);
    accumulate(kDecay, Real(1), dh_, {v_row(k), Real(0)}, {nullptr, params_.options.v_rest});
    accumulate(kInputMean, Real(-1), dx, kOne, kZero);
    if (params_.wants_gradient(kInputGain)) {
      const Real* x = read_row(params_.x_seq, tile_, t, x_buffer_);
      accumulate(kInputGain, Real(1), dh_, {x, Real(0)}, neurons_.input_mean());
    }
    accumulate(kInputBias, Real(1), dh_, kOne, kZero);
  }

  // Stores the sums of step t for parameters that change over time, and sets these sums to 0.
  void store_step_sums(int64 t) {
    for (int id = 0; id < kNumParameters; ++id) {
      if (params_.wants_gradient(id) && params_.parameters[id].step_stride != 0) {
        store_sums(id, t);
        clear_sums(id);
      }
    }
  }

  static constexpr Operand<Real> kZero = {nullptr, Real(0)}, kOne = {nullptr, Real(1)};

  const BackwardParams<Scalar>& params_;
  const int64 segment_ = segment_steps(params_.shape.steps), v_rows_ = num_v_rows(params_, segment_);
  // If the adaptation w is subtracted from the current, backward needs w of every step only for the gradient of
  // adapt_decay. Without that gradient, one row of w is enough.
  const bool needs_all_seconds_ = !Model::kHasAdaptation || params_.wants_gradient(kAdaptDecay) ||
                                  !AdaptiveLIF<Real>::from_options(params_.options).adapts_current();
  const int64 second_rows_ = Model::kNumStates == 1 ? 0 : needs_all_seconds_ ? segment_ + 1 : 1;
  Rows<Real> rows_{2 * segment_ + v_rows_ + second_rows_ + 12 + kNumParameters, kTile};
  Real *const h_ = rows_.allocate(segment_), *const s_ = rows_.allocate(segment_);
  Real *const second_ = rows_.allocate(second_rows_), *const d_second_ = rows_.allocate();
  Real *const v_ = rows_.allocate(v_rows_), *const dv_ = rows_.allocate();
  Real *const x_buffer_ = rows_.allocate(), *const g_buffer_ = rows_.allocate(), *const gh_buffer_ = rows_.allocate();
  Real *const scaled_g_ = rows_.allocate(), *const dx_buffer_ = rows_.allocate(), *const dy_ = rows_.allocate();
  Real *const dh_ = rows_.allocate(), *const zeros_ = rows_.allocate(), *const d_reset_ = rows_.allocate();
  Real *const distance_ = rows_.allocate(), *const sums_ = rows_.allocate(kNumParameters);
  TileNoise noise_{params_.noise};
  TileNeurons<Real> neurons_{params_.parameters, params_.options, kNumParameters};
  GeneralInput<Scalar> input_{params_};
  const int64 parts_ = num_tile_parts<Model>(params_);
  Tile whole_{params_.shape, 0}, tile_{params_.shape, 0};
  bool carried_ = false;
};

// Runs the general backward pass of all tiles.
template <class Model, class Scalar>
void run_general_pass(const BackwardParams<Scalar>& params) {
  run_backward_pass<GeneralBackward<Model, Scalar>>(params);
}

// ---- kernels instantiated elsewhere ----

// Runs the settled kernel for the model that the options select. Settled kernels compute in float32, also for half
// types.
template <class Params>
void run_settled_kernel(const Params& params);

// Runs the general kernel for adaptive neurons.
template <class Params>
void run_adaptive_kernel(const Params& params);

}  // namespace asgl::cpu
