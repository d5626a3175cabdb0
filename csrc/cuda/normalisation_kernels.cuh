// The CUDA kernels of batch normalisation. Those that compute the moments and the gradient of the input divide a
// sequence as ChannelTiles says. A thread reads one column, or four of one channel, in some of the rows.
#pragma once

#include "cuda/neuron_kernels.cuh"
#include "params/normalisation.h"

namespace asgl {

// The columns of a thread, and the rows that it reads of them.
template <int kLanes>
struct ChannelIndex {
  ChannelTask task;
  int unit, way;         // position in the tile
  int neighbours, rank;  // units of the channel in the tile; among these
  int64 channel;
  bool live;                 // whether the thread has columns
  int64 row, end_row, step;  // the rows of the thread: row, row + step, ... before end_row
  int64 column;              // the first one

  __device__ __forceinline__ explicit ChannelIndex(const ChannelTiles& tiles)
      : task(tiles, blockIdx.x), row(task.row), end_row(task.end_row), step(tiles.ways) {
    const unsigned width = static_cast<unsigned>(tiles.width);
    unit = static_cast<int>(threadIdx.x % width);
    way = static_cast<int>(threadIdx.x / width);
    live = way < tiles.ways && unit < task.units;
    row += way;
    const bool shared = tiles.tiles_per_channel > 1;  // the tile has units of one channel
    const unsigned units = static_cast<unsigned>(shared ? tiles.width : tiles.units_per_channel);
    neighbours = static_cast<int>(units);
    rank = static_cast<int>(unit % units);
    channel = task.first_channel + unit / units;
    column = channel * tiles.shape.inner + (task.first_unit + rank) * kLanes;
  }
};

// The sums of x - shift and (x - shift)^2 over some values of a channel. All threads of a block use the same shift for
// a channel.
template <class Real>
struct ShiftedSums {
  using Sum = LongSum_t<Real>;
  Sum sum, squares;

  // Adds the values of the first `rows` rows, at least one. m is close to the mean of these n values. With d = x - m,
  //   sum (x - shift) = n (m - shift) + sum d
  //   sum (x - shift)^2 = (m - shift) (n (m - shift) + 2 sum d) + sum d^2
  // Only the sums of d and d^2 are rounded to Real. They are small if the values differ little. In float32 m has 16
  // significant bits, so that d is exact for values from m / 2 to 2^8 m.
  template <int kRows, int kLanes>
  __device__ __forceinline__ void add(const Real (&x)[kRows][kLanes], int rows, Real shift) {
    constexpr int kSums = kRows * kLanes / 4;  // of four values each
    Real total[kSums], distances[kSums], squared[kSums];
    fill(total, Real(0));
    fill(distances, Real(0));
    fill(squared, Real(0));
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) total[(k * kLanes + j) % kSums] += k < rows ? x[k][j] : x[0][j];
    }
    const Real m = math::shortened_significand(pairwise_sum(total) * Real(1.0 / (kRows * kLanes)));
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        const Real distance = k < rows ? x[k][j] - m : Real(0);
        Real& square = squared[(k * kLanes + j) % kSums];
        distances[(k * kLanes + j) % kSums] += distance;
        square = math::fma(distance, distance, square);
      }
    }
    const Real n = Real(rows * kLanes), distance = pairwise_sum(distances);
    const Sum offset = difference(m, shift), shifted = n * offset + distance;
    sum = sum + shifted;
    squares = squares + (offset * (shifted + distance) + pairwise_sum(squared));
  }

  // Adds the sums over other values, with the same shift.
  __device__ __forceinline__ void add(const ShiftedSums& other) {
    sum = sum + other.sum;
    squares = squares + other.squares;
  }

 private:
  // Adds up kSums values as a tree, and overwrites them. kSums is a power of two.
  template <int kSums>
  static __device__ __forceinline__ Real pairwise_sum(Real (&sums)[kSums]) {
#pragma unroll
    for (int half = kSums / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
  }
};

// Adds up the sums of all threads of each channel. Only a channel's first thread, with way 0 and rank 0, gets the
// result. All threads of the block must call this.
template <class Real, int kLanes>
__device__ __forceinline__ ShiftedSums<Real> reduce_in_block(const ShiftedSums<Real>& own, const ChannelTiles& tiles,
                                                             const ChannelIndex<kLanes>& index) {
  __shared__ ShiftedSums<Real> sums[kBlockThreads];
  const int thread = static_cast<int>(threadIdx.x);
  sums[thread] = own;
  __syncthreads();
  for (int left = static_cast<int>(tiles.ways); left > 1; left = (left + 1) / 2) {
    const int half = (left + 1) / 2;
    if (index.way < left - half) sums[thread].add(sums[thread + half * static_cast<int>(tiles.width)]);
    __syncthreads();
  }
  for (int left = index.neighbours; left > 1; left = (left + 1) / 2) {
    const int half = (left + 1) / 2;
    if (index.way == 0 && index.rank < left - half) sums[thread].add(sums[thread + half]);
    __syncthreads();
  }
  return sums[thread];
}

// Each block computes the moments of the values that one task reads, for each channel of the task.
template <class Scalar, int kLanes>
__global__ void __launch_bounds__(kBlockThreads, 6) batch_moments_kernel(const MomentsParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  constexpr int kTogether = sizeof(Real) == 4 ? 8 : 4;  // loads in flight
  const ChannelTiles& tiles = params.tiles;
  const ChannelIndex<kLanes> index(tiles);
  const ChannelTask& task = index.task;
  const int64 stride = index.step * tiles.shape.columns();
  const bool first = index.live && index.way == 0 && index.rank == 0;
  ShiftedSums<Real> sums = {};
  Real shift = Real(0);
  if (index.live) {
    // The shift is the first value of the task's part of the channel.
    const int64 first_column = index.channel * tiles.shape.inner + task.first_unit * kLanes;
    shift = to_real(params.x_seq[task.row * tiles.shape.columns() + first_column]);
    int64 element = index.row * tiles.shape.columns() + index.column;
    const int64 rows = (index.end_row - index.row + index.step - 1) / index.step;
    for (int64 done = 0; done < rows; done += kTogether) {
      const int left = rows - done < kTogether ? static_cast<int>(rows - done) : kTogether;
      Real x[kTogether][kLanes];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k < left) Access<kLanes>::load(params.x_seq + (element + k * stride), x[k]);
      }
      element += kTogether * stride;
      left == kTogether ? sums.add(x, kTogether, shift) : sums.add(x, left, shift);  // usually all, without selections
    }
  }
  sums = reduce_in_block(sums, tiles, index);
  if (first) {
    const int64 units = tiles.tiles_per_channel > 1 ? task.units : tiles.units_per_channel;
    const double count = static_cast<double>((task.end_row - task.row) * units * kLanes);
    params.moments[task.slot * tiles.shape.channels + index.channel] =
        moments_from_shifted_sums(count, static_cast<double>(shift), as_double(sums.sum), as_double(sums.squares));
  }
}

// Each block computes the coefficients of one channel.
template <class Real>
__global__ void __launch_bounds__(kBlockThreads, 8)
    batch_norm_coefficients_kernel(const CoefficientsParams<Real> params) {
  __shared__ Moments moments[kBlockThreads];
  const int64 channel = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  Moments found = {0, 0, 0};
  if (params.moments == nullptr) {
    found = params.given_moments(channel);
  } else {
    for (int64 slot = thread; slot < params.slots; slot += kBlockThreads) {
      found = merge_moments(found, params.moments[slot * params.channels + channel]);
    }
    moments[thread] = found;
    __syncthreads();
    for (int half = kBlockThreads / 2; half > 0; half /= 2) {
      if (thread < half) moments[thread] = merge_moments(moments[thread], moments[thread + half]);
      __syncthreads();
    }
    found = moments[0];
  }
  if (thread == 0) params.store(channel, found);
}

// Computes the gradient of x_seq. Each block first computes the adjoints of its channels. Threads compute the positions
// of their columns only after that, because the positions would otherwise occupy registers meanwhile. Blocks of tasks
// with slot 0 store the gradients of weight and bias.
template <class Scalar, int kLanes, bool kResidual>
__global__ void __launch_bounds__(kBlockThreads, 8)
    batch_norm_input_gradient_kernel(const InputGradientParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  using Lanes = Access<kLanes>;
  constexpr int kTogether = kLanes * sizeof(Real) == 4 ? 4 : 2;  // loads of x and of dx in flight
  const ChannelTiles& tiles = params.tiles;
  __shared__ Real slopes[kBlockThreads], offsets[kBlockThreads];  // by channel of the tile
  const ChannelTask task(tiles, blockIdx.x);
  const int64 own = task.first_channel + threadIdx.x;
  if (threadIdx.x < tiles.channels_per_tile && own < tiles.shape.channels) {
    const NormalisationAdjoint<Real> adjoint = params.adjoint(own);
    slopes[threadIdx.x] = adjoint.slope;
    offsets[threadIdx.x] = adjoint.offset;
    if (task.slot == 0) params.store_own_gradients(own);
  }
  __syncthreads();
  const ChannelIndex<kLanes> index(tiles);
  if (!index.live) return;
  const int in_tile = static_cast<int>(index.channel - task.first_channel);
  const Real mean = params.mean()[index.channel], slope = slopes[in_tile], offset = offsets[in_tile];
  const Real gain = kResidual ? params.gain()[index.channel] : Real(1);
  const int64 stride = index.step * tiles.shape.columns();
  int64 element = index.row * tiles.shape.columns() + index.column;
  for (int64 row = index.row; row < index.end_row; row += kTogether * index.step) {
    Real x[kTogether][kLanes], dx[kTogether][kLanes];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (row + k * index.step < index.end_row) {
        const Scalar* gradients = kResidual ? params.grad_residual : params.grad_x_seq;
        Lanes::load(params.x_seq + (element + k * stride), x[k]);
        Lanes::load(gradients + (element + k * stride), dx[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (row + k * index.step < index.end_row) {
        int64 stored = element + k * stride;
        hide_from_compiler(stored);  // otherwise the compiler splits the stores for half types
        if constexpr (kResidual) {
#pragma unroll
          for (int j = 0; j < kLanes; ++j) dx[k][j] = gain * dx[k][j];
        }
#pragma unroll
        for (int j = 0; j < kLanes; ++j) dx[k][j] = normalisation_adjoint(dx[k][j], x[k][j], mean, slope, offset);
        Lanes::store(dx[k], params.grad_x_seq + stored);
      }
    }
    element += kTogether * stride;
  }
}

}  // namespace asgl
