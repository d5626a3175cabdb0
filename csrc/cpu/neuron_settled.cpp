// The settled CPU kernels of the neuron.
#include "cpu/models.h"
#include "cpu/neuron.h"

namespace asgl::cpu {
namespace {

// Row t of the residual; null without one.
template <class Scalar>
const Real_t<Scalar>* read_residual(const LIFParams<Scalar>& params, const Tile& tile, int64 t,
                                    Real_t<Scalar>* buffer) {
  return params.residual == nullptr ? nullptr : read_row(params.residual, tile, t, buffer);
}

// The steps of a tile that a loop computes in one call: all of a segment if their rows are in place, else one.
template <class Scalar>
int64 steps_at_once(const LIFParams<Scalar>& params, const Tile& tile) {
  const bool in_place = std::is_same_v<Scalar, Real_t<Scalar>> && tile.in_whole_blocks();
  return in_place && params.is_input_plain() && params.residual == nullptr ? kCheckpointSteps : 1;
}

// ---- forward ----

template <class Model, class Scalar>
void run_with(const ForwardParams<Scalar>& params) {
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
      const int64 at_once = steps_at_once(params, tile);
      for (int64 t = 0, count; t < steps; t += count) {
        count = std::min(at_once, steps - t);
        Steps<const Real> x = read_steps(params.x_seq, tile, t, x_buffer);
        if (!input.plain()) x.first = input.current(x.first, read_residual(params, tile, t, r_buffer));
        const Steps<Real> s = start_steps(params.s_seq, tile, t, s_buffer);
        const auto ahead = [&](int64 row) {
          const Tile next(params.shape, index + row / steps);
          const int64 next_t = row % steps;
          return Ahead{sizeof(Scalar),
                       {recent_row_ahead(params.x_seq, next, next_t), recent_row_ahead(params.residual, next, next_t),
                        recent_row_ahead(params.s_seq, next, next_t)}};
        };
        neurons.template visit<SettledRows<Real>>([&](auto values) {
          run<SettledStepLoop<Real, Model, decltype(values), true>>(
              {.neurons = values,
               .options = params.options,
               .analog_below = params.noise.analog_below,
               .length = tile.length,
               .steps = count,
               .current = x,
               .draws = noise.rows(tile, t, count),
               .v = {v, 0},
               .out = s,
               .prefetches = !ahead(t).empty(),
               .ahead = {ahead(t + count), ahead(t + count + 1)}});
        });
        if (count == 1) finish_row(s.first, params.s_seq, tile, t);
        store_checkpoint(params, tile, t + count, v);
      }
      store_state(v, tile.length, params.v_last, tile.first);
    }
  });
}

// ---- backward ----

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
    input_.clear_sums();
    load_state(params_.grad_v_last, tile.first, Real(0), tile.length, dv_);
    for (int id = 0; id < (more_ ? kInputGain : kDecay); ++id) std::fill_n(sums(id), tile.length, Real(0));
    at_once_ = steps_at_once<Scalar>(params_, tile);
    carried_ = params_.grad_v_last != nullptr;
    for (int64 start = last_start_; start >= 0; start -= kCheckpointSteps) {
      const int64 stop = std::min(params_.shape.steps, start + kCheckpointSteps);
      compute_potentials(start, stop);
      walk_back(start, stop);
    }
    for (int id = 0; id < kInputGain; ++id) store(id, sums(id));
    for (const ParameterId id : {kInputGain, kInputBias}) {
      if (params_.wants(id)) input_.store_gradient(id, params_.partials[id]);
    }
    store_state(dv_, tile.length, params_.grad_v_init, tile.first);
  }

 private:
  Steps<Real> h(int64 k) const { return {h_ + k * rows_.stride(), rows_.stride()}; }
  Real* sums(int id) const { return sums_ + id * rows_.stride(); }
  Steps<Real> v(int64 k) const {
    const int64 stride = states_ > 1 ? rows_.stride() : 0;
    return {v_ + k * stride, stride};
  }
  void store(int id, const Real* sums) {
    if (params_.wants(id)) store_partials(params_.partials[id], params_.parameters[id], tile_, 0, sums);
  }

  // Row `next` of a segment and what follows: x forward, g and dx backward, then x of the next segment or tile.
  Ahead ahead(int64 start, int64 stop, int64 next) const {
    const int64 steps = stop - start;
    const auto input = [&](const Tile& tile, int64 t) {
      return Ahead{sizeof(Scalar), {row_ahead(params_.x_seq, tile, t), row_ahead(params_.residual, tile, t)}};
    };
    if (next < steps) return input(tile_, start + next);
    if (next < 2 * steps) {
      const int64 t = stop - 1 - (next - steps);
      return {sizeof(Scalar),
              {recent_row_ahead(params_.grad_s_seq, tile_, t), recent_row_ahead(params_.grad_x_seq, tile_, t),
               recent_row_ahead(params_.grad_residual, tile_, t)}};
    }
    const int64 next_start = start > 0 ? start - kCheckpointSteps : last_start_;
    const int64 t = std::min(next_start + next - 2 * steps, params_.shape.steps - 1);
    return input(start > 0 ? tile_ : Tile(params_.shape, tile_.index + 1), t);
  }

  void compute_potentials(int64 start, int64 stop) {
    load_start(params_, tile_, start, v(0).first);
    for (int64 t = start, count; t < stop; t += count) {
      count = std::min(at_once_, stop - t);
      const int64 k = t - start;
      Steps<const Real> x = read_steps(params_.x_seq, tile_, t, x_buffer_);
      if (!input_.plain()) x.first = input_.current(x.first, read_residual(params_, tile_, t, r_buffer_));
      neurons_.template visit<SettledRows<Real>>([&](auto neurons) {
        cpu::run<SettledStepLoop<Real, Model, decltype(neurons), false>>(
            {.neurons = neurons,
             .options = params_.options,
             .analog_below = params_.noise.analog_below,
             .length = tile_.length,
             .steps = count,
             .current = x,
             .draws = noise_.rows(tile_, t, count),
             .v = v(k),
             .out = h(k),
             .prefetches = true,
             .ahead = {ahead(start, stop, k + count), ahead(start, stop, k + count + 1)}});
      });
    }
  }

  void walk_back(int64 start, int64 stop) {
    Scalar *const grad_x_seq = params_.grad_x_seq, *const grad_residual = params_.grad_residual;
    for (int64 t = stop, count; t > start;) {
      count = std::min(at_once_, t - start);
      t -= count;
      Steps<const Real> g = {zeros_, 0};
      if (params_.grad_s_seq != nullptr) g = read_steps(params_.grad_s_seq, tile_, t, g_buffer_);
      const Steps<Real> dc = start_steps(dx_is_dc_ && grad_x_seq != nullptr ? grad_x_seq : grad_residual, tile_, t,
                                         dx_is_dc_ ? dx_buffer_ : input_.gradient_row());
      neurons_.template visit<SettledRows<Real>>([&](auto neurons) {
        const auto adjoint = [&](auto kSums) {
          cpu::run<SettledAdjointLoop<Real, Model, decltype(neurons), kSums()>>(
              {.neurons = neurons,
               .options = params_.options,
               .analog_below = params_.noise.analog_below,
               .length = tile_.length,
               .steps = count,
               .carried = carried_,
               .g = g,
               .h = {h(t - start).first, rows_.stride()},
               .draws = noise_.rows(tile_, t, count),
               .dv = dv_,
               .v = {v(t - start).first, v(0).stride},
               .width = sums(kWidth),
               .decay = sums(kDecay),
               .threshold = sums(kThreshold),
               .reset = sums(kReset),
               .d_current = dc,
               .prefetches = recent_row_ahead(params_.x_seq, tile_, t) != nullptr,
               .ahead = {ahead(start, stop, 2 * stop - start - t), ahead(start, stop, 2 * stop - start - t + 1)}});
        };
        if (more_) return adjoint(std::integral_constant<SettledSums, SettledSums::kAll>{});
        if (params_.wants(kWidth)) return adjoint(std::integral_constant<SettledSums, SettledSums::kWidth>{});
        adjoint(std::integral_constant<SettledSums, SettledSums::kNone>{});
      });
      carried_ = true;
      if (count > 1) continue;
      Real* dx = dc.first;
      if (!dx_is_dc_) {
        dx = start_row(grad_x_seq, tile_, t, dx_buffer_);
        input_.backward(read_row(params_.x_seq, tile_, t, x_buffer_), dc.first, dx);
      }
      finish_row(dx, grad_x_seq, tile_, t);
      finish_residual_row(dc.first, params_, tile_, t, r_buffer_);
    }
  }

  const BackwardParams<Scalar>& params_;
  const int64 segment_ = segment_steps(params_.shape.steps), states_ = kept_states(params_, segment_);
  const int64 last_start_ = (params_.shape.steps - 1) / kCheckpointSteps * kCheckpointSteps;
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
  int64 at_once_ = 1;
  bool carried_ = false;
};

template <class Model, class Scalar>
void run_with(const BackwardParams<Scalar>& params) {
  run_backward<SettledBackward<Model, Scalar>>(params);
}

}  // namespace

template <class Params>
void run_settled(const Params& params) {
  with_model(params.options, [&](auto model) {
    if constexpr (!decltype(model)::kOnlyGeneral) run_with<decltype(model)>(params);
  });
}

template void run_settled(const ForwardParams<Half>&);
template void run_settled(const ForwardParams<BFloat16>&);
template void run_settled(const ForwardParams<float>&);
template void run_settled(const BackwardParams<Half>&);
template void run_settled(const BackwardParams<BFloat16>&);
template void run_settled(const BackwardParams<float>&);

}  // namespace asgl::cpu
