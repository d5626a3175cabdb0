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

// Whether a loop may take a block through all steps of a segment: if their rows are in place.
template <class Scalar>
bool takes_all_steps(const LIFParams<Scalar>& params, const Tile& tile) {
  return std::is_same_v<Scalar, Real_t<Scalar>> && tile.in_one_piece() && params.is_input_plain() &&
         params.residual == nullptr;
}

// Neurons of a block in a loop over one step: parts while rows are prefetched, since the processor can't fetch a row at
// once.
int64 block_of_step(const Tile& tile, const Ahead& ahead) {
  return ahead.empty() ? std::max<int64>(1, tile.length) : kBlock;
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
    const Stream past_cache =
        Model::kHasExp && params.noise.analog_below > 0 ? nullptr : stream_for(params.s_seq, params.shape);
    for (int64 index = begin; index < end; ++index) {
      const Tile tile(params.shape, index);
      neurons.move_to(tile, 0);
      input.move_to(tile);
      load_state(params.v_init, tile.first, params.options.v_rest, tile.length, v);
      // In the L2 cache rows are faster, whose stores don't wait for loads at the same place of another page.
      const bool all_steps = takes_all_steps(params, tile) && recent_row_ahead(params.x_seq, tile, 0) != nullptr;
      const Stream stream = all_steps ? past_cache : nullptr;
      const auto ahead = [&](const Tile& at, int64 t) {
        return Ahead{sizeof(Scalar),
                     {recent_row_ahead(params.x_seq, at, t), recent_row_ahead(params.residual, at, t),
                      stream != nullptr ? nullptr : recent_row_ahead(params.s_seq, at, t)}};
      };
      for (int64 t = 0, count; t < steps; t += count) {
        count = std::min(all_steps ? kCheckpointSteps : int64{1}, steps - t);
        Steps<const Real> x = read_steps(params.x_seq, tile, t, x_buffer);
        if (!input.plain()) x.first = input.current(x.first, read_residual(params, tile, t, r_buffer));
        const Steps<Real> s = start_steps(params.s_seq, tile, t, s_buffer);
        const int64 later = t + kRowsAhead;
        const Ahead rows_ahead = all_steps ? along(ahead(tile, t), params.shape, stream != nullptr)
                                           : ahead(Tile(params.shape, index + later / steps), later % steps);
        neurons.template visit<SettledRows<Real>>([&](auto values) {
          run<SettledStepLoop<Real, Model, decltype(values)>>(
              {.neurons = values,
               .options = params.options,
               .analog_below = params.noise.analog_below,
               .length = tile.length,
               .block = all_steps ? kBlock : block_of_step(tile, rows_ahead),
               .steps = count,
               .current = x,
               .draws = noise.rows(tile, t, count),
               .v = v,
               .s = s,
               .stream = stream,
               .ahead = rows_ahead});
        });
        if (!all_steps) finish_row(s.first, params.s_seq, tile, t);
        store_checkpoint(params, tile, t + count, v);
      }
      store_state(v, tile.length, params.v_last, tile.first);
    }
    if (past_cache != nullptr) finish_stream();
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
    const bool all_steps = takes_all_steps(params_, tile);
    stream_ = all_steps ? past_cache_ : nullptr;
    carried_ = params_.grad_v_last != nullptr;
    for (int64 start = last_start_; start >= 0; start -= segment_) {
      const int64 stop = std::min(params_.shape.steps, start + segment_);
      load_start(params_, tile_, start, v(0).first);
      if (all_steps) {
        compute(start, stop);
      } else {
        for (int64 t = start; t < stop; ++t) compute_potentials(start, stop, t);
        for (int64 t = stop - 1; t >= start; --t) walk_back(start, stop, t);
      }
    }
    for (int id = 0; id < kInputGain; ++id) store(id, sums(id));
    for (const ParameterId id : {kInputGain, kInputBias}) {
      if (params_.wants(id)) input_.store_gradient(id, params_.partials[id]);
    }
    store_state(dv_, tile.length, params_.grad_v_init, tile.first);
    if (stream_ != nullptr) finish_stream();
  }

 private:
  Steps<Real> kept(Real* rows, int64 k) const { return {rows + k * rows_.stride(), rows_.stride()}; }
  Real* sums(int id) const { return sums_ + id * rows_.stride(); }
  Steps<Real> v(int64 k) const {
    const int64 stride = states_ > 1 ? rows_.stride() : 0;
    return {v_ + k * stride, stride};
  }
  void store(int id, const Real* sums) {
    if (params_.wants(id)) store_partials(params_.partials[id], params_.parameters[id], tile_, 0, sums);
  }

  Ahead input_ahead(const Tile& tile, int64 t) const {
    return {sizeof(Scalar), {row_ahead(params_.x_seq, tile, t), row_ahead(params_.residual, tile, t)}};
  }
  Ahead gradients_ahead(int64 t) const {
    const auto written = [&](Scalar* sequence) { return stream_ ? nullptr : recent_row_ahead(sequence, tile_, t); };
    return {
        sizeof(Scalar),
        {recent_row_ahead(params_.grad_s_seq, tile_, t), written(params_.grad_x_seq), written(params_.grad_residual)}};
  }

  // One step at a time: the rows of kRowsAhead rows after row `used` of a segment: x forward, g and dx backward, then x
  // of the next segment or tile.
  Ahead ahead(int64 start, int64 stop, int64 used) const {
    const int64 next = used + kRowsAhead, steps = stop - start;
    if (next < steps) return input_ahead(tile_, start + next);
    if (next < 2 * steps) return gradients_ahead(stop - 1 - (next - steps));
    const int64 next_start = start > 0 ? start - segment_ : last_start_;
    const int64 t = std::min(next_start + next - 2 * steps, params_.shape.steps - 1);
    return input_ahead(start > 0 ? tile_ : Tile(params_.shape, tile_.index + 1), t);
  }

  // Runs the loop over `count` steps from step t on. f(arguments) sets those that depend on where rows are.
  template <class F>
  void run_loop(int64 start, int64 t, int64 count, F&& f) {
    neurons_.template visit<SettledRows<Real>>([&](auto neurons) {
      const auto call = [&](auto kSums) {
        using Loop = SettledAdjointLoop<Real, Model, decltype(neurons), kSums()>;
        typename Loop::Args args{.neurons = neurons,
                                 .options = params_.options,
                                 .analog_below = params_.noise.analog_below,
                                 .length = tile_.length,
                                 .steps = count,
                                 .carried = carried_,
                                 .draws = noise_.rows(tile_, t, count),
                                 .v = v(t - start),
                                 .h = kept(h_, t - start),
                                 .s = kept(s_, t - start),
                                 .slope = kept(slope_, t - start),
                                 .dv = dv_,
                                 .width = sums(kWidth),
                                 .decay = sums(kDecay),
                                 .threshold = sums(kThreshold),
                                 .reset = sums(kReset)};
        f(args);
        cpu::run<Loop>(args);
      };
      if (more_) return call(std::integral_constant<SettledSums, SettledSums::kAll>{});
      if (params_.wants(kWidth)) return call(std::integral_constant<SettledSums, SettledSums::kWidth>{});
      call(std::integral_constant<SettledSums, SettledSums::kNone>{});
    });
  }

  Steps<const Real> gradients(int64 t) {
    if (params_.grad_s_seq == nullptr) return {zeros_, 0};
    return read_steps(params_.grad_s_seq, tile_, t, g_buffer_);
  }

  // A segment whose rows are in place, block by block.
  void compute(int64 start, int64 stop) {
    run_loop(start, start, stop - start, [&](auto& args) {
      args.block = kBlock;
      args.current = read_steps(params_.x_seq, tile_, start, x_buffer_);
      args.h.stride = args.s.stride = args.slope.stride = kBlock;
      args.h_is_of_block = true;
      args.g = gradients(start);
      args.d_current = start_steps(params_.grad_x_seq, tile_, start, dx_buffer_);
      args.stream = stream_;
      args.input_ahead = along(input_ahead(tile_, start), params_.shape, stream_ != nullptr);
      args.gradients_ahead = along(gradients_ahead(start), params_.shape, stream_ != nullptr);
    });
    carried_ = true;
  }

  void compute_potentials(int64 start, int64 stop, int64 t) {
    const Real* x = read_row(params_.x_seq, tile_, t, x_buffer_);
    const Real* current = input_.current(x, read_residual(params_, tile_, t, r_buffer_));
    run_loop(start, t, 1, [&](auto& args) {
      args.current = {current, 0};
      args.input_ahead = ahead(start, stop, t - start);
      args.block = block_of_step(tile_, args.input_ahead);
    });
  }

  void walk_back(int64 start, int64 stop, int64 t) {
    Scalar *const grad_x_seq = params_.grad_x_seq, *const grad_residual = params_.grad_residual;
    Real* const dc_buffer = dx_is_dc_ ? dx_buffer_ : input_.gradient_row();
    const Steps<Real> dc =
        start_steps(dx_is_dc_ && grad_x_seq != nullptr ? grad_x_seq : grad_residual, tile_, t, dc_buffer);
    run_loop(start, t, 1, [&](auto& args) {
      args.g = gradients(t);
      args.d_current = dc;
      args.gradients_ahead = ahead(start, stop, 2 * stop - start - 1 - t);
      args.block = block_of_step(tile_, args.gradients_ahead);
    });
    carried_ = true;
    Real* dx = dc.first;
    if (!dx_is_dc_) {
      dx = start_row(grad_x_seq, tile_, t, dx_buffer_);
      input_.backward(read_row(params_.x_seq, tile_, t, x_buffer_), dc.first, dx);
    }
    finish_row(dx, grad_x_seq, tile_, t);
    finish_residual_row(dc.first, params_, tile_, t, r_buffer_);
  }

  const BackwardParams<Scalar>& params_;
  const int64 segment_ = segment_steps(params_.shape.steps), states_ = kept_states(params_, segment_);
  const int64 last_start_ = (params_.shape.steps - 1) / segment_ * segment_;
  const bool more_ = params_.wants(kDecay) || params_.wants(kThreshold) || params_.wants(kReset);
  const bool dx_is_dc_ = params_.is_input_plain();
  const Stream past_cache_ = Model::kHasExp ? nullptr : stream_for(params_.grad_x_seq, params_.shape);
  Stream stream_ = nullptr;
  const int64 kept_ = params_.noise.analog_below > 0 ? segment_ : 0;
  Rows<Real> rows_{segment_ + 2 * kept_ + states_ + 6 + kInputGain, kTile};
  Real *const h_ = rows_.take(segment_), *const s_ = rows_.take(kept_), *const slope_ = rows_.take(kept_);
  Real *const v_ = rows_.take(states_), *const dv_ = rows_.take();
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
