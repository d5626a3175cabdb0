// Arguments of the kernels of recurrent neurons, whose spikes enter the next step's current through a weight:
//
//   j[t] = x[t] + (s[t-1] W^T + bias)                 s[-1] = s_init, or 0
//   i[t] = syn_decay * i[t-1] + j[t]                  with a synapse, i[-1] = i_init, or 0; else i[t] = j[t]
//   h[t], s[t], v[t] of the neuron in math/neuron.h with the current input_gain * i[t], or of math/adaptive.h with i[t]
//
// The gradient of s[t] is that of the output, plus dj[t+1] W, plus those of the reset and of the adaptation. In the
// equations below, input_gain is 1 for adaptive neurons, and syn_decay is 0 without a synapse:
//
//   dj[t] = input_gain * dh[t] + syn_decay * dj[t+1]
//   dW = sum over t of dj[t]^T s[t-1],   dbias = sum of dj,   dsyn_decay = sum of dj[t] * i[t-1]
#pragma once

#include "params/neuron.h"

namespace asgl {

// Rows of the parameters, [kNumRecurrentParameters, N], after those of ParameterId.
enum RecurrentParameterId : int {
  kRecurrentBias = kNumParameters,
  kRecurrentSynDecay,  // 0 without a synapse
  kNumRecurrentParameters,
  kRecurrentWeight = kNumRecurrentParameters,  // only in gradients, if the weight is [N]
  kNumRecurrentSums
};

// This number is added to the seed at each step, modulo 2^64. Steps differ in the key and not in the counter, because a
// kernel of one step draws at a fixed counter. Steps therefore use up no offsets, and calls with different offsets
// share no draws. The number is 2^64 / phi^2, where phi is the golden ratio. Its multiples are far apart: calls with
// seeds less than 2^40 apart share no draws in up to 2^20 steps.
constexpr uint64 kSeedPerStep = 0x61C8864680B583EB;

// Sequences are [T, B, N], or [B, T, N] if batch_first. States and their gradients are [B, N]. For adaptive neurons,
// v_init, v_last and their gradients are [2, B, N], with v first and w second, and h_seq contains the potential that is
// compared with v_threshold.
template <class Scalar>
struct RecurrentParams {
  using Real = Real_t<Scalar>;
  int64 steps, batch, neurons;
  bool batch_first;
  LIFByOptions<Real> options;
  NoiseParams noise;  // step t draws as a sequence of one step with rng_state [seed + t * kSeedPerStep, offset]
  bool elementwise;   // the weight is [N], the diagonal of W; else [N, N]
  bool has_synapse;
  const Real* weight;
  const Real* parameters;
  const Real *v_init, *s_init, *i_init;  // null means v_rest, 0 and 0

  // The shape of the sequences, in which the neurons of all samples of the batch count as neurons of their own.
  SequenceShape shape() const {
    return batch_first ? SequenceShape{batch, steps, neurons} : SequenceShape{1, steps, batch * neurons};
  }
};

// Null outputs are not stored.
template <class Scalar>
struct RecurrentForwardParams : RecurrentParams<Scalar> {
  using typename RecurrentParams<Scalar>::Real;
  const Scalar* x_seq;
  Scalar* s_seq;                          // times v_threshold under scale_output
  Real *emitted, *h_seq, *v_seq, *i_seq;  // emitted is s itself, in the arithmetic type
  Real* w_seq;                            // the adaptation before each step
  Real *v_last, *s_last, *i_last;
};

template <class Scalar>
struct RecurrentBackwardParams : RecurrentParams<Scalar> {
  using typename RecurrentParams<Scalar>::Real;
  bool detach_recurrent;                // no gradient through dj[t+1] W
  const Real *h_seq, *emitted, *i_seq;  // results of forward; i_seq only for the gradient of syn_decay
  const Real* w_seq;                    // null if only subtracted from the current, by a constant adapt_decay
  const Scalar* grad_s_seq;
  const Real *grad_v_seq, *grad_h_seq, *grad_v_last, *grad_s_last, *grad_i_last;  // null means zero
  Real* grad_j_seq;                                                               // dj, the gradient of x
  Real* grad_weight;                                                              // [N, N] or null
  Real *grad_v_init, *grad_s_init, *grad_i_init;                                  // or null
  double* grad_parameters;  // [chunks, kNumRecurrentSums, N], zero: sums over the rows of a chunk; or null
};

// Rows of the batch that a task computes through all steps. The state of these rows and the weight can then stay in the
// cache.
constexpr int64 kRecurrentRows = 16;
// The number of chunks of kRecurrentRows rows, of which the last may be smaller.
inline int64 num_recurrent_chunks(int64 batch) { return (batch + kRecurrentRows - 1) / kRecurrentRows; }

}  // namespace asgl
