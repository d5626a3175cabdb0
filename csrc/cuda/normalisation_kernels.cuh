// The CUDA kernels of batch normalisation. Moments and the gradient of the input traverse a sequence by ChannelTiles: a
// thread owns one column, or four of one channel, for some rows.
#pragma once

#include "cuda/neuron_kernels.cuh"
#include "params/normalisation.h"

namespace asgl {

constexpr int64 kChannelRowsEach = 64;  // values of a thread, or more to limit splits

// The columns of a thread.
template <int kLanes>
struct ChannelIndex {
  ChannelTask task;
  int64 unit, way;  // of the tile
  int64 channel, rank;
  bool live;
  int64 row, end_row, step;  // rows of the thread
  int64 column;

  __device__ __forceinline__ explicit ChannelIndex(const ChannelTiles& tiles)
      : task(tiles, blockIdx.x),
        unit(threadIdx.x % tiles.width),
        way(threadIdx.x / tiles.width),
        channel(task.first_channel + (task.first_unit + unit) / tiles.units_per_channel),
        live(way < tiles.ways && unit < task.units),
        row(task.row + way),
        end_row(task.end_row),
        step(tiles.ways) {
    const int64 position = (task.first_unit + unit) % tiles.units_per_channel;
    rank = tiles.tiles_per_channel > 1 ? unit : position;
    column = channel * tiles.shape.inner + position * kLanes;
  }
};

// The joint moments of all threads of a channel, returned to the first one: way and rank are 0. All threads of the
// block must call this.
template <int kLanes>
__device__ __forceinline__ Moments join_in_block(const Moments& own, const ChannelTiles& tiles,
                                                 const ChannelIndex<kLanes>& index) {
  __shared__ Moments moments[kBlockThreads];
  const int64 thread = threadIdx.x;
  moments[thread] = own;
  __syncthreads();
  for (int64 left = tiles.ways; left > 1; left = (left + 1) / 2) {
    const int64 half = (left + 1) / 2;
    if (index.way < left - half) moments[thread] = join(moments[thread], moments[thread + half * tiles.width]);
    __syncthreads();
  }
  const int64 width = tiles.tiles_per_channel > 1 ? tiles.width : tiles.units_per_channel;
  for (int64 left = width; left > 1; left = (left + 1) / 2) {
    const int64 half = (left + 1) / 2;
    if (index.way == 0 && index.rank < left - half) moments[thread] = join(moments[thread], moments[thread + half]);
    __syncthreads();
  }
  return moments[thread];
}

// The sums of x - shift and (x - shift)^2 over a thread's values.
struct ShiftedSums {
  double shift, sum, squares;

  // Adds the values of the first `rows` rows, at least one. With m close to their mean and d = x - m, n values have
  //   sum (x - shift) = n (m - shift) + sum d
  //   sum (x - shift)^2 = (m - shift) (n (m - shift) + 2 sum d) + sum d^2
  // where only the sums of d, small if the values are alike, are rounded to Real.
  template <class Real, int kRows, int kLanes>
  __device__ __forceinline__ void add(const Real (&x)[kRows][kLanes], int rows) {
    constexpr int kSums = 4;
    Real total[kSums], distances[kSums], squared[kSums];
    fill(total, Real(0));
    fill(distances, Real(0));
    fill(squared, Real(0));
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) total[(k * kLanes + j) % kSums] += k < rows ? x[k][j] : x[0][j];
    }
    const Real m = added(total) * Real(1.0 / (kRows * kLanes));
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        const Real distance = k < rows ? x[k][j] - m : Real(0);
        distances[(k * kLanes + j) % kSums] += distance;
        squared[(k * kLanes + j) % kSums] += distance * distance;
      }
    }
    const double n = rows * kLanes;
    const double distance = static_cast<double>(added(distances)), offset = static_cast<double>(m) - shift;
    sum += n * offset + distance;
    squares += offset * (n * offset + 2 * distance) + static_cast<double>(added(squared));
  }

 private:
  template <class Real>
  static __device__ __forceinline__ Real added(const Real (&sums)[4]) {
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

template <class Scalar, int kLanes>
__global__ void __launch_bounds__(kBlockThreads, 6) batch_moments_kernel(const MomentsParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  constexpr int kTogether = sizeof(Real) == 4 && kLanes == 1 ? 8 : 4;  // loads in flight
  const ChannelTiles& tiles = params.tiles;
  const ChannelIndex<kLanes> index(tiles);
  const int64 stride = index.step * tiles.shape.columns();
  Moments found = {0, 0, 0};
  if (index.live && index.row < index.end_row) {
    int64 element = index.row * tiles.shape.columns() + index.column;
    ShiftedSums sums = {static_cast<double>(to_real(params.x_seq[element])), 0, 0};
    const int64 rows = (index.end_row - index.row + index.step - 1) / index.step;
    for (int64 done = 0; done < rows; done += kTogether) {
      const int left = rows - done < kTogether ? static_cast<int>(rows - done) : kTogether;
      Real x[kTogether][kLanes];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k < left) Access<kLanes>::load(params.x_seq + (element + k * stride), x[k]);
      }
      element += kTogether * stride;
      left == kTogether ? sums.add(x, kTogether) : sums.add(x, left);  // mostly all, without selections
    }
    found = shifted_moments(static_cast<double>(rows * kLanes), sums.shift, sums.sum, sums.squares);
  }
  found = join_in_block(found, tiles, index);
  if (index.live && index.way == 0 && index.rank == 0) {
    params.moments[index.task.slot * tiles.shape.channels + index.channel] = found;
  }
}

// A block for each channel.
template <class Real>
__global__ void __launch_bounds__(kBlockThreads, 8)
    batch_norm_coefficients_kernel(const CoefficientsParams<Real> params) {
  __shared__ Moments moments[kBlockThreads];
  const int64 channel = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  Moments found = {0, 0, 0};
  if (params.moments == nullptr) {
    found = params.given(channel);
  } else {
    for (int64 slot = thread; slot < params.slots; slot += kBlockThreads) {
      found = join(found, params.moments[slot * params.channels + channel]);
    }
    moments[thread] = found;
    __syncthreads();
    for (int half = kBlockThreads / 2; half > 0; half /= 2) {
      if (thread < half) moments[thread] = join(moments[thread], moments[thread + half]);
      __syncthreads();
    }
    found = moments[0];
  }
  if (thread == 0) params.store(channel, found);
}

// A thread for each channel.
template <class Real>
__global__ void __launch_bounds__(kBlockThreads, 8) batch_norm_running_kernel(const RunningParams<Real> params) {
  const int64 channel = static_cast<int64>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (channel < params.channels) params.update(channel);
}

// A thread for each channel.
template <class Real>
__global__ void __launch_bounds__(kBlockThreads, 8) batch_norm_adjoint_kernel(const AdjointParams<Real> params) {
  const int64 channel = static_cast<int64>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (channel < params.channels) params.compute(channel);
}

template <class Scalar, int kLanes, bool kResidual>
__global__ void __launch_bounds__(kBlockThreads, 8)
    batch_norm_input_gradient_kernel(const InputGradientParams<Scalar> params) {
  using Real = Real_t<Scalar>;
  using Lanes = Access<kLanes>;
  constexpr int kTogether = 2;  // loads of x and of dx in flight
  const ChannelTiles& tiles = params.tiles;
  const ChannelIndex<kLanes> index(tiles);
  if (!index.live) return;
  const Real mean = params.mean[index.channel], slope = params.adjoint[index.channel];
  const Real offset = params.adjoint[tiles.shape.channels + index.channel];
  const Real gain = kResidual ? params.gain[index.channel] : Real(1);
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
        opaque(stored);  // or the compiler splits the stores for half types
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
