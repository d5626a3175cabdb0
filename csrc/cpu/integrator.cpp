// The CPU kernels of the leaky integrator, in tiles as in cpu/neuron.cpp.
#include "cpu/tile.h"
#include "launch.h"

namespace asgl::cpu {
namespace {

template <class Real, class Neurons>
struct IntegrateLoop {
  struct Args {
    Neurons neurons;
    Real v_rest;
    bool delay;
    int64 length;
    const Real* x;
    Real *v, *out;
    Ahead ahead;
  };

  static ASGL_HOST_DEVICE void run(Args args) {
    for_each_fetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (int64 i = begin; i < end; ++i) {
        const Real before = args.v[i];
        args.v[i] = integrate(args.x[i], before, args.neurons[i], args.v_rest);
        args.out[i] = args.delay ? before : args.v[i];
      }
    });
  }
};

template <class Real, class Neurons, bool kLearns>
struct IntegratorAdjointLoop {
  struct Args {
    Neurons neurons;
    Real v_rest;
    bool delay;
    int64 length;
    const Real *g, *before, *x;
    Real *later, *decay, *gain, *dx;
    Ahead ahead;
  };

  static ASGL_HOST_DEVICE void run(Args args) {
    for_each_fetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (int64 i = begin; i < end; ++i) {
        const Neuron<Real>& neuron = args.neurons[i];
        Real later = args.later[i];
        const Real dv = integrator_adjoint(args.g[i], args.delay, neuron, later);
        args.later[i] = later;
        args.dx[i] = neuron.input_gain * dv;
        if constexpr (kLearns) {
          args.decay[i] += dv * (args.before[i] - args.v_rest);
          args.gain[i] += dv * args.x[i];
        }
      }
    });
  }
};

// The rows that are read and written `kRowsAhead` rows after row `used`, where a tile uses row_of(0), row_of(1), ...
template <class Scalar, class F>
Ahead ahead_of(int64 index, int64 used, const SequenceShape& shape, const Scalar* read, const Scalar* write,
               F&& row_of) {
  const int64 next = used + kRowsAhead, t = row_of(next % shape.steps);
  const Tile tile(shape, index + next / shape.steps);
  return {row_ahead(read, tile, t), row_ahead(write, tile, t), sizeof(Scalar)};
}

template <class Scalar>
void forward(const IntegratorParams<Scalar>& params, int64 begin, int64 end) {
  using Real = Real_t<Scalar>;
  Rows<Real> rows(3, kTile);
  Real *x_buffer = rows.take(), *out_buffer = rows.take();
  const State<Real*> state = take_state(rows);
  TileNeurons<Real> neurons(params.parameters, params.options, kNumParameters);
  for (int64 index = begin; index < end; ++index) {
    const Tile tile(params.shape, index);
    load_state(params.init, tile.first, params.at_rest(), tile.length, state);
    for (int64 t = 0; t < params.shape.steps; ++t) {
      const Real* x = read_row(params.x_seq, tile, t, x_buffer);
      Real* out = start_row(params.v_seq, tile, t, out_buffer);
      const Ahead ahead =
          ahead_of<Scalar>(index, t, params.shape, params.x_seq, params.v_seq, [](int64 t) { return t; });
      neurons.move_to(tile, t);
      neurons.template visit<NeuronRows<Real>>([&](auto values) {
        run<IntegrateLoop<Real, decltype(values)>>(
            {values, params.options.v_rest, params.delay, tile.length, x, state.v, out, ahead});
      });
      finish_row(out, params.v_seq, tile, t);
    }
    store_state(state, tile.length, params.last, tile.first);
  }
}

template <class Scalar>
void backward(const IntegratorParams<Scalar>& params, int64 begin, int64 end) {
  using Real = Real_t<Scalar>;
  const int64 steps = params.shape.steps;
  Rows<Real> rows(8, kTile);
  Real *g_buffer = rows.take(), *v_buffer = rows.take(), *x_buffer = rows.take(), *dx_buffer = rows.take();
  const State<Real*> init = take_state(rows), later = take_state(rows);
  Real *decay = rows.take(), *gain = rows.take();
  TileNeurons<Real> neurons(params.parameters, params.options, kNumParameters);
  for (int64 index = begin; index < end; ++index) {
    const Tile tile(params.shape, index);
    const auto store_sums = [&](bool per_step, int64 t) {
      for (const auto& [id, sum] : {std::pair(kDecay, decay), std::pair(kInputGain, gain)}) {
        if ((params.parameters[id].step_stride != 0) != per_step) continue;
        if (params.wants(id)) store_partials(params.partials[id], params.parameters[id], tile, t, sum);
        std::fill_n(sum, tile.length, Real(0));
      }
    };
    std::fill_n(decay, tile.length, Real(0));
    std::fill_n(gain, tile.length, Real(0));
    load_state(params.init, tile.first, params.at_rest(), tile.length, init);
    load_state(params.grad_last, tile.first, State<Real>{}, tile.length, later);
    for (int64 t = steps - 1; t >= 0; --t) {
      const Real* g = read_row(params.grad_v_seq, tile, t, g_buffer);
      const Real *before = init.v, *x = init.v;  // x: where its sum is not wanted
      if (t > 0 && params.wants(kDecay))
        before = read_row<Scalar>(params.v_seq, tile, params.delay ? t : t - 1, v_buffer);
      if (params.wants(kInputGain)) x = read_row(params.x_seq, tile, t, x_buffer);
      Real* dx = start_row(params.grad_x_seq, tile, t, dx_buffer);
      const Ahead ahead = ahead_of<Scalar>(index, steps - 1 - t, params.shape, params.grad_v_seq, params.grad_x_seq,
                                           [=](int64 row) { return steps - 1 - row; });
      neurons.move_to(tile, t);
      neurons.template visit<NeuronRows<Real>>([&](auto values) {
        const auto adjoint = [&](auto learns) {
          run<IntegratorAdjointLoop<Real, decltype(values), learns()>>({values, params.options.v_rest, params.delay,
                                                                        tile.length, g, before, x, later.v, decay, gain,
                                                                        dx, ahead});
        };
        params.learns() ? adjoint(std::true_type{}) : adjoint(std::false_type{});
      });
      finish_row(dx, params.grad_x_seq, tile, t);
      store_sums(true, t);
    }
    store_sums(false, 0);
    store_state(later, tile.length, params.grad_init, tile.first);
  }
}

}  // namespace

template <class Scalar>
void launch(const IntegratorParams<Scalar>& params) {
  const auto kernel = params.grad_v_seq == nullptr ? &forward<Scalar> : &backward<Scalar>;
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) { kernel(params, begin, end); });
}

template void launch(const IntegratorParams<Half>&);
template void launch(const IntegratorParams<BFloat16>&);
template void launch(const IntegratorParams<float>&);
template void launch(const IntegratorParams<double>&);

}  // namespace asgl::cpu
