// The CPU kernels of recurrent neurons. A task computes all steps of a chunk of the batch: in each step a product with
// the weight, and the neuron's loops of cpu/loops.h. In forward and for the gradient of a weight [N, N], products skip
// spikes that are 0, if at most a quarter of the spikes are not 0 and the other factor is finite.
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/models.h"
#include "cpu/product.h"
#include "cpu/tile.h"

namespace asgl::cpu {
namespace {

template <class Real>
struct RecurrentCurrentLoop {
  struct Args {
    const Real *x, *bias, *syn_decay;
    bool has_synapse;
    Real *product, *i;
    int64 length;
  };

  // Replaces `product` by the current of step t. Without a synapse, the current is j[t] = x[t] + (product + bias). With
  // a synapse, it is i[t] = syn_decay * i[t-1] + j[t], and the row `i` is updated from i[t-1] to i[t].
  static ASGL_HOST_DEVICE void run(Args args) {
    if (args.has_synapse) return run_loop<true>(args);
    run_loop<false>(args);
  }

  template <bool kSynapse>
  static ASGL_HOST_DEVICE void run_loop(Args args) {
#pragma GCC ivdep
    for (int64 n = 0; n < args.length; ++n) {
      const Real j = args.x[n] + (args.product[n] + args.bias[n]);
      if constexpr (kSynapse) args.i[n] = args.syn_decay[n] * args.i[n] + j;
      args.product[n] = kSynapse ? args.i[n] : j;
    }
  }
};

template <class Real, class Model>
struct ResetLoop {
  struct Args {
    NeuronRows<Real> neurons;
    LIFByOptions<Real> options;
    const Real *h, *s, *w;
    Real* v;
    int64 length;
  };

  // Computes v[t] again from h[t], s[t] and, for adaptive neurons, from w[t], the adaptation before the step.
  static ASGL_HOST_DEVICE void run(Args args) {
    const auto model = Model::from_options(args.options);
#pragma GCC ivdep
    for (int64 n = 0; n < args.length; ++n) {
      if constexpr (Model::kHasAdaptation) {
        const Real h = model.charged_potential(args.h[n], args.w[n]);
        args.v[n] = model.reset(h, args.s[n], model.with_adapted_reset(args.neurons[n], args.w[n]));
      } else {
        args.v[n] = model.reset(args.h[n], args.s[n], args.neurons[n]);
      }
    }
  }
};

// The `count` rows of the batch that a task computes, as a tile of count * N neurons.
struct Chunk : Tile {
  int64 count;

  template <class Scalar>
  Chunk(const RecurrentParams<Scalar>& params, int64 index)
      : Tile(params.shape(), index, kRecurrentRows * params.neurons), count(length / params.neurons) {}
};

// Returns the chunk's rows of a state [B, N]. If `state` is null, fills `buffer` with `otherwise` and returns `buffer`.
template <class Real>
const Real* state_or_filled(const Real* state, const Chunk& chunk, Real otherwise, Real* buffer) {
  if (state != nullptr) return state + chunk.first;
  std::fill_n(buffer, chunk.length, otherwise);
  return buffer;
}

// Allocates rows with 16 additional elements. Without these, rows of 1024 or 2048 elements, which are common, would be
// 4 or 8 KiB apart in float32. Elements with the same offset in all rows would then compete for one set of the L1
// cache.
template <class Real>
Rows<Real> padded_rows(int64 count, int64 length) {
  return Rows<Real>(count, length + 16);
}

// Returns the rows to prefetch, which are those of step t of each sequence, from element `offset` of the chunk on.
// There are none if there is no step t.
template <class... Elements>
PrefetchRows rows_to_prefetch(const Chunk& chunk, int64 t, int64 offset, const Elements*... sequences) {
  if (t < 0 || t >= chunk.shape.steps) return {};
  const auto part = [&](const auto* sequence) {
    const char* row = row_to_prefetch(sequence, chunk, t);
    return row == nullptr ? row : row + offset * static_cast<int64>(sizeof(*sequence));
  };
  return {sizeof(float), {part(sequences)...}};
}

// A loop computes whole rows of the batch with at most this many elements in all, so that its operands, about 16
// arrays, stay in the L1 cache. A longer row is computed at once.
constexpr int64 kPartElements = 256;

// The neurons' parameters, repeated for some adjacent rows of the batch, so that a loop computes these rows at once.
template <class Scalar>
class RepeatedNeurons {
  using Real = Real_t<Scalar>;

 public:
  // Copies the parameters. Converts a width stored as a logarithm and a decay stored as a logit, and inverts the width.
  explicit RepeatedNeurons(const RecurrentParams<Scalar>& params)
      : period_(params.neurons),
        length_(std::clamp<int64>(kPartElements / params.neurons, 1, kRecurrentRows) * params.neurons),
        rows_(padded_rows<Real>(kNumRecurrentParameters, length_)) {
    for (int id = 0; id < kNumRecurrentParameters; ++id) {
      const Real* values = params.parameters + id * period_;
      for (int64 n = 0; n < length_; n += period_) std::copy_n(values, period_, rows_.row(id) + n);
    }
    if (params.options.log_width) run<ExpLoop<Real>>({rows_.row(kWidth), length_});
    if (params.options.logit_decay) run<SigmoidLoop<Real>>({rows_.row(kDecay), length_});
    run<InverseLoop<Real>>({rows_.row(kWidth), length_});
  }

  int64 length() const { return length_; }
  // The parameters that the neuron's loops read.
  NeuronRows<Real> neurons() {
    return {{(*this)[kDecay], (*this)[kThreshold], (*this)[kReset], (*this)[kWidth], (*this)[kInputGain],
             (*this)[kInputBias], (*this)[kInputMean]}};
  }
  // The row of a parameter, which for kWidth is the inverse of the width.
  const Real* operator[](int id) { return rows_.row(id); }

  // Calls f(offset, length) for each part of a chunk. A part is one row of the batch, or several whole rows with at
  // most kPartElements elements in all.
  template <class F>
  void for_each_part(const Chunk& chunk, F&& f) const {
    for (int64 offset = 0; offset < chunk.length; offset += length_) {
      f(offset, std::min(length_, chunk.length - offset));
    }
  }

 private:
  int64 period_, length_;
  Rows<Real> rows_;
};

// The random draws for the neurons of a chunk in one step.
template <class Scalar>
class ChunkNoise {
 public:
  explicit ChunkNoise(const RecurrentParams<Scalar>& params)
      : drawn_(params.noise.needs_draws()),
        rng_state_(params.noise.rng_state),
        rows_(2, kRecurrentRows * params.neurons / 4 + 2 * kNoiseGroups) {
    std::fill_n(rows_.row(0), rows_.stride(), 0);
  }

  // Returns the draws of a chunk for step t, one per neuron. If analog_prob is 0 or 1, nothing is drawn, and all draws
  // are 0. For analog_prob = 0, no element is then analog, because analog_below is 0. For analog_prob = 1, every
  // element is.
  const uint16* draws(const Chunk& chunk, int64 t) {
    const auto* draws = reinterpret_cast<const uint16*>(rows_.row(0));
    if (!drawn_) return draws;
    const int64 group = chunk.first / 4 / kNoiseGroups * kNoiseGroups;
    const uint64 seed = static_cast<uint64>(rng_state_[0]) + static_cast<uint64>(t) * kSeedPerStep;
    const int64 state[2] = {static_cast<int64>(seed), rng_state_[1]};
    const int64 groups = (chunk.first + chunk.length + 3) / 4 - group;
    run<NoiseLoop>({noise_key(state), static_cast<uint64>(group), groups, 0, rows_.row(0), rows_.row(1)});
    return draws + (chunk.first - 4 * group);
  }

 private:
  bool drawn_;
  const int64* rng_state_;
  Rows<uint64> rows_;
};

template <class Real>
struct FiniteLoop {
  struct Args {
    const Real* values;
    int64 length;
    bool* all_finite;
  };

  // Finds whether all values are finite. Only then may a product skip zeros of the other factor.
  static ASGL_HOST_DEVICE void run(Args args) {
    int others = 0;
    for (int64 i = 0; i < args.length; ++i) others |= !(args.values[i] - args.values[i] == Real(0));
    *args.all_finite = others == 0;
  }
};

template <class Real>
bool all_finite(const Real* values, int64 length) {
  bool result;
  run<FiniteLoop<Real>>({values, length, &result});
  return result;
}

static_assert(kRecurrentRows <= kMaxProductRows);

// Computes products with the weight: out = s W^T in forward, out = dj W in backward, [rows, N]. Only forward skips
// zeros, because gradients are rarely sparse. It does so only if the weight is finite, because 0 times infinity is NaN.
template <class Scalar>
class WeightProduct {
  using Real = Real_t<Scalar>;

 public:
  WeightProduct(const RecurrentParams<Scalar>& params, bool forward)
      : neurons_(params.neurons),
        weight_(params.weight),
        elementwise_(params.elementwise),
        skips_zeros_(forward && !elementwise_ && all_finite(params.weight, params.neurons * params.neurons)),
        panels_(elementwise_ ? 0 : panels_size<Real>(neurons_, neurons_)) {
    if (elementwise_) return;
    fill_panels(weight_, forward ? 1 : neurons_, forward ? neurons_ : 1, neurons_, neurons_, panels_.data());
  }

  // Computes `rows` rows of `out` from those of `a`. In forward, `indices` must have room for as many elements as `a`
  // has.
  void multiply(const Real* a, int64 rows, int32_t* indices, Real* out) const {
    if (!elementwise_) {
      return cpu::multiply<Real>({a, neurons_, rows, neurons_, neurons_, panels_.data(), /*accumulate=*/false, out},
                                 skips_zeros_, indices);
    }
    for (int64 row = 0; row < rows; ++row, a += neurons_, out += neurons_) {
      run<MultiplyLoop<Real>>({a, {weight_, Real(0)}, out, neurons_});
    }
  }

 private:
  int64 neurons_;
  const Real* weight_;
  bool elementwise_, skips_zeros_;
  std::vector<Real> panels_;
};

// Computes the forward pass of one chunk.
template <class Model, class Scalar>
void compute_forward_chunk(const RecurrentForwardParams<Scalar>& params, const WeightProduct<Scalar>& product,
                           const Chunk& chunk) {
  using Real = Real_t<Scalar>;
  Rows<Real> buffers = padded_rows<Real>(8, chunk.length);
  Real *const x_buffer = buffers.allocate(), *const current_buffer = buffers.allocate(),
              *const h_buffer = buffers.allocate();
  Real *const s_buffer = buffers.allocate(), *const out_buffer = buffers.allocate();
  Real *const v = buffers.allocate(), *const w = buffers.allocate(), *const i = buffers.allocate();
  const int64 all = chunk.shape.neurons();
  std::vector<int32_t> indices(static_cast<size_t>(chunk.length));
  RepeatedNeurons<Scalar> repeated(params);
  ChunkNoise<Scalar> noise(params);
  const auto states = state_rows<Model>(v, w);
  load_states(params.v_init, all, chunk.first, params.options.v_rest, chunk.length, states);
  load_state(params.i_init, chunk.first, Real(0), chunk.length, i);
  const Real* s_before = state_or_filled(params.s_init, chunk, Real(0), s_buffer);
  const bool scales = params.options.scale_output;
  for (int64 t = 0; t < params.steps; ++t) {
    Real* const current = start_row(params.i_seq, chunk, t, current_buffer);
    product.multiply(s_before, chunk.count, indices.data(), current);
    const Real* const x = read_row(params.x_seq, chunk, t, x_buffer);
    Real* const h = start_row(params.h_seq, chunk, t, h_buffer);
    Real* const out = start_row(params.s_seq, chunk, t, scales ? out_buffer : s_buffer);
    Real* const s = params.emitted != nullptr ? start_row(params.emitted, chunk, t, s_buffer) : scales ? s_buffer : out;
    const uint16* draws = noise.draws(chunk, t);
    finish_row(w, params.w_seq, chunk, t);
    repeated.for_each_part(chunk, [&](int64 offset, int64 length) {
      run<RecurrentCurrentLoop<Real>>({x + offset, repeated[kRecurrentBias], repeated[kRecurrentSynDecay],
                                       params.has_synapse, current + offset, i + offset, length});
      run<StepLoop<Real, Model, NeuronRows<Real>>>(
          {repeated.neurons(), params.options, params.noise.analog_below, length, current + offset, draws + offset,
           v + offset, v + offset, h + offset, s + offset,
           rows_to_prefetch(chunk, t + 1, offset, params.x_seq, params.h_seq, params.s_seq), w + offset, w + offset,
           /*compared=*/true});
      if (scales) run<MultiplyLoop<Real>>({s + offset, {repeated[kThreshold], Real(0)}, out + offset, length});
    });
    finish_row(scales ? out : s, params.s_seq, chunk, t);
    finish_row(s, params.emitted, chunk, t);
    finish_row(h, params.h_seq, chunk, t);
    finish_row(v, params.v_seq, chunk, t);
    finish_row(current, params.i_seq, chunk, t);
    s_before = s;
  }
  store_states(states, chunk.length, params.v_last, all, chunk.first);
  store_state(s_before, chunk.length, params.s_last, chunk.first);
  store_state(i, chunk.length, params.i_last, chunk.first);
}

// Computes the backward pass of one chunk, and sums the gradients of the parameters over the chunk's rows.
template <class Model, class Scalar>
class ChunkBackward {
  using Real = Real_t<Scalar>;

 public:
  ChunkBackward(const RecurrentBackwardParams<Scalar>& params, const WeightProduct<Scalar>& product, const Chunk& chunk)
      : params_(params), product_(product), chunk_(chunk) {}

  // Computes the gradients of all steps, from the last to the first, and stores them.
  void compute() {
    const int64 all = chunk_.shape.neurons();
    const auto gradients = state_rows<Model>(dv_, dw_);
    load_states(params_.grad_v_last, all, chunk_.first, Real(0), chunk_.length, gradients);
    load_state(params_.grad_i_last, chunk_.first, Real(0), chunk_.length, di_);
    load_state(params_.grad_s_last, chunk_.first, Real(0), chunk_.length, feedback_);
    std::fill_n(zeros_, chunk_.length, Real(0));
    std::fill_n(sums_, kNumRecurrentSums * parts_.stride(), Real(0));
    carried_ = params_.grad_v_last != nullptr;
    read_step_before(params_.steps);
    if (Model::kHasAdaptation && carried_ && params_.grad_parameters != nullptr) {
      repeated_.for_each_part(chunk_, [&](int64 offset, int64 length) {
        add_gradients_of_adaptation(potential_before(offset, length), offset, length);
      });
    }
    for (int64 t = params_.steps - 1; t >= 0; --t) backward_step(t);
    store_states(gradients, chunk_.length, params_.grad_v_init, all, chunk_.first);
    store_state(di_, chunk_.length, params_.grad_i_init, chunk_.first);
    store_state(feedback_, chunk_.length, params_.grad_s_init, chunk_.first);
    if (params_.grad_parameters != nullptr) store_sums();
  }

 private:
  // What backward needs of one step: h, s and w, where w is the adaptation before the step. The i after the step is
  // needed only for the gradient of syn_decay. v is null, because potential_before computes it again. Before step 0, s,
  // v and i are the initial states, and h and w are null.
  struct Step {
    const Real *h, *s, *v, *i, *w;
  };

  // The row of sums of a parameter's gradient, [repeated_.length()].
  Real* sums_row(int id) { return sums_ + id * parts_.stride(); }

  // Whether to compute the gradient of syn_decay, for which forward keeps i_seq.
  bool wants_syn_decay() const { return params_.grad_parameters != nullptr && params_.i_seq != nullptr; }

  // Sets before_ to the values of step t - 1, in place or as copies. The copies of h, s and w alternate between two
  // buffers, because backward_step also reads those of step t. It does not read i of step t, so one buffer is enough
  // for i.
  void read_step_before(int64 t) {
    if (t == 0) {
      before_ = {nullptr, state_or_filled(params_.s_init, chunk_, Real(0), s_[0]),
                 state_or_filled(params_.v_init, chunk_, params_.options.v_rest, h_[0]),
                 state_or_filled(params_.i_init, chunk_, Real(0), i_), nullptr};
      return;
    }
    const Real* w = params_.w_seq == nullptr ? zeros_ : read_row(params_.w_seq, chunk_, t - 1, w_[t % 2]);
    before_ = {read_row(params_.h_seq, chunk_, t - 1, h_[t % 2]), read_row(params_.emitted, chunk_, t - 1, s_[t % 2]),
               nullptr, wants_syn_decay() ? read_row(params_.i_seq, chunk_, t - 1, i_) : nullptr, w};
  }

  // Adds factor * (a * (b - c)) to the sums of a parameter's gradient.
  void accumulate(int id, int64 length, Real factor, const Real* a, Operand<Real> b, Operand<Real> c = {nullptr, 0}) {
    run<AccumulateLoop<Real>>({length, factor, a, b, c, sums_row(id)});
  }

  // Computes the gradients of step t from those of step t + 1, and adds terms to the sums of the parameters' gradients.
  void backward_step(int64 t) {
    const Step now = before_;
    read_step_before(t);
    const bool scales = params_.options.scale_output;
    const Real* g = params_.grad_s_seq == nullptr ? nullptr : read_row(params_.grad_s_seq, chunk_, t, g_);
    const Real* gh = params_.grad_h_seq == nullptr ? zeros_ : read_row(params_.grad_h_seq, chunk_, t, gh_);
    if (params_.grad_v_seq != nullptr) {
      const Real* gv = read_row(params_.grad_v_seq, chunk_, t, gv_);
      run<AccumulateLoop<Real>>({chunk_.length, Real(1), gv, kOne, kZero, dv_});
      carried_ = true;
    }
    Real* const dj = start_row(params_.grad_j_seq, chunk_, t, dj_);
    repeated_.for_each_part(chunk_, [&](int64 offset, int64 length) {
      // If no parameter wants a gradient, the loop's sums are not read, so zeros_ may be passed as v.
      const Real* v = params_.grad_parameters == nullptr ? zeros_ : potential_before(offset, length);
      if (g != nullptr) {
        const Operand<Real> scale = scales ? Operand<Real>{repeated_[kThreshold], Real(0)} : kOne;
        run<AccumulateLoop<Real>>({length, Real(1), g + offset, scale, kZero, feedback_ + offset});
        if (scales && params_.grad_parameters != nullptr) {
          accumulate(kThreshold, length, Real(1), g + offset, {now.s + offset, Real(0)});
        }
      }
      run<AdjointLoop<Real, Model, NeuronRows<Real>, Sums::kRecurrent>>(
          {.neurons = repeated_.neurons(),
           .options = params_.options,
           .length = length,
           .carried = carried_,
           .g = feedback_ + offset,
           .gh = gh + offset,
           .h = now.h + offset,
           .s = now.s + offset,
           .dv = dv_ + offset,
           .dx = dj + offset,
           .ahead = rows_to_prefetch(chunk_, t - 1, offset, params_.grad_s_seq, params_.h_seq, params_.emitted,
                                     params_.grad_j_seq),
           .v = v,
           .second = now.w + offset,
           .d_second = dw_ + offset,
           .sums = sums_,
           .sums_stride = parts_.stride()});
      if (params_.has_synapse) {
        run<AccumulateLoop<Real>>({length, Real(1), di_ + offset, kOne, kZero, dj + offset});
        run<MultiplyLoop<Real>>({dj + offset, {repeated_[kRecurrentSynDecay], Real(0)}, di_ + offset, length});
      }
      if (params_.grad_parameters != nullptr) add_gradients(dj, v, offset, length);
    });
    carried_ = true;
    finish_row(dj, params_.grad_j_seq, chunk_, t);
    if (params_.detach_recurrent) {
      std::fill_n(feedback_, chunk_.length, Real(0));
    } else if (t > 0 || params_.grad_s_init != nullptr) {
      product_.multiply(dj, chunk_.count, nullptr, feedback_);
    }
  }

  // Adds the terms that AdjointLoop does not add to the sums of the parameters' gradients. For the bias, syn_decay and
  // an elementwise weight, these are the terms of the current step. For the adaptation, they are the terms of the step
  // before, if there is one.
  void add_gradients(const Real* dj, const Real* v, int64 offset, int64 length) {
    accumulate(kRecurrentBias, length, Real(1), dj + offset, kOne);
    if (Model::kHasAdaptation && before_.v == nullptr) add_gradients_of_adaptation(v, offset, length);
    if (wants_syn_decay()) accumulate(kRecurrentSynDecay, length, Real(1), dj + offset, {before_.i + offset, Real(0)});
    if (params_.elementwise) {
      accumulate(kRecurrentWeight, length, Real(1), dj + offset, {before_.s + offset, Real(0)});
    }
  }

  // Returns the potential before the current step, for a part of the chunk. Before step 0, this is the initial
  // potential. For later steps, it is computed in v_.
  const Real* potential_before(int64 offset, int64 length) {
    if (before_.v != nullptr) return before_.v + offset;
    run<ResetLoop<Real, Model>>(
        {repeated_.neurons(), params_.options, before_.h + offset, before_.s + offset, before_.w + offset, v_, length});
    return v_;
  }

  // Adds the terms of the step in before_ to the sums for the adaptation's parameters. dw_ must be the gradient of w
  // after that step, and `v` the potential after that step.
  void add_gradients_of_adaptation(const Real* v, int64 offset, int64 length) {
    accumulate(kAdaptDecay, length, Real(1), dw_ + offset, {before_.w + offset, Real(0)});
    accumulate(kAdaptPotential, length, Real(1), dw_ + offset, {v, Real(0)}, {nullptr, params_.options.v_rest});
    accumulate(kAdaptSpike, length, Real(1), dw_ + offset, {before_.s + offset, Real(0)});
  }

  // Adds up the sums of the repeated rows, and stores the gradients of the parameters. If the width is stored as a
  // logarithm or the decay as a logit, the gradient is that of the logarithm or logit.
  void store_sums() {
    double* totals = params_.grad_parameters + chunk_.index * kNumRecurrentSums * params_.neurons;
    for (int id = 0; id < kNumRecurrentSums; ++id) {
      for (int64 n = 0; n < repeated_.length(); ++n) {
        totals[id * params_.neurons + n % params_.neurons] += static_cast<double>(sums_row(id)[n]);
      }
    }
    for (const int id : {kWidth, kDecay}) {
      const Derivative derivative = derivative_of(id, params_.options.log_width, params_.options.logit_decay);
      if (derivative == Derivative::kNone) continue;
      for (int64 k = id * params_.neurons; k < (id + 1) * params_.neurons; ++k) {
        totals[k] = static_cast<double>(apply_chain_rule(derivative, totals[k], params_.parameters[k]));
      }
    }
  }

  static constexpr Operand<Real> kZero = {nullptr, Real(0)}, kOne = {nullptr, Real(1)};

  const RecurrentBackwardParams<Scalar>& params_;
  const WeightProduct<Scalar>& product_;
  Chunk chunk_;
  RepeatedNeurons<Scalar> repeated_{params_};
  Rows<Real> rows_ = padded_rows<Real>(16, chunk_.length);
  Real *const h_[2] = {rows_.allocate(), rows_.allocate()}, *const s_[2] = {rows_.allocate(), rows_.allocate()};
  Real* const w_[2] = {rows_.allocate(), rows_.allocate()};
  Real *const g_ = rows_.allocate(), *const gh_ = rows_.allocate(), *const gv_ = rows_.allocate(),
              *const i_ = rows_.allocate();
  Real *const dj_ = rows_.allocate(), *const zeros_ = rows_.allocate();
  Real *const dv_ = rows_.allocate(), *const dw_ = rows_.allocate(), *const di_ = rows_.allocate();
  Real* const feedback_ = rows_.allocate();  // the gradient of the emitted spikes
  Rows<Real> parts_ = padded_rows<Real>(1 + kNumRecurrentSums, repeated_.length());
  Real *const v_ = parts_.allocate(), *const sums_ = parts_.allocate(kNumRecurrentSums);
  Step before_{};
  bool carried_ = false;
};

// Computes the gradient of the weights from presynaptic neurons [first, last). Reads the sequence in memory order, in
// blocks of kBlock rows [N]. dj of a block then stays in the L2 cache: in float32 it has 256 KiB for 256 neurons.
template <class Scalar>
void compute_weight_gradient(const RecurrentBackwardParams<Scalar>& params, int64 first, int64 last) {
  using Real = Real_t<Scalar>;
  constexpr int64 kBlock = 256, kStride = kBlock + 16;  // no power of two: else rows share cache lines
  const int64 neurons = params.neurons, count = params.steps * params.batch;
  const int64 lag = params.batch_first ? 1 : params.batch;  // rows between s[t-1] and dj[t]
  const std::vector<Real> zeros(static_cast<size_t>(neurons));
  const auto spikes_before = [&](int64 row) -> const Real* {
    if (row / lag % params.steps > 0) return params.emitted + (row - lag) * neurons;
    if (params.s_init == nullptr) return zeros.data();
    return params.s_init + (params.batch_first ? row / params.steps : row) * neurons;
  };
  std::array<const Real*, kBlock> s;
  std::vector<Real> panels(static_cast<size_t>(panels_size<Real>(kBlock, neurons)));
  std::vector<Real> spikes(kMaxProductRows * kStride), transposed(static_cast<size_t>((last - first) * neurons));
  std::vector<int32_t> indices(kMaxProductRows * kBlock);
  for (int64 begin = 0; begin < count; begin += kBlock) {
    const int64 rows = std::min(kBlock, count - begin);
    const Real* dj = params.grad_j_seq + begin * neurons;
    const bool skips_zeros = all_finite(dj, rows * neurons);
    fill_panels(dj, neurons, 1, rows, neurons, panels.data());
    for (int64 row = 0; row < rows; ++row) s[row] = spikes_before(begin + row);
    for (int64 k = first; k < last; k += kMaxProductRows) {
      const int64 width = std::min(kMaxProductRows, last - k);
      for (int64 row = 0; row < rows; ++row) {
        for (int64 i = 0; i < width; ++i) spikes[i * kStride + row] = s[row][k + i];
      }
      multiply<Real>({spikes.data(), kStride, width, rows, neurons, panels.data(), /*accumulate=*/true,
                      &transposed[(k - first) * neurons]},
                     skips_zeros, indices.data());
    }
  }
  for (int64 k = first; k < last; ++k) {
    for (int64 n = 0; n < neurons; ++n) params.grad_weight[n * neurons + k] = transposed[(k - first) * neurons + n];
  }
}

// Computes the gradient of the whole weight.
template <class Scalar>
void compute_weight_gradient(const RecurrentBackwardParams<Scalar>& params) {
  at::parallel_for(0, (params.neurons + kMaxProductRows - 1) / kMaxProductRows, 1, [&](int64_t begin, int64_t end) {
    compute_weight_gradient(params, begin * kMaxProductRows, std::min(params.neurons, end * kMaxProductRows));
  });
}

// Calls task(model, chunk) for all chunks, on as many threads as torch.get_num_threads() allows.
template <class Params, class Task>
void for_each_chunk(const Params& params, Task&& task) {
  using Real = typename Params::Real;
  const NeuronOptions<Real>& options = params.options;
  const auto run_all = [&](auto model) {
    at::parallel_for(0, num_recurrent_chunks(params.batch), 1, [&](int64_t begin, int64_t end) {
      for (int64 index = begin; index < end; ++index) task(model, Chunk(params, index));
    });
  };
  static_assert(static_cast<int>(Surrogate::kInteger) == kNumSurrogates - 1);
  if (params.options.has_adaptation()) return run_all(AdaptiveLIF<Real>::from_options(params.options));
  with_model(options, run_all, std::make_integer_sequence<int, kNumSurrogates - 1>{});
}

}  // namespace

template <class Scalar>
void recurrent_forward(const RecurrentForwardParams<Scalar>& given) {
  RecurrentForwardParams<Scalar> params = given;
  params.noise = params.noise.resolved();
  const WeightProduct<Scalar> product(params, /*forward=*/true);
  for_each_chunk(
      params, [&](auto model, const Chunk& chunk) { compute_forward_chunk<decltype(model)>(params, product, chunk); });
}

template <class Scalar>
void recurrent_backward(const RecurrentBackwardParams<Scalar>& params) {
  const WeightProduct<Scalar> product(params, /*forward=*/false);
  for_each_chunk(params, [&](auto model, const Chunk& chunk) {
    ChunkBackward<decltype(model), Scalar>(params, product, chunk).compute();
  });
  if (params.grad_weight != nullptr) compute_weight_gradient(params);
}

template void recurrent_forward(const RecurrentForwardParams<Half>&);
template void recurrent_forward(const RecurrentForwardParams<BFloat16>&);
template void recurrent_forward(const RecurrentForwardParams<float>&);
template void recurrent_forward(const RecurrentForwardParams<double>&);
template void recurrent_backward(const RecurrentBackwardParams<Half>&);
template void recurrent_backward(const RecurrentBackwardParams<BFloat16>&);
template void recurrent_backward(const RecurrentBackwardParams<float>&);
template void recurrent_backward(const RecurrentBackwardParams<double>&);

}  // namespace asgl::cpu
