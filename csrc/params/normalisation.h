// Arguments of batch normalisation's kernels, forward and backward, structs that are passed by value.
#pragma once

#include "math/normalisation.h"

namespace asgl {

// The number of elements that a CUDA thread usually reads: this many rows of one column, or a quarter as many rows of
// four columns. It reads more rows if there would otherwise be too many splits.
constexpr int64 kGradientRowsPerThread = 64;
constexpr int64 kMomentsRowsPerThread = 128;

// A sequence as rows of channels * inner columns; column j belongs to channel j / inner.
struct ChannelShape {
  int64 rows, channels, inner;

  // The number of columns.
  ASGL_HOST_DEVICE int64 columns() const { return channels * inner; }
};

// Divides a sequence among tasks. A unit is `lanes` adjacent columns of a channel. A tile is `width` units: whole
// channels, or a part of one channel. The rows of a tile are split between tasks. A task reads rows_per_split rows of
// one tile, `ways` rows at a time. Nothing depends on the number of threads.
struct ChannelTiles {
  ChannelShape shape;
  int64 lanes, width, ways;
  int64 units_per_channel, channels_per_tile, tiles_per_channel;
  int64 rows_per_split, splits;

  // Plans tasks that read up to `most_units` units at a time, `rows_each` times. Tasks read more rows if there would
  // otherwise be more than kMostSplits splits.
  ASGL_HOST_DEVICE static ChannelTiles plan(const ChannelShape& shape, int64 lanes, int64 most_units, int64 rows_each) {
    constexpr int64 kMostSplits = 2048;
    ChannelTiles tiles{};
    tiles.shape = shape;
    tiles.lanes = lanes;
    tiles.units_per_channel = shape.inner / lanes;
    tiles.tiles_per_channel = ceil_div(tiles.units_per_channel, most_units);
    if (tiles.tiles_per_channel > 1) {
      tiles.channels_per_tile = 1;
      tiles.width = most_units;
    } else {
      const int64 fit = most_units / tiles.units_per_channel;
      tiles.channels_per_tile = fit < shape.channels ? fit : shape.channels;
      tiles.width = tiles.channels_per_tile * tiles.units_per_channel;
    }
    tiles.ways = most_units / tiles.width;
    const int64 enough = tiles.ways * rows_each, needed = ceil_div(shape.rows, kMostSplits);
    tiles.rows_per_split = enough > needed ? enough : needed;
    tiles.splits = ceil_div(shape.rows, tiles.rows_per_split);
    return tiles;
  }

  // The number of groups of channels_per_tile channels.
  ASGL_HOST_DEVICE int64 num_groups() const { return ceil_div(shape.channels, channels_per_tile); }
  // The number of tasks.
  ASGL_HOST_DEVICE int64 num_tasks() const { return splits * tiles_per_channel * num_groups(); }
  // The number of partial moments of a channel: one for every split and every tile of the channel.
  ASGL_HOST_DEVICE int64 num_slots() const { return splits * tiles_per_channel; }

  // number / by, rounded up.
  static ASGL_HOST_DEVICE int64 ceil_div(int64 number, int64 by) { return (number + by - 1) / by; }
};

// The part of a sequence that one task reads.
struct ChannelTask {
  int64 slot;
  int64 first_channel;
  int64 first_unit, units;  // in the first channel; number in the task
  int64 row, end_row;

  // The values that the task with index `task` reads. The type Number must be large enough for every index. CUDA
  // kernels pass 32-bit integers, which divide faster than 64-bit ones.
  template <class Number>
  ASGL_HOST_DEVICE ChannelTask(const ChannelTiles& tiles, Number task) {
    const Number splits = static_cast<Number>(tiles.splits);
    const Number tiles_per_channel = static_cast<Number>(tiles.tiles_per_channel);
    const int64 split = task % splits, tile = task / splits % tiles_per_channel;
    slot = split * tiles.tiles_per_channel + tile;
    first_channel = task / splits / tiles_per_channel * tiles.channels_per_tile;
    first_unit = tile * tiles.width;
    const int64 left = tiles.shape.channels - first_channel;
    const int64 channels = left < tiles.channels_per_tile ? left : tiles.channels_per_tile;
    units = channels * tiles.units_per_channel - first_unit;
    if (units > tiles.width) units = tiles.width;
    row = split * tiles.rows_per_split;
    end_row = row + tiles.rows_per_split < tiles.shape.rows ? row + tiles.rows_per_split : tiles.shape.rows;
  }
};

template <class Scalar>
struct MomentsParams {
  ChannelTiles tiles;
  const Scalar* x_seq;  // [rows, channels, inner]
  Moments* moments;     // [slots, channels]
};

// Arguments of the kernel that computes coefficients from moments, or from mean and variance if moments is null. A null
// weight means 1, and a null bias means 0.
template <class Real>
struct CoefficientsParams {
  const Moments* moments;  // [slots, channels]
  int64 slots, channels;
  const Real *mean, *variance, *weight, *bias;  // [channels]
  NormalisationOptions options;
  Real* coefficients;  // [kNumCoefficients, channels]
  Moments* total;      // [channels]
  // The running statistics of training, which are updated in place, or null if there are none.
  Real *running_mean, *running_var;  // [channels]
  int64* num_batches_tracked;        // null if not counted
  Real momentum;

  // The moments of a channel whose mean and variance are arguments, as in evaluation.
  ASGL_HOST_DEVICE Moments given_moments(int64 channel) const {
    return {1, static_cast<double>(mean[channel]), static_cast<double>(variance[channel])};
  }

  // Stores the coefficients and moments of a channel, and updates its running statistics.
  ASGL_HOST_DEVICE void store(int64 channel, const Moments& found) const {
    const Coefficients<Real> values(found, weight == nullptr ? 1.0 : static_cast<double>(weight[channel]),
                                    bias == nullptr ? 0.0 : static_cast<double>(bias[channel]), options);
    coefficients[kCoefficientMean * channels + channel] = values.mean;
    coefficients[kCoefficientGain * channels + channel] = values.gain;
    coefficients[kCoefficientBias * channels + channel] = values.bias;
    coefficients[kCoefficientVariance * channels + channel] = values.variance;
    total[channel] = found;
    if (running_mean == nullptr) return;
    update_running(running_mean[channel], values.mean);
    update_running(running_var[channel], values.variance);
    if (channel == 0 && num_batches_tracked != nullptr) ++*num_batches_tracked;
  }

 private:
  // Moves a running statistic towards the value of this batch. The two formulas are those of torch.lerp, so that a
  // momentum of 1 gives exactly this value.
  ASGL_HOST_DEVICE void update_running(Real& running, Real value) const {
    const Real distance = value - running;
    running = momentum < Real(0.5) ? running + momentum * distance : value - distance * (Real(1) - momentum);
  }
};

// Arguments of the kernel for the gradients of the input and of the normalisation's weight and bias. Without rows, it
// computes only the gradients of weight and bias.
template <class Scalar>
struct InputGradientParams {
  using Real = Real_t<Scalar>;
  ChannelTiles tiles;
  const Scalar* x_seq;  // [rows, channels, inner]
  Scalar* grad_x_seq;   // [rows, channels, inner], dx on return; on entry gain * dh, or with grad_residual nothing
  const Scalar* grad_residual;        // [rows, channels, inner], dh, where one array serves both gradients; else null
  const Moments* moments;             // [channels]
  const Real* coefficients;           // [kNumCoefficients, channels]
  const Real *grad_gain, *grad_bias;  // [channels], the sums of this process
  const Real *total_grad_gain, *total_grad_bias;  // [channels], the sums of all processes
  NormalisationOptions options;
  Real *grad_weight, *grad_shift;  // [channels]

  // The rows [channels] of `coefficients` that the adjoint reads.
  ASGL_HOST_DEVICE const Real* mean() const { return coefficients + kCoefficientMean * tiles.shape.channels; }
  ASGL_HOST_DEVICE const Real* gain() const { return coefficients + kCoefficientGain * tiles.shape.channels; }

  // The adjoint of a channel, from the sums of all processes.
  ASGL_HOST_DEVICE NormalisationAdjoint<Real> adjoint(int64 channel) const {
    const GradientSums total = {static_cast<double>(total_grad_gain[channel]),
                                static_cast<double>(total_grad_bias[channel])};
    return {moments[channel], static_cast<double>(mean()[channel]), static_cast<double>(gain()[channel]), total,
            options};
  }

  // Stores the gradients of weight (grad_weight) and bias (grad_shift) of a channel. They are computed from grad_gain
  // and grad_bias, the gradients of input_gain and input_bias in this process.
  ASGL_HOST_DEVICE void store_own_gradients(int64 channel) const {
    const GradientSums own = {static_cast<double>(grad_gain[channel]), static_cast<double>(grad_bias[channel])};
    const double centred =
        NormalisationAdjoint<Real>::sum_dh_xhat(moments[channel], static_cast<double>(mean()[channel]), own, options);
    grad_weight[channel] = static_cast<Real>(options.input_scale * centred);
    grad_shift[channel] = static_cast<Real>(options.input_scale * own.bias);
  }
};

}  // namespace asgl
