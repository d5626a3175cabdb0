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
      for (int64 t = 0; t < steps; ++t) {
        const Real* x = read_row(params.x_seq, tile, t, x_buffer);
        Real* s = start_row(params.s_seq, tile, t, s_buffer);
        const int64 next_t = (t + kRowsAhead) % steps;
        const Tile next(params.shape, index + (t + kRowsAhead) / steps);
        const Ahead ahead = {
            sizeof(Scalar),
            {recent_row_ahead(params.x_seq, next, next_t), recent_row_ahead(params.residual, next, next_t),
             recent_row_ahead(params.s_seq, next, next_t)}};
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
    carried_ = params_.grad_v_last != nullptr;
    for (int64 start = last_start_; start >= 0; start -= segment_) {
      const int64 stop = std::min(params_.shape.steps, start + segment_);
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
              {recent_row_ahead(params_.grad_s_seq, tile_, t), recent_row_ahead(params_.grad_x_seq, tile_, t),
               recent_row_ahead(params_.grad_residual, tile_, t)}};
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
      finish_residual_row(dc, params_, tile_, t, r_buffer_);
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
