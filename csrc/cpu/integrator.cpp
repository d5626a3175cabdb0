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

  static ASGL_HOST_DEVICE void run(Args args) { args.delay ? loop<true>(args) : loop<false>(args); }

  template <bool kDelay>
  static ASGL_HOST_DEVICE void loop(Args args) {
    for_each_fetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (int64 i = begin; i < end; ++i) {
        const Real before = args.v[i], after = integrate(args.x[i], before, args.neurons[i], args.v_rest);
        args.v[i] = after;
        args.out[i] = kDelay ? before : after;
      }
    });
  }
};

// With kLearns the gradients of decay and input_gain are added up.
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

  static ASGL_HOST_DEVICE void run(Args args) { args.delay ? loop<true>(args) : loop<false>(args); }

  template <bool kDelay>
  static ASGL_HOST_DEVICE void loop(Args args) {
    for_each_fetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (int64 i = begin; i < end; ++i) {
        const Neuron<Real>& neuron = args.neurons[i];
        Real later = args.later[i];
        const Real dv = integrator_adjoint(args.g[i], kDelay, neuron, later);
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

}  // namespace

template <class Scalar>
void launch(const IntegratorForwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const int64 steps = params.shape.steps;
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(3, kTile);
    Real *x_buffer = rows.take(), *out_buffer = rows.take(), *v = rows.take();
    TileNeurons<Real> neurons(params.parameters, params.options, kNumParameters);
    for (int64 index = begin; index < end; ++index) {
      const Tile tile(params.shape, index);
      load_state(params.init, tile.first, params.at_rest(), tile.length, State<Real*>{v});
      for (int64 t = 0; t < steps; ++t) {
        const Real* x = read_row(params.x_seq, tile, t, x_buffer);
        Real* out = start_row(params.v_seq, tile, t, out_buffer);
        const int64 next_t = (t + kRowsAhead) % steps;
        const Tile next(params.shape, index + (t + kRowsAhead) / steps);
        const Ahead ahead = {row_ahead(params.x_seq, next, next_t), row_ahead(params.v_seq, next, next_t),
                             sizeof(Scalar)};
        neurons.move_to(tile, t);
        neurons.template visit<NeuronRows<Real>>([&](auto values) {
          run<IntegrateLoop<Real, decltype(values)>>(
              {values, params.options.v_rest, params.delay, tile.length, x, v, out, ahead});
        });
        finish_row(out, params.v_seq, tile, t);
      }
      store_state(State<Real*>{v}, tile.length, params.last, tile.first);
    }
  });
}

template <class Scalar>
void launch(const IntegratorBackwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const int64 steps = params.shape.steps;
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    Rows<Real> rows(8, kTile);
    Real *g_buffer = rows.take(), *v_buffer = rows.take(), *x_buffer = rows.take(), *dx_buffer = rows.take();
    Real *init = rows.take(), *later = rows.take(), *sums[2] = {rows.take(), rows.take()};
    TileNeurons<Real> neurons(params.parameters, params.options, kNumParameters);
    for (int64 index = begin; index < end; ++index) {
      const Tile tile(params.shape, index);
      load_state(params.init, tile.first, params.at_rest(), tile.length, State<Real*>{init});
      load_state(params.grad_last, tile.first, State<Real>{}, tile.length, State<Real*>{later});
      for (Real* sum : sums) std::fill_n(sum, tile.length, Real(0));
      const auto store_sums = [&](int64 t, bool per_step) {
        for (const auto& [id, sum] : {std::pair(kDecay, sums[0]), std::pair(kInputGain, sums[1])}) {
          if (!params.wants(id) || (params.parameters[id].step_stride != 0) != per_step) continue;
          store_partials(params.partials[id], params.parameters[id], tile, t, sum);
          std::fill_n(sum, tile.length, Real(0));
        }
      };
      for (int64 t = steps - 1; t >= 0; --t) {
        const Real* g = read_row(params.grad_v_seq, tile, t, g_buffer);
        // Sums that nobody wants are of any finite rows.
        const Real *before = init, *x = init;
        if (t > 0 && params.wants(kDecay)) before = read_row(params.v_seq, tile, params.delay ? t : t - 1, v_buffer);
        if (params.wants(kInputGain)) x = read_row(params.x_seq, tile, t, x_buffer);
        Real* dx = start_row(params.grad_x_seq, tile, t, dx_buffer);
        const int64 used = steps - 1 - t + kRowsAhead, next_t = steps - 1 - used % steps;
        const Tile next(params.shape, index + used / steps);
        const Ahead ahead = {row_ahead(params.grad_v_seq, next, next_t), row_ahead(params.grad_x_seq, next, next_t),
                             sizeof(Scalar)};
        neurons.move_to(tile, t);
        neurons.template visit<NeuronRows<Real>>([&](auto values) {
          const auto adjoint = [&](auto kLearns) {
            run<IntegratorAdjointLoop<Real, decltype(values), kLearns()>>({values, params.options.v_rest, params.delay,
                                                                           tile.length, g, before, x, later, sums[0],
                                                                           sums[1], dx, ahead});
          };
          params.wants(kDecay) || params.wants(kInputGain) ? adjoint(std::true_type{}) : adjoint(std::false_type{});
        });
        finish_row(dx, params.grad_x_seq, tile, t);
        store_sums(t, true);
      }
      store_sums(0, false);
      store_state(State<Real*>{later}, tile.length, params.grad_init, tile.first);
    }
  });
}

template void launch(const IntegratorForwardParams<Half>&);
template void launch(const IntegratorForwardParams<BFloat16>&);
template void launch(const IntegratorForwardParams<float>&);
template void launch(const IntegratorForwardParams<double>&);
template void launch(const IntegratorBackwardParams<Half>&);
template void launch(const IntegratorBackwardParams<BFloat16>&);
template void launch(const IntegratorBackwardParams<float>&);
template void launch(const IntegratorBackwardParams<double>&);

}  // namespace asgl::cpu
