// The CPU kernels. A task owns a tile of neurons, whose state stays in the cache; steps are the outer loop and neurons
// the inner one (cpu/loops.h). The settled kernels serve where only spikes are wanted and the parameters are the same
// at all steps; the general ones serve elsewhere.
#include <vector>

#include "cpu/tile.h"
#include "launch.h"

namespace asgl::cpu {
namespace {

int64 segment_steps(int64 steps) { return steps <= 4 ? 4 : steps <= 8 ? 8 : kCheckpointSteps; }

// ---- forward ----

template <class Scalar>
void store_checkpoint(const ForwardParams<Scalar>& params, const Tile& tile, int64 steps,
                      const State<Real_t<Scalar>*>& state) {
  if (steps % kCheckpointSteps == 0 && steps < params.shape.steps) {
    store_state(state, tile.length, params.checkpoints, checkpoint(tile, steps));
  }
}

template <class Model, class Scalar>
void run_general(const ForwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(3 + 2 * kStateMembers, kTile);
    Real *x_buffer = rows.take(), *s_buffer = rows.take(), *h_buffer = rows.take();
    State<Real*> state = take_state(rows), next = take_state(rows);
    TileNoise noise(params.noise);
    TileNeurons<Real> neurons(params.parameters, params.options, kNumParameters);
    for (int64 index = begin; index < end; ++index) {
      const Tile tile(params.shape, index);
      load_state(params.init, tile.first, params.at_rest(), tile.length, state);
      for (int64 t = 0; t < params.shape.steps; ++t) {
        const Real* x = read_row(params.x_seq, tile, t, x_buffer);
        Real* s = start_row(params.s_seq, tile, t, s_buffer);
        Real* h = start_row(params.h_seq, tile, t, h_buffer);
        neurons.move_to(tile, t);
        neurons.template visit<NeuronRows<Real>>([&](auto values) {
          run<StepLoop<Real, Model, decltype(values)>>({values, params.options, params.noise.analog_below, tile.length,
                                                        x, noise.row(tile, t), state, next, h, s});
        });
        std::swap(state, next);
        if (params.options.scale_output) {
          run<MultiplyLoop<Real>>({s, neurons.v_threshold(), s_buffer, tile.length});
          s = s_buffer;
        }
        finish_row(s, params.s_seq, tile, t);
        finish_row(h, params.h_seq, tile, t);
        finish_row(state.v, params.v_seq, tile, t);
        store_checkpoint(params, tile, t + 1, state);
      }
      store_state(state, tile.length, params.last, tile.first);
    }
  });
}

template <class Model, class Scalar>
void run_settled(const ForwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const int64 steps = params.shape.steps;
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(2 + kStateMembers, kTile);
    Real *x_buffer = rows.take(), *s_buffer = rows.take();
    const State<Real*> state = take_state(rows);
    TileNoise noise(params.noise);
    TileNeurons<Real> neurons(params.parameters, params.options, kInputGain);
    TileInput<Real> input(params);
    for (int64 index = begin; index < end; ++index) {
      const Tile tile(params.shape, index);
      neurons.move_to(tile, 0);
      input.move_to(tile);
      load_state(params.init, tile.first, params.at_rest(), tile.length, state);
      for (int64 t = 0; t < steps; ++t) {
        const Real* x = read_row(params.x_seq, tile, t, x_buffer);
        Real* s = start_row(params.s_seq, tile, t, s_buffer);
        const int64 next_t = (t + kRowsAhead) % steps;
        const Tile next(params.shape, index + (t + kRowsAhead) / steps);
        const Ahead ahead = {row_ahead(params.x_seq, next, next_t), sizeof(Scalar)};
        neurons.template visit<SettledRows<Real>>([&](auto values) {
          run<SettledStepLoop<Real, Model, decltype(values), true>>({values, params.options, params.noise.analog_below,
                                                                     tile.length, input.current(x), noise.row(tile, t),
                                                                     state, state, s, ahead});
        });
        finish_row(s, params.s_seq, tile, t);
        store_checkpoint(params, tile, t + 1, state);
      }
      store_state(state, tile.length, params.last, tile.first);
    }
  });
}

// ---- backward ----

// The states that are kept in a segment: those before each step are needed again only for the gradient of decay.
template <class Scalar>
int64 states_of(const BackwardParams<Scalar>& params, int64 segment) {
  return params.wants(kDecay) ? segment + 1 : 1;
}

template <class Model, class Scalar>
void run_general(const BackwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  constexpr Operand<Real> kZero = {nullptr, Real(0)}, kOne = {nullptr, Real(1)};
  const AllOptions<Real>& options = params.options;
  const int64 segment = segment_steps(params.shape.steps);
  const int64 states = std::max<int64>(2, states_of(params, segment));

  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(2 * segment + (states + 1) * kStateMembers + 10 + kNumParameters, kTile);
    Real *h_rows = rows.take(segment), *s_rows = rows.take(segment);
    const State<Real*> state_rows = take_state(rows, states), d_state = take_state(rows);
    Real *x_buffer = rows.take(), *g_buffer = rows.take(), *gh_buffer = rows.take(), *scaled_g = rows.take();
    Real *dx_buffer = rows.take(), *dy = rows.take(), *dh = rows.take(), *zeros = rows.take();
    Real *d_reset = rows.take(), *distance = rows.take();
    Real* sums = rows.take(kNumParameters);
    std::fill_n(zeros, kTile, Real(0));
    TileNoise noise(params.noise);
    TileNeurons<Real> neurons(params.parameters, params.options, kNumParameters);
    const auto row = [&](Real* of, int64 k) { return of + k * rows.stride(); };
    const auto state = [&](int64 k) {
      return map_members<Real*>([&](Real* of) { return row(of, k % states); }, state_rows);
    };

    for (int64 index = begin; index < end; ++index) {
      const Tile tile(params.shape, index);
      const int64 length = tile.length;
      const auto accumulate = [&](ParameterId id, Real factor, const Real* a, Operand<Real> b, Operand<Real> c) {
        if (params.wants(id)) run<AccumulateLoop<Real>>({length, factor, a, b, c, row(sums, id)});
      };
      const auto clear = [&](int id) { std::fill_n(row(sums, id), length, Real(0)); };
      const auto store = [&](int id, int64 t) {
        store_partials(params.partials[id], params.parameters[id], tile, t, row(sums, id));
      };
      for (int id = 0; id < kNumParameters; ++id) clear(id);
      load_state(params.grad_last, tile.first, State<Real>{}, length, d_state);
      bool carried = exists(params.grad_last);

      for (int64 start = (params.shape.steps - 1) / segment * segment; start >= 0; start -= segment) {
        const int64 stop = std::min(params.shape.steps, start + segment);
        load_start(params, tile, start, state(0));
        for (int64 t = start; t < stop; ++t) {
          const int64 k = t - start;
          const Real* x = read_row(params.x_seq, tile, t, x_buffer);
          neurons.move_to(tile, t);
          neurons.template visit<NeuronRows<Real>>([&](auto values) {
            run<StepLoop<Real, Model, decltype(values)>>({values, options, params.noise.analog_below, length, x,
                                                          noise.row(tile, t), state(k), state(k + 1), row(h_rows, k),
                                                          row(s_rows, k)});
          });
        }
        for (int64 t = stop - 1; t >= start; --t) {
          const int64 k = t - start;
          const Real *h = row(h_rows, k), *s = row(s_rows, k);
          neurons.move_to(tile, t);
          const Real* g = zeros;
          if (params.grad_s_seq != nullptr) {
            g = read_row(params.grad_s_seq, tile, t, g_buffer);
            if (options.scale_output) {
              accumulate(kThreshold, Real(1), g, {s, Real(0)}, kZero);
              run<MultiplyLoop<Real>>({g, neurons.v_threshold(), scaled_g, length});
              g = scaled_g;
            }
          }
          const Real* gh = params.grad_h_seq == nullptr ? zeros : read_row(params.grad_h_seq, tile, t, gh_buffer);
          if (params.grad_v_seq != nullptr) {
            const Real* gv = read_row(params.grad_v_seq, tile, t, x_buffer);
            run<AccumulateLoop<Real>>({length, Real(1), gv, kOne, kZero, d_state.v});
            carried = true;
          }
          Real* dx = start_row(params.grad_x_seq, tile, t, dx_buffer);
          neurons.template visit<NeuronRows<Real>>([&](auto values) {
            run<AdjointLoop<Real, Model, decltype(values)>>(
                {values, options, length, carried, g, gh, h, s, d_state, d_reset, distance, dy, dh, dx});
          });
          if (carried) accumulate(kReset, Real(1), d_reset, kOne, kZero);
          carried = true;
          finish_row(dx, params.grad_x_seq, tile, t);
          accumulate(kWidth, Real(1), dy, {distance, Real(0)}, kZero);
          accumulate(kThreshold, Real(-1), dy, neurons.inverse_width(), kZero);
          accumulate(kInputMean, Real(-1), dx, kOne, kZero);
          accumulate(kDecay, Real(1), dh, {state(k).v, Real(0)}, {nullptr, options.v_rest});
          if (params.wants(kInputGain)) {
            const Real* x = read_row(params.x_seq, tile, t, x_buffer);
            accumulate(kInputGain, Real(1), dh, {x, Real(0)}, neurons.input_mean());
          }
          accumulate(kInputBias, Real(1), dh, kOne, kZero);
          for (int id = 0; id < kNumParameters; ++id) {
            if (params.wants(id) && params.parameters[id].step_stride != 0) {
              store(id, t);
              clear(id);
            }
          }
        }
      }
      for (int id = 0; id < kNumParameters; ++id) {
        if (params.wants(id) && params.parameters[id].step_stride == 0) store(id, 0);
      }
      store_state(d_state, length, params.grad_init, tile.first);
    }
  });
}

template <class Model, class Scalar>
void run_settled(const BackwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const SequenceShape& shape = params.shape;
  const int64 segment = segment_steps(shape.steps);
  const int64 states = states_of(params, segment);
  const bool more = params.wants(kDecay) || params.wants(kThreshold) || params.wants(kReset);
  const int64 last_start = (shape.steps - 1) / segment * segment;

  for_each_tile_range(shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(segment + (states + 1) * kStateMembers + 8, kTile);
    Real* h = rows.take(segment);
    const State<Real*> state_rows = take_state(rows, states), d_state = take_state(rows);
    Real *width = rows.take(), *decay = rows.take(), *threshold = rows.take(), *reset = rows.take();
    Real* zeros = rows.take();
    Real *x_buffer = rows.take(), *g_buffer = rows.take(), *dx_buffer = rows.take();
    std::fill_n(zeros, kTile, Real(0));
    TileNoise noise(params.noise);
    TileNeurons<Real> neurons(params.parameters, params.options, kInputGain);
    TileInput<Real> input(params);
    const auto state = [&](int64 k) {
      return map_members<Real*>([&](Real* of) { return of + k % states * rows.stride(); }, state_rows);
    };

    for (int64 index = begin; index < end; ++index) {
      const Tile tile(shape, index);
      neurons.move_to(tile, 0);
      input.move_to(tile);
      const auto h_row = [&](int64 k) { return h + k * rows.stride(); };
      load_state(params.grad_last, tile.first, State<Real>{}, tile.length, d_state);
      std::fill_n(width, tile.length, Real(0));
      if (more) {
        for (Real* sums : {decay, threshold, reset}) std::fill_n(sums, tile.length, Real(0));
      }
      bool carried = exists(params.grad_last);

      for (int64 start = last_start; start >= 0; start -= segment) {
        const int64 stop = std::min(shape.steps, start + segment), steps = stop - start;
        // The rows of a segment in the order in which they are read: x forwards, then g backwards; then the next
        // segment's, or the next tile's.
        const auto ahead = [&](int64 used) -> Ahead {
          const int64 next = used + kRowsAhead;
          if (next < steps) return {row_ahead(params.x_seq, tile, start + next), sizeof(Scalar)};
          if (next < 2 * steps) return {row_ahead(params.grad_s_seq, tile, stop - 1 - (next - steps)), sizeof(Scalar)};
          const int64 next_start = start > 0 ? start - segment : last_start;
          const int64 t = std::min(next_start + next - 2 * steps, shape.steps - 1);
          return {row_ahead(params.x_seq, start > 0 ? tile : Tile(shape, index + 1), t), sizeof(Scalar)};
        };
        load_start(params, tile, start, state(0));
        for (int64 t = start; t < stop; ++t) {
          const int64 k = t - start;
          const Real* x = read_row(params.x_seq, tile, t, x_buffer);
          neurons.template visit<SettledRows<Real>>([&](auto values) {
            run<SettledStepLoop<Real, Model, decltype(values), false>>(
                {values, params.options, params.noise.analog_below, tile.length, input.current(x), noise.row(tile, t),
                 state(k), state(k + 1), h_row(k), ahead(k)});
          });
        }
        for (int64 t = stop - 1; t >= start; --t) {
          const Real* g = params.grad_s_seq == nullptr ? zeros : read_row(params.grad_s_seq, tile, t, g_buffer);
          Real* dx = start_row(params.grad_x_seq, tile, t, dx_buffer);
          neurons.template visit<SettledRows<Real>>([&](auto values) {
            const auto adjoint = [&](auto kMore) {
              run<SettledAdjointLoop<Real, Model, decltype(values), kMore()>>(
                  {values, params.options, params.noise.analog_below, tile.length, carried, g, h_row(t - start),
                   noise.row(tile, t), d_state, state(t - start).v, width, decay, threshold, reset,
                   input.plain() ? dx : input.gradient_row(), ahead(steps + stop - 1 - t)});
            };
            more ? adjoint(std::true_type{}) : adjoint(std::false_type{});
          });
          carried = true;
          if (!input.plain()) input.backward(read_row(params.x_seq, tile, t, x_buffer), dx);
          finish_row(dx, params.grad_x_seq, tile, t);
        }
      }
      const auto store = [&](ParameterId id, const Real* sums) {
        store_partials(params.partials[id], params.parameters[id], tile, 0, sums);
      };
      if (params.wants(kWidth)) store(kWidth, width);
      if (params.wants(kDecay)) store(kDecay, decay);
      if (params.wants(kThreshold)) store(kThreshold, threshold);
      if (params.wants(kReset)) store(kReset, reset);
      if (params.wants(kInputGain)) store(kInputGain, input.gain_sums());
      if (params.wants(kInputBias)) store(kInputBias, input.bias_sums());
      store_state(d_state, tile.length, params.grad_init, tile.first);
    }
  });
}

// ---- launchers ----

template <class Scalar>
bool only_spikes(const ForwardParams<Scalar>& params) {
  return params.v_seq == nullptr && params.h_seq == nullptr;
}
template <class Scalar>
bool only_spikes(const BackwardParams<Scalar>& params) {
  return params.grad_v_seq == nullptr && params.grad_h_seq == nullptr &&
         !(params.wants(kReset) && params.options.hard_reset);
}

template <class Scalar>
bool only_width(const BackwardParams<Scalar>& params) {
  return !params.wants(kDecay) && !params.wants(kThreshold) && !params.wants(kReset) && !params.wants(kInputMean);
}
bool only_width(const auto&) { return true; }

// With parameters of the input, all others must be uniform, and none except the width may want a gradient: gradients of
// gain and bias are added up in another order here than by the general kernels, and they are not to depend on what else
// is asked for where all parameters differ.
template <class Params>
bool is_settled(const Params& params) {
  if (!params.is_input_plain()) {
    return only_width(params) && only_spikes(params) && !params.options.scale_output &&
           params.input() == Input::kNormalised && all_uniform(params.parameters, kInputGain);
  }
  const bool per_step = std::any_of(std::begin(params.parameters), std::end(params.parameters),
                                    [](const auto& each) { return each.data != nullptr && each.step_stride != 0; });
  return !per_step && only_spikes(params) && params.options.v_rest == 0 && !params.options.scale_output;
}

template <class Params>
void run_model(Params params) {
  using Real = typename Params::Real;
  params.noise = params.noise.settled();
  with_model(params.options, [&](auto model) {
    using Model = decltype(model);
    if constexpr (std::is_same_v<Real, float> && !Model::kOnlyGeneral) {
      if (is_settled(params)) return run_settled<Model>(params);
    }
    run_general<Model>(params);
  });
}

// Where a parameter is folded, the slots are added up in the order in which they lie in memory.
template <class Real>
void sum_folded(const GradientSum<Real>& sum, const GradientPart<Real>& part) {
  const int64 count = part.parameter.count;
  std::vector<double> totals(static_cast<size_t>(count), 0.0);
  for (int64 index = 0; index < num_tiles(sum.shape); ++index) {
    const Tile tile(sum.shape, index);
    const Real* slots = part.partials.data + tile.first + index;
    const int64 used = std::min(count, tile.length), turn = tile.first % count,
                before_turn = std::min(used, count - turn);
    run<AddLoop<Real>>({slots, totals.data() + turn, before_turn});
    run<AddLoop<Real>>({slots + before_turn, totals.data(), used - before_turn});
  }
  for (int64 element = 0; element < count; ++element) part.store(element, totals[static_cast<size_t>(element)]);
}

// Adds up the slots of neighbouring elements of the gradient in the order in which they lie in memory, and so each
// element's in the order of its runs, and of the tiles of each.
template <class Real>
void sum_in_order(const GradientSum<Real>& sum, const GradientPart<Real>& part, int64 element, int64 length) {
  const ParameterView<Real>& parameter = part.parameter;
  const int64 inner = parameter.inner, step = element / parameter.count, first = element % parameter.count;
  const Real* slots = part.partials.data + step * part.partials.slots;
  std::array<double, kTile> totals{};
  for (int64 run = first; run * inner < sum.shape.neurons(); run += parameter.count) {
    int64 tile = run * inner / sum.tile;
    if (inner == 1) {
      for (int64 i = 0; i < length; ++tile) {
        const int64 in_tile = std::min(length - i, (tile + 1) * sum.tile - (run + i));
        asgl::cpu::run<AddLoop<Real>>({slots + run + i + tile, totals.data() + i, in_tile});
        i += in_tile;
      }
      continue;
    }
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

// at::parallel_for is silently serial in code that was compiled without OpenMP: the flag of this file is what counts.
int num_threads() {
#if defined(_OPENMP)
  return at::get_num_threads();
#else
  return 1;
#endif
}

template <class Scalar>
void cut(LIFParams<Scalar>& params) {
  params.tiles = {kTile, num_tiles(params.shape)};
}

template <class Real>
void cut(GradientSum<Real>&) {}

template <class Scalar>
void launch(const ForwardParams<Scalar>& params) {
  if (params.zeros != nullptr) std::fill_n(params.zeros, 2, Real_t<Scalar>(0));
  run_model(params);
}

template <class Scalar>
void launch(const BackwardParams<Scalar>& params) {
  run_model(params);
}

template <class Real>
void launch(const GradientSum<Real>& sum) {
  for (int id = 0; id < sum.count; ++id) {
    const GradientPart<Real>& part = sum.parts[id];
    if (is_folded(part.parameter)) {
      sum_folded(sum, part);
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

template void cut(LIFParams<Half>&);
template void cut(LIFParams<BFloat16>&);
template void cut(LIFParams<float>&);
template void cut(LIFParams<double>&);
template void launch(const ForwardParams<Half>&);
template void launch(const ForwardParams<BFloat16>&);
template void launch(const ForwardParams<float>&);
template void launch(const ForwardParams<double>&);
template void launch(const BackwardParams<Half>&);
template void launch(const BackwardParams<BFloat16>&);
template void launch(const BackwardParams<float>&);
template void launch(const BackwardParams<double>&);
template void cut(GradientSum<float>&);
template void cut(GradientSum<double>&);
template void launch(const GradientSum<float>&);
template void launch(const GradientSum<double>&);

}  // namespace asgl::cpu
