// The CPU kernels of recurrent neurons. A task computes a chunk of the batch through all steps: a product with the
// weight, then the neuron's loops of cpu/loops.h. Products forward, and the weight's gradient, add up only the rows of
// the spikes that there are, unless most elements spiked.
#include "cpu/recurrent.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "cpu/loops.h"
#include "cpu/philox_simd.h"
#include "cpu/product.h"
#include "cpu/rows.h"
#include "launch.h"

namespace asgl::cpu {
namespace {

// A gathered element takes the time of four in a dense product: 10 and 40 GMAC/s in float32 on one core with AVX2.
constexpr int64 kDenseShare = 4;

// i[t] and the current j[t] = x[t] + (product + bias), which it replaces.
template <class Real>
struct RecurrentCurrentLoop {
  struct Args {
    const Real *x, *bias, *syn_decay;
    bool has_synapse;
    Real *product, *i;
    int64 length;
  };

  static ASGL_HOST_DEVICE void run(Args args) {
    if (args.has_synapse) return loop<true>(args);
    loop<false>(args);
  }

  template <bool kSynapse>
  static ASGL_HOST_DEVICE void loop(Args args) {
#pragma GCC ivdep
    for (int64 n = 0; n < args.length; ++n) {
      const Real j = args.x[n] + (args.product[n] + args.bias[n]);
      if constexpr (kSynapse) args.i[n] = args.syn_decay[n] * args.i[n] + j;
      args.product[n] = kSynapse ? args.i[n] : j;
    }
  }
};

// dj[t] = dx[t] + di, where dx = input_gain * dh;   di = syn_decay * dj[t] for the step before
template <class Real>
struct SynapseAdjointLoop {
  struct Args {
    const Real* syn_decay;
    Real *dj, *di;
    int64 length;
  };

  static ASGL_HOST_DEVICE void run(Args args) {
#pragma GCC ivdep
    for (int64 n = 0; n < args.length; ++n) {
      const Real dj = args.dj[n] + args.di[n];
      args.dj[n] = dj;
      args.di[n] = args.syn_decay[n] * dj;
    }
  }
};

template <class Real, class Model>
struct ResetLoop {
  struct Args {
    NeuronRows<Real> neurons;
    const Real *h, *s;
    Real* v;
    int64 length;
  };

  static ASGL_HOST_DEVICE void run(Args args) {
#pragma GCC ivdep
    for (int64 n = 0; n < args.length; ++n) args.v[n] = Model::reset(args.h[n], args.s[n], args.neurons[n]);
  }
};

// The rows [first, first + count) of the batch.
struct Chunk {
  int64 first, count, neurons;

  int64 length() const { return count * neurons; }

  // Calls f(element of a sequence, offset, length) for each contiguous piece of step t: all rows, or one.
  template <class Params, class F>
  void for_each_piece(const Params& params, int64 t, F&& f) const {
    const int64 rows = params.row_stride == neurons ? count : 1;
    for (int64 row = 0; row < count; row += rows) {
      f(t * params.step_stride + (first + row) * params.row_stride, row * neurons, rows * neurons);
    }
  }
};

template <class Params, class From, class To>
void read_rows(const Params& params, const Chunk& chunk, int64 t, const From* sequence, To* rows) {
  chunk.for_each_piece(params, t, [&](int64 element, int64 offset, int64 length) {
    run<ConvertLoop<From, To>>({sequence + element, rows + offset, length});
  });
}

template <class Params, class From, class To>
void write_rows(const Params& params, const Chunk& chunk, int64 t, const From* rows, To* sequence) {
  if (sequence == nullptr) return;
  chunk.for_each_piece(params, t, [&](int64 element, int64 offset, int64 length) {
    run<ConvertLoop<From, To>>({rows + offset, sequence + element, length});
  });
}

template <class Real>
void read_state(const Real* state, const Chunk& chunk, Real otherwise, Real* rows) {
  if (state == nullptr) return std::fill_n(rows, chunk.length(), otherwise), void();
  std::copy_n(state + chunk.first * chunk.neurons, chunk.length(), rows);
}

template <class Real>
void write_state(const Real* rows, const Chunk& chunk, Real* state) {
  if (state != nullptr) std::copy_n(rows, chunk.length(), state + chunk.first * chunk.neurons);
}

// The parameters of adjacent rows of the batch, repeated for each, so that loops are long.
template <class Scalar>
class RepeatedNeurons {
  using Real = Real_t<Scalar>;

 public:
  explicit RepeatedNeurons(const RecurrentParams<Scalar>& params)
      : period_(params.neurons),
        length_(std::clamp<int64>(kTile / params.neurons, 1, kRecurrentRows) * params.neurons),
        rows_(kRecurrentParameters + 3, length_) {
    for (int id = 0; id < kRecurrentParameters; ++id) fill(params.parameters + id * period_);
    run<InverseLoop<Real>>({rows_.row(kRecurrentWidth), length_});
    std::fill_n(rows_.take(), length_, params.input_gain);
    std::fill_n(rows_.take(), length_, Real(0));
  }

  int64 length() const { return length_; }
  NeuronRows<Real> neurons() {
    return {{(*this)[kRecurrentDecay], (*this)[kRecurrentThreshold], (*this)[kRecurrentReset],
             (*this)[kRecurrentWidth],  // the inverse
             (*this)[kRecurrentParameters], zeros(), zeros()}};
  }
  const Real* operator[](int id) { return rows_.row(id); }
  const Real* zeros() { return rows_.row(kRecurrentParameters + 1); }

  // Calls f(offset, length) for parts of a chunk.
  template <class F>
  void for_each_part(const Chunk& chunk, F&& f) const {
    for (int64 offset = 0; offset < chunk.length(); offset += length_) {
      f(offset, std::min(length_, chunk.length() - offset));
    }
  }

 private:
  void fill(const Real* values) {
    Real* row = rows_.take();
    for (int64 n = 0; n < length_; n += period_) std::copy_n(values, period_, row + n);
  }

  int64 period_, length_;
  Rows<Real> rows_;
};

// The draws of a chunk for one step.
template <class Scalar>
class ChunkNoise {
 public:
  explicit ChunkNoise(const RecurrentParams<Scalar>& params)
      : drawn_(params.noise.drawn()),
        rng_state_(params.noise.rng_state),
        rows_(2, kRecurrentRows * params.neurons / 4 + 2 * kNoiseGroups) {
    std::fill_n(rows_.row(0), rows_.stride(), 0);
  }

  // Zeros, below any analog_below but 0, if nothing is drawn.
  const uint16* row(const Chunk& chunk, int64 t) {
    const auto* draws = reinterpret_cast<const uint16*>(rows_.row(0));
    if (!drawn_) return draws;
    const int64 first = chunk.first * chunk.neurons, group = first / 4 / kNoiseGroups * kNoiseGroups;
    const int64 state[2] = {rng_state_[0],
                            static_cast<int64>(static_cast<uint64>(rng_state_[1]) + static_cast<uint64>(t))};
    const int64 groups = (first + chunk.length() + 3) / 4 - group;
    run<NoiseLoop>({noise_key(state), static_cast<uint64>(group), groups, 0, rows_.row(0), rows_.row(1)});
    return draws + (first - 4 * group);
  }

 private:
  bool drawn_;
  const int64* rng_state_;
  Rows<uint64> rows_;
};

// Zeros may be left out of products with finite values alone.
template <class Real>
struct FiniteLoop {
  struct Args {
    const Real* values;
    int64 length;
    bool* all_finite;
  };

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

// out = a W of a diagonal W
template <class Real>
void multiply_diagonal(const Real* a, int64 rows, const Real* weight, int64 neurons, Real* out) {
  for (int64 row = 0; row < rows; ++row) {
    run<MultiplyLoop<Real>>({a + row * neurons, {weight, Real(0)}, out + row * neurons, neurons});
  }
}

// out = s W^T, [rows, N]
template <class Scalar>
class SpikeProduct {
  using Real = Real_t<Scalar>;

 public:
  explicit SpikeProduct(const RecurrentParams<Scalar>& params)
      : neurons_(params.neurons),
        weight_(params.weight),
        elementwise_(params.elementwise),
        skips_zeros_(elementwise_ || all_finite(params.weight, params.neurons * params.neurons)),
        panels_(elementwise_ ? 0 : panels_size<Real>(neurons_, neurons_)) {
    if (!elementwise_) fill_panels(weight_, 1, neurons_, neurons_, neurons_, panels_.data());
  }

  // `indices` and `values` have room for as many elements as `s`.
  void multiply(const Real* s, int64 rows, int32_t* indices, Real* values, Real* out) const {
    if (elementwise_) return multiply_diagonal(s, rows, weight_, neurons_, out);
    std::array<int64, kRecurrentRows> counts{};
    for (int64 row = 0; row < rows && skips_zeros_; ++row) {
      const int64 first = row * neurons_;
      counts[row] = list_nonzero(s + first, neurons_, indices + first, values + first);
    }
    const int64 spikes = std::accumulate(counts.begin(), counts.end(), int64{0});
    if (!skips_zeros_ || spikes * kDenseShare > rows * neurons_) {
      return run_vectors<DenseProductLoop, Real>({s, rows, neurons_, neurons_, panels_.data(), out});
    }
    for (int64 row = 0; row < rows; ++row) {
      const int64 first = row * neurons_;
      run_vectors<GatheredProductLoop, Real>({indices + first, values + first, counts[row], neurons_, panels_.data(),
                                              kPanel<Real>, neurons_ * kPanel<Real>, /*accumulate=*/false,
                                              out + first});
    }
  }

 private:
  int64 neurons_;
  const Real* weight_;
  bool elementwise_, skips_zeros_;
  std::vector<Real> panels_;
};

template <class Model, class Scalar>
void forward_chunk(const RecurrentForwardParams<Scalar>& params, const SpikeProduct<Scalar>& product,
                   const Chunk& chunk) {
  using Real = Real_t<Scalar>;
  Rows<Real> rows(8, chunk.length());
  Real *x = rows.take(), *current = rows.take(), *v = rows.take(), *i = rows.take(), *h = rows.take();
  Real *s = rows.take(), *out = rows.take(), *values = rows.take();
  std::vector<int32_t> indices(static_cast<size_t>(chunk.length()));
  RepeatedNeurons<Scalar> repeated(params);
  ChunkNoise<Scalar> noise(params);
  read_state(params.v_init, chunk, params.options.v_rest, v);
  read_state(params.s_init, chunk, Real(0), s);
  read_state(params.i_init, chunk, Real(0), i);
  for (int64 t = 0; t < params.steps; ++t) {
    product.multiply(s, chunk.count, indices.data(), values, current);
    read_rows(params, chunk, t, params.x_seq, x);
    const uint16* draws = noise.row(chunk, t);
    repeated.for_each_part(chunk, [&](int64 offset, int64 length) {
      run<RecurrentCurrentLoop<Real>>({x + offset, repeated[kRecurrentBias], repeated[kRecurrentSynDecay],
                                       params.has_synapse, current + offset, i + offset, length});
      run<StepLoop<Real, Model, NeuronRows<Real>>>({repeated.neurons(), params.options, params.noise.analog_below,
                                                    length, current + offset, draws + offset, v + offset, v + offset,
                                                    h + offset, s + offset, Ahead{}});
      if (params.options.scale_output) {
        run<MultiplyLoop<Real>>({s + offset, {repeated[kRecurrentThreshold], Real(0)}, out + offset, length});
      }
    });
    write_rows(params, chunk, t, params.options.scale_output ? out : s, params.s_seq);
    write_rows(params, chunk, t, s, params.emitted);
    write_rows(params, chunk, t, h, params.h_seq);
    write_rows(params, chunk, t, v, params.v_seq);
    write_rows(params, chunk, t, current, params.i_seq);
  }
  write_state(v, chunk, params.v_last);
  write_state(s, chunk, params.s_last);
  write_state(i, chunk, params.i_last);
}

// Backward of a chunk, with the sums of its parameters' gradients.
template <class Model, class Scalar>
class ChunkBackward {
  using Real = Real_t<Scalar>;

 public:
  // `panels` are those of W for the product dj W.
  ChunkBackward(const RecurrentBackwardParams<Scalar>& params, const Real* panels, const Chunk& chunk)
      : params_(params), panels_(panels), chunk_(chunk) {}

  void run() {
    read_state(params_.grad_v_last, chunk_, Real(0), dv_);
    read_state(params_.grad_i_last, chunk_, Real(0), di_);
    read_state(params_.grad_s_last, chunk_, Real(0), feedback_);
    carried_ = params_.grad_v_last != nullptr;
    has_feedback_ = params_.grad_s_last != nullptr;
    std::fill_n(sums_, kRecurrentSums * sums_stride(), Real(0));
    read_before(params_.steps);
    for (int64 t = params_.steps - 1; t >= 0; --t) walk_back(t);
    write_state(dv_, chunk_, params_.grad_v_init);
    write_state(di_, chunk_, params_.grad_i_init);
    if (params_.grad_s_init != nullptr) {
      if (!has_feedback_) std::fill_n(feedback_, chunk_.length(), Real(0));
      write_state(feedback_, chunk_, params_.grad_s_init);
    }
    if (params_.grad_parameters != nullptr) store_sums();
  }

 private:
  int64 sums_stride() const { return repeated_.length(); }
  Real* sums(int id) { return sums_ + id * sums_stride(); }

  bool wants_syn_decay() const { return params_.grad_parameters != nullptr && params_.i_seq != nullptr; }

  // What the step before t left, in the buffers of t's parity.
  void read_before(int64 t) {
    if (t == 0) {
      read_state(params_.v_init, chunk_, params_.options.v_rest, v_);
      read_state(params_.s_init, chunk_, Real(0), s_[0]);
      read_state(params_.i_init, chunk_, Real(0), i_);
      return;
    }
    if (wants_syn_decay()) read_rows(params_, chunk_, t - 1, params_.i_seq, i_);
    read_rows(params_, chunk_, t - 1, params_.h_seq, h_[t % 2]);
    read_rows(params_, chunk_, t - 1, params_.emitted, s_[t % 2]);
  }

  void accumulate(int id, int64 length, Real factor, const Real* a, Operand<Real> b, Operand<Real> c = {nullptr, 0}) {
    cpu::run<AccumulateLoop<Real>>({length, factor, a, b, c, sums(id)});
  }

  void walk_back(int64 t) {
    const Real *h = h_[(t + 1) % 2], *s = s_[(t + 1) % 2];
    const bool scales = params_.options.scale_output;
    read_before(t);
    if (params_.grad_s_seq != nullptr) {
      read_rows(params_, chunk_, t, params_.grad_s_seq, g_);
    } else {
      std::fill_n(g_, chunk_.length(), Real(0));
    }
    if (params_.grad_h_seq != nullptr) read_rows(params_, chunk_, t, params_.grad_h_seq, gh_);
    if (params_.grad_v_seq != nullptr) {
      read_rows(params_, chunk_, t, params_.grad_v_seq, dh_);
      cpu::run<AccumulateLoop<Real>>({chunk_.length(), Real(1), dh_, kOne, kZero, dv_});
      carried_ = true;
    }
    repeated_.for_each_part(chunk_, [&](int64 offset, int64 length) {
      const Operand<Real> v_threshold = {repeated_[kRecurrentThreshold], Real(0)};
      if (scales && params_.grad_parameters != nullptr) {
        accumulate(kRecurrentThreshold, length, Real(1), g_ + offset, {s + offset, Real(0)});
      }
      if (scales) cpu::run<MultiplyLoop<Real>>({g_ + offset, v_threshold, g_ + offset, length});
      if (has_feedback_) {
        cpu::run<AccumulateLoop<Real>>({length, Real(1), feedback_ + offset, kOne, kZero, g_ + offset});
      }
      cpu::run<AdjointLoop<Real, Model, NeuronRows<Real>, Sums::kNone>>({.neurons = repeated_.neurons(),
                                                                         .options = params_.options,
                                                                         .length = length,
                                                                         .carried = carried_,
                                                                         .g = g_ + offset,
                                                                         .gh = gh_ + offset,
                                                                         .h = h + offset,
                                                                         .s = s + offset,
                                                                         .dv = dv_ + offset,
                                                                         .d_reset = d_reset_ + offset,
                                                                         .distance = distance_ + offset,
                                                                         .dy = dy_ + offset,
                                                                         .dh = dh_ + offset,
                                                                         .dx = dj_ + offset,
                                                                         .ahead = {}});
      if (params_.has_synapse) {
        cpu::run<SynapseAdjointLoop<Real>>({repeated_[kRecurrentSynDecay], dj_ + offset, di_ + offset, length});
      }
      if (params_.grad_parameters != nullptr) add_gradients(t, offset, length);
    });
    carried_ = true;
    write_rows(params_, chunk_, t, dj_, params_.grad_j_seq);
    if (params_.detach_recurrent || (t == 0 && params_.grad_s_init == nullptr)) {
      has_feedback_ = false;
      return;
    }
    has_feedback_ = true;
    if (params_.elementwise) {
      multiply_diagonal(dj_, chunk_.count, params_.weight, chunk_.neurons, feedback_);
    } else {
      run_vectors<DenseProductLoop, Real>({dj_, chunk_.count, chunk_.neurons, chunk_.neurons, panels_, feedback_});
    }
  }

  void add_gradients(int64 t, int64 offset, int64 length) {
    accumulate(kRecurrentWidth, length, Real(1), dy_ + offset, {distance_ + offset, Real(0)});
    accumulate(kRecurrentThreshold, length, Real(-1), dy_ + offset, {repeated_[kRecurrentWidth], Real(0)});
    if (carried_) accumulate(kRecurrentReset, length, Real(1), d_reset_ + offset, kOne);
    accumulate(kRecurrentBias, length, Real(1), dj_ + offset, kOne);
    if (t > 0) {
      cpu::run<ResetLoop<Real, Model>>(
          {repeated_.neurons(), h_[t % 2] + offset, s_[t % 2] + offset, v_ + offset, length});
    }
    accumulate(kRecurrentDecay, length, Real(1), dh_ + offset, {v_ + offset, Real(0)},
               {nullptr, params_.options.v_rest});
    if (wants_syn_decay()) accumulate(kRecurrentSynDecay, length, Real(1), dj_ + offset, {i_ + offset, Real(0)});
    if (params_.elementwise) {
      accumulate(kRecurrentWeight, length, Real(1), dj_ + offset, {s_[t % 2] + offset, Real(0)});
    }
  }

  void store_sums() {
    double* totals = params_.grad_parameters + chunk_.first / kRecurrentRows * kRecurrentSums * chunk_.neurons;
    for (int id = 0; id < kRecurrentSums; ++id) {
      for (int64 n = 0; n < sums_stride(); ++n) {
        totals[id * chunk_.neurons + n % chunk_.neurons] += static_cast<double>(sums(id)[n]);
      }
    }
    for (int64 n = 0; n < chunk_.neurons; ++n) {  // from the gradient of 1 / width
      double& width = totals[kRecurrentWidth * chunk_.neurons + n];
      width = gradient_of_width(width, static_cast<double>(params_.parameters[kRecurrentWidth * chunk_.neurons + n]));
    }
  }

  static constexpr Operand<Real> kZero = {nullptr, Real(0)}, kOne = {nullptr, Real(1)};

  const RecurrentBackwardParams<Scalar>& params_;
  const Real* panels_;
  Chunk chunk_;
  RepeatedNeurons<Scalar> repeated_{params_};
  Rows<Real> rows_{16, chunk_.length()};
  Real *const h_[2] = {rows_.take(), rows_.take()}, *const s_[2] = {rows_.take(), rows_.take()};
  Real *const v_ = rows_.take(), *const g_ = rows_.take(), *const dv_ = rows_.take(), *const di_ = rows_.take();
  Real *const feedback_ = rows_.take(), *const d_reset_ = rows_.take(), *const distance_ = rows_.take();
  Real *const dy_ = rows_.take(), *const dh_ = rows_.take(), *const dj_ = rows_.take(), *const i_ = rows_.take();
  Real* const gh_ = [this] {
    Real* row = rows_.take();
    std::fill_n(row, chunk_.length(), Real(0));
    return row;
  }();
  Rows<Real> sums_rows_{1, kRecurrentSums * repeated_.length()};
  Real* const sums_ = sums_rows_.take();
  bool carried_ = false, has_feedback_ = false;
};

// The sequence's rows, [N] each, in memory order. s[t-1] is `lag` rows before dj[t].
template <class Scalar>
struct SequenceRows {
  const RecurrentBackwardParams<Scalar>& params;
  int64 lag = params.step_stride / params.neurons, count = params.steps * params.batch;

  std::vector<Real_t<Scalar>> zeros = std::vector<Real_t<Scalar>>(params.neurons);

  // s[t-1], [N]
  const Real_t<Scalar>* spikes_before(int64 row) const {
    if (row / lag % params.steps > 0) return params.emitted + (row - lag) * params.neurons;
    if (params.s_init == nullptr) return zeros.data();
    return params.s_init + (lag == 1 ? row / params.steps : row) * params.neurons;
  }
};

// The weight's gradient of the presynaptic neurons [first, last), from the rows in which they spiked. `finite`: whether
// all of dj is, for each block of rows.
constexpr int64 kRowsInBlock = 256;  // whose dj for 256 neurons takes 256 KiB
template <class Scalar>
void weight_gradient(const RecurrentBackwardParams<Scalar>& params, const uint8* finite, int64 first, int64 last) {
  using Real = Real_t<Scalar>;
  const SequenceRows<Scalar> rows{params};
  const int64 neurons = params.neurons, width = last - first;
  // Lists of the rows in which a neuron spiked, at a stride that is no power of two: else they share cache lines.
  constexpr int64 kStride = kRowsInBlock + 16, kLine = 64 / static_cast<int64>(sizeof(Real));
  std::vector<int32_t> indices(static_cast<size_t>(width * kStride)), spiking(static_cast<size_t>(width));
  std::vector<Real> values(indices.size()), spikes(spiking.size()), transposed(static_cast<size_t>(width * neurons));
  std::vector<int64> counts(spiking.size());
  for (int64 begin = 0; begin < rows.count; begin += kRowsInBlock) {
    const int64 end = std::min(rows.count, begin + kRowsInBlock);
    std::fill(counts.begin(), counts.end(), 0);
    for (int64 row = begin; row < end; ++row) {
      // A task reads a part of each row, which hardware prefetchers do not expect.
      const Real *s = rows.spikes_before(row) + first, *ahead = rows.spikes_before(std::min(row + 8, rows.count - 1));
      for (int64 k = first; k < last; k += kLine) __builtin_prefetch(ahead + k);
      const int64 count = finite[begin / kRowsInBlock] != 0 ? list_nonzero(s, width, spiking.data(), spikes.data())
                                                            : list_all(s, width, spiking.data(), spikes.data());
      for (int64 n = 0; n < count; ++n) {
        const int64 slot = spiking[n] * kStride + counts[spiking[n]]++;
        indices[slot] = static_cast<int32_t>(row - begin);
        values[slot] = spikes[n];
      }
    }
    for (int64 k = 0; k < width; ++k) {
      run_vectors<GatheredProductLoop, Real>({&indices[k * kStride], &values[k * kStride], counts[k], neurons,
                                              params.grad_j_seq + begin * neurons, neurons, kPanel<Real>,
                                              /*accumulate=*/true, &transposed[k * neurons]});
    }
  }
  for (int64 k = 0; k < width; ++k) {
    for (int64 n = 0; n < neurons; ++n) params.grad_weight[n * neurons + first + k] = transposed[k * neurons + n];
  }
}

template <class Scalar>
void weight_gradient(const RecurrentBackwardParams<Scalar>& params) {
  constexpr int64 kNeuronsAtOnce = 32;
  const int64 rows = params.steps * params.batch, blocks = (rows + kRowsInBlock - 1) / kRowsInBlock;
  std::vector<uint8> finite(static_cast<size_t>(blocks));
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64 block = begin; block < end; ++block) {
      const int64 first = block * kRowsInBlock, count = std::min(kRowsInBlock, rows - first);
      finite[block] = all_finite(params.grad_j_seq + first * params.neurons, count * params.neurons);
    }
  });
  at::parallel_for(0, (params.neurons + kNeuronsAtOnce - 1) / kNeuronsAtOnce, 1, [&](int64_t begin, int64_t end) {
    for (int64 part = begin; part < end; ++part) {
      weight_gradient(params, finite.data(), part * kNeuronsAtOnce,
                      std::min(params.neurons, (part + 1) * kNeuronsAtOnce));
    }
  });
}

// Calls task(model, chunk) for all chunks, on as many threads as torch.get_num_threads() allows.
template <class Params, class Task>
void for_each_chunk(const Params& params, Task&& task) {
  const NeuronOptions<typename Params::Real>& options = params.options;
  static_assert(static_cast<int>(Surrogate::kInteger) == kNumSurrogates - 1);
  with_model(
      options,
      [&](auto model) {
        at::parallel_for(0, recurrent_chunks(params.batch), 1, [&](int64_t begin, int64_t end) {
          for (int64 index = begin; index < end; ++index) {
            const int64 first = index * kRecurrentRows;
            task(model, Chunk{first, std::min(kRecurrentRows, params.batch - first), params.neurons});
          }
        });
      },
      std::make_integer_sequence<int, kNumSurrogates - 1>{});
}

}  // namespace

template <class Scalar>
void recurrent_forward(const RecurrentForwardParams<Scalar>& given) {
  RecurrentForwardParams<Scalar> params = given;
  params.noise = params.noise.resolved();
  const SpikeProduct<Scalar> product(params);
  for_each_chunk(params,
                 [&](auto model, const Chunk& chunk) { forward_chunk<decltype(model)>(params, product, chunk); });
}

template <class Scalar>
void recurrent_backward(const RecurrentBackwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const int64 neurons = params.neurons;
  std::vector<Real> panels(params.elementwise ? 0 : panels_size<Real>(neurons, neurons));
  if (!params.elementwise) fill_panels(params.weight, neurons, 1, neurons, neurons, panels.data());
  for_each_chunk(params, [&](auto model, const Chunk& chunk) {
    ChunkBackward<decltype(model), Scalar>(params, panels.data(), chunk).run();
  });
  if (params.grad_weight != nullptr) weight_gradient(params);
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
