// The CPU kernels of the leaky integrator. Like those in cpu/neuron.h, they compute neurons in tiles.
#include "cpu/tile.h"

namespace asgl::cpu {
namespace {

template <class Real, class Neurons, Pass kPass>
struct IntegratorLoop {
  struct Args {
    Neurons neurons;
    Real v_rest;
    bool delay;
    int64 length;
    const Real* in;          // x, or the gradient of v_seq
    Real *state, *out;       // the potential, or its gradient from later steps; v_seq, or dx
    const Real *before, *x;  // the potential before the step, and x, for kSums
    Real *decay, *gain;      // sums of the gradients of decay and input_gain
    PrefetchRows ahead;
  };

  // Computes one step of the integrator, or its adjoint.
  static ASGL_HOST_DEVICE void run(Args args) {
    for_each_prefetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (int64 i = begin; i < end; ++i) {
        const Neuron<Real>& neuron = args.neurons[i];
        Real state = args.state[i];
        if constexpr (kPass == Pass::kForward) {
          const Real before = state;
          state = integrate(args.in[i], before, neuron, args.v_rest);
          args.out[i] = args.delay ? before : state;
        } else {
          const Real dv = integrator_adjoint(args.in[i], args.delay, neuron, state);
          args.out[i] = neuron.input_gain * dv;
          if (kPass == Pass::kSums) args.decay[i] += dv * (args.before[i] - args.v_rest);
          if (kPass == Pass::kSums) args.gain[i] += dv * args.x[i];
        }
        args.state[i] = state;
      }
    });
  }
};

// Runs a pass over all steps, for the tiles [begin, end).
template <Pass kPass, class Scalar>
void run_pass(const IntegratorParams<Scalar>& params, int64 begin, int64 end) {
  using Real = Real_t<Scalar>;
  constexpr bool kBack = kPass != Pass::kForward;
  const int64 steps = params.shape.steps;
  const Scalar* in_seq = kBack ? params.grad_v_seq : params.x_seq;
  Scalar* out_seq = kBack ? params.grad_x_seq : params.v_seq;
  Rows<Real> rows(8, kTile);
  Real *in_buffer = rows.allocate(), *out_buffer = rows.allocate(), *v_buffer = rows.allocate(),
       *x_buffer = rows.allocate();
  Real *v = rows.allocate(), *later = rows.allocate(), *state = kBack ? later : v;
  Real *decay = rows.allocate(), *gain = rows.allocate();
  TileNeurons<Real> neurons(params.parameters, params.options, kNumParameters);
  // The step that the pass computes after `row` other steps.
  const auto step_after = [&](int64 row) { return kBack ? steps - 1 - row : row; };
  for (int64 index = begin; index < end; ++index) {
    const Tile tile(params.shape, index);
    const auto begin_sums = [&](Real* sum) { std::fill_n(sum, tile.length, Real(0)); };
    const auto store_sums = [&](bool per_step, int64 t) {
      for (const auto& [id, sum] : {std::pair(kDecay, decay), std::pair(kInputGain, gain)}) {
        if (!params.wants_gradient(id) || (params.parameters[id].step_stride != 0) != per_step) continue;
        store_partial_sums(params.partials[id], params.parameters[id], tile, t, sum);
        begin_sums(sum);
      }
    };
    begin_sums(decay);
    begin_sums(gain);
    load_state(params.v_init, tile.first, params.options.v_rest, tile.length, v);
    load_state(params.grad_v_last, tile.first, Real(0), tile.length, later);
    for (int64 row = 0; row < steps; ++row) {
      const int64 t = step_after(row), used = row + kRowsAhead;
      const Tile next(params.shape, index + used / steps);
      const int64 next_t = step_after(used % steps);
      const PrefetchRows ahead = {
          sizeof(Scalar),
          {recent_row_to_prefetch(in_seq, next, next_t), recent_row_to_prefetch(out_seq, next, next_t)}};
      const Real* in = read_row(in_seq, tile, t, in_buffer);
      const Real *before = v, *x = v;  // before step 0; any row if the sum is unwanted
      if (kBack && t > 0 && params.wants_gradient(kDecay)) {
        before = read_row<Scalar>(params.v_seq, tile, params.delay ? t : t - 1, v_buffer);
      }
      if (kBack && params.wants_gradient(kInputGain)) x = read_row(params.x_seq, tile, t, x_buffer);
      Real* out = start_row(out_seq, tile, t, out_buffer);
      neurons.move_to(tile, t);
      neurons.template with_neurons<NeuronRows<Real>>([&](auto values) {
        run<IntegratorLoop<Real, decltype(values), kPass>>(
            {values, params.options.v_rest, params.delay, tile.length, in, state, out, before, x, decay, gain, ahead});
      });
      finish_row(out, out_seq, tile, t);
      store_sums(true, t);
    }
    store_sums(false, 0);
    store_state(state, tile.length, kBack ? params.grad_v_init : params.v_last, tile.first);
  }
}

}  // namespace

// Runs the requested pass on all tiles.
template <class Scalar>
void launch_kernel(Device, const IntegratorParams<Scalar>& params) {
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    switch (params.requested_pass()) {
      case Pass::kForward:
        return run_pass<Pass::kForward>(params, begin, end);
      case Pass::kBackward:
        return run_pass<Pass::kBackward>(params, begin, end);
      case Pass::kSums:
        return run_pass<Pass::kSums>(params, begin, end);
    }
  });
}

template void plan_tiles(IntegratorParams<Half>&);
template void plan_tiles(IntegratorParams<BFloat16>&);
template void plan_tiles(IntegratorParams<float>&);
template void plan_tiles(IntegratorParams<double>&);
template void launch(const IntegratorParams<Half>&);
template void launch(const IntegratorParams<BFloat16>&);
template void launch(const IntegratorParams<float>&);
template void launch(const IntegratorParams<double>&);

}  // namespace asgl::cpu
