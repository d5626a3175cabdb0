// Sums of the parameters' gradients. The backward kernels add up the terms of a block's threads, and store the sums in
// slots of GradientPartials. gradient_sum_kernel then adds up the slots of all parameters, in one launch, or in two if
// runs are split. A run is a range of adjacent neurons that share a value of the parameter.
#pragma once

#include "cuda/access.cuh"
#include "params/gradient.h"

namespace asgl {

// ---- sums of a block ----

// The terms of a parameter's gradient that the threads of a block have computed, one per thread.
template <class Real>
struct ThreadSums {
  Real values[kBlockThreads];
};

// Stores one sum for each of the `count` values of a parameter whose values repeat in a tile: the sum over the tile's
// neurons that have this value. The tile begins at neuron `first`, and `sums` has one term per neuron.
template <class Real>
__device__ __forceinline__ void store_sums_by_value(Real* slots, int64 count, int64 first, int neurons,
                                                    const Real* sums, int thread, int threads) {
  const int each = static_cast<int>(count), turn = static_cast<int>(first % count);
#pragma unroll 1
  for (int i = thread; i < each; i += threads) {
    Real sum = 0;
#pragma unroll 1
    for (int n = i >= turn ? i - turn : i - turn + each; n < neurons; n += each) sum += sums[n];
    slots[blockIdx.x * count + i] = sum;
  }
}

// Adds up the threads' terms over the tile's part of each run, and stores the results in the slots of these parts. All
// threads of one warp of the block must call this together. The whole warp sums a run of at least
// kWarpThreads * kLanes neurons, and one thread sums each shorter run. If a thread has one neuron and the parameter's
// values repeat in a tile, calls store_sums_by_value instead.
template <int kLanes, class Real>
__device__ __forceinline__ void store_partials(Real* slots, const ParameterView<Real>& parameter,
                                               const SequenceShape& shape, const ThreadSums<Real>& sums) {
  const int64 inner = parameter.inner, first = static_cast<int64>(blockIdx.x) * (kBlockThreads * kLanes);
  const int64 left = shape.neurons() - first;
  const int neurons = left < kBlockThreads * kLanes ? static_cast<int>(left) : kBlockThreads * kLanes;
  const uint32 lane = threadIdx.x % kWarpThreads;
  if (kLanes == 1 && parameter.is_interleaved_in(kBlockThreads)) {
    store_sums_by_value(slots, parameter.count, first, neurons, sums.values, static_cast<int>(lane), kWarpThreads);
    return;
  }
  const bool all_lanes = inner >= kWarpThreads * kLanes;
  const uint32 lane_of_run = all_lanes ? lane : 0, lanes_each = all_lanes ? kWarpThreads : 1;
  const int runs_at_a_time = all_lanes ? 1 : kWarpThreads;
  int64 run = (parameter.is_same_for_all() ? 0 : first / inner) + (all_lanes ? 0 : lane);
#pragma unroll 1
  for (int64 begin = run * inner - first; begin < neurons; begin += runs_at_a_time * inner) {
    const uint32 first_thread = begin > 0 ? static_cast<uint32>(begin) / kLanes : 0;
    const uint32 end_thread = static_cast<uint32>(begin + inner < neurons ? begin + inner : neurons) / kLanes;
    Real sum = 0;
#pragma unroll 1
    for (uint32 thread = first_thread + lane_of_run; thread < end_thread; thread += lanes_each) {
      sum += sums.values[thread];
    }
    if (all_lanes) {
#pragma unroll
      for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
        sum += __shfl_down_sync(kWholeWarp, sum, distance);
      }
    }
    if (lane_of_run == 0) slots[GradientPartials<Real>::slot_index(kLanes == 1 ? inner : 0, run, blockIdx.x)] = sum;
    run += runs_at_a_time;
  }
}

// ---- sums over all blocks ----

// The number of tiles before the one that contains neuron n, for tiles of kBlockThreads or 4 * kBlockThreads neurons.
__device__ __forceinline__ int64 tiles_before(int64 n, int64 tile) {
  const uint64 tiles_of_single_neurons = static_cast<uint64>(n) / kBlockThreads;
  return static_cast<int64>(tile > kBlockThreads ? tiles_of_single_neurons / 4 : tiles_of_single_neurons);
}

// Adds every `stride`-th of the next `left` values to the total.
template <class Real>
__device__ __forceinline__ void add_strided(const Real* from, int64 left, int64 stride, double& total) {
  constexpr int kLoads = 8;  // in flight
  for (; left > (kLoads - 1) * stride; left -= kLoads * stride) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k, from += stride) total += static_cast<double>(*from);
  }
  for (; left > 0; left -= stride, from += stride) total += static_cast<double>(*from);
}

// Computes kElementsPerThread elements of the gradient in one thread, for parameters whose runs are single neurons. The
// elements of a thread are kSumThreads apart, so that adjacent threads load adjacent slots.
template <class Real>
__device__ __forceinline__ void sum_elements_of_thread(const GradientPart<Real>& part, int64 first) {
  const int64 count = part.parameter.count;
  double totals[kElementsPerThread] = {};
#pragma unroll 1
  for (int64 run = 0; run < part.neurons; run += count) {
#pragma unroll
    for (int k = 0; k < kElementsPerThread; ++k) {
      const int64 element = first + k * kSumThreads;
      if (element < count) totals[k] += static_cast<double>(part.partials.data[run + element]);
    }
  }
#pragma unroll
  for (int k = 0; k < kElementsPerThread; ++k) {
    const int64 element = first + k * kSumThreads;
    if (element < count) part.store(element, totals[k]);
  }
}

// Adds up the partial sums of all parameters. sum.parts has one GradientPart for each parameter. The blocks of parts[0]
// come first in the grid, then those of parts[1], and so on. Adjacent threads sum adjacent elements. If a block
// computes only one element, adjacent threads sum adjacent slots of a run instead.
template <class Real>
__global__ void __launch_bounds__(kSumThreads, 2) gradient_sum_kernel(const GradientSum<Real> sum) {
  const int thread = static_cast<int>(threadIdx.x);
  int64 block = blockIdx.x;
  int id = 0;
  for (; block >= sum.parts[id].splits * sum.parts[id].blocks; ++id) {
    block -= sum.parts[id].splits * sum.parts[id].blocks;
  }
  const GradientPart<Real>& part = sum.parts[id];
  const int64 inner = part.parameter.inner, count = part.parameter.count, neurons = part.neurons;
  const int64 split = part.splits > 1 ? block / part.blocks : 0;
  block -= split * part.blocks;
  if (part.elements_each > kSumThreads) return sum_elements_of_thread(part, block * part.elements_each + thread);
  // The thread's element, first run and first slot. elements_each, runs_each and slots_each are powers of two, and
  // their product is kSumThreads. A division by one of them is therefore a multiplication by the other two and a shift.
  const int slots_each = part.slots_each, turn = thread * (part.runs_each * slots_each) / kSumThreads;
  const int64 element = block * part.elements_each + (thread & (part.elements_each - 1));
  const int64 first_run = turn * (part.elements_each * part.runs_each) / kSumThreads;
  const int64 first_slot = turn & (slots_each - 1);
  double total = 0;
  if (element < part.num_elements(sum.shape)) {
    const int64 t = part.parameter.step_stride != 0 ? element / count : 0;
    const Real* const row = part.partials.data + t * part.partials.slots;
    const int64 stride = part.splits * part.runs_each * count;
    int64 run = element - t * count + (split * part.runs_each + first_run) * count;
    if (inner == 1) {  // a slot is a run
      add_strided(row + run, neurons - run, stride, total);
      run = neurons;
    }
    for (; run * inner < neurons; run += stride) {
      const int64 tile = tiles_before(run * inner, sum.tile);
      const int64 slots = tiles_before((run + 1) * inner - 1, sum.tile) - tile + 1;
      add_strided(row + run + tile + first_slot, slots - first_slot, slots_each, total);
    }
  }
  __shared__ double totals[kSumThreads];
  totals[thread] = total;
  for (int half = kSumThreads / 2; half >= part.elements_each; half /= 2) {
    __syncthreads();
    if (thread < half) totals[thread] += totals[thread + half];
  }
  if (thread >= part.elements_each || element >= part.num_elements(sum.shape)) return;
  if (part.splits > 1) {
    part.totals[split * part.num_elements(sum.shape) + element] = static_cast<Real>(totals[thread]);
  } else {
    part.store(element, totals[thread]);
  }
}

}  // namespace asgl
