// Sums of a parameter's gradient: the threads of a block add theirs up to slots of GradientPartials, and one launch
// adds up the slots of all parameters.
#pragma once

#include "cuda/access.cuh"

namespace asgl {

// ---- in a block ----

template <class Real>
struct WarpSums {
  Real values[kBlockThreads / kWarpThreads];
};

// Neurons side by side that share a parameter's value, and their threads in this block.
class Run {
 public:
  Run() = default;
  // Where runs of `inner` neurons were counted before, the thread's is the run `index`.
  __device__ __forceinline__ Run(int64 inner, int64 index) : known_inner_(inner), known_index_(index) {}

  template <int kLanes>
  __device__ __forceinline__ void find(const Place<kLanes>& place, int64 inner) {
    if (inner_ == inner) return;
    inner_ = inner;
    index = inner == known_inner_ ? known_index_ : place.read_n / inner;
    const int64 before = (place.read_n - index * inner) / kLanes, left = inner / kLanes - before;
    const int thread = static_cast<int>(threadIdx.x);
    begin = before < thread ? thread - static_cast<int>(before) : 0;
    end = left < kBlockThreads - thread ? thread + static_cast<int>(left) : kBlockThreads;
  }

  int64 index;
  int begin, end;

 private:
  int64 inner_ = 0, known_inner_ = 0, known_index_;
};

// The sum over the threads of each run goes to the run's slot. All threads of the block must come here; those beyond
// the last neuron add nothing. `run` is that of the parameter before this one, which mostly is the same.
template <int kLanes, class Real>
__device__ __forceinline__ void store_partial(Real* slots, const ParameterView<Real>& parameter,
                                              const Place<kLanes>& place, Real sum, Run& run,
                                              WarpSums<Real>& first_lane) {
  if (parameter.inner == 1) {
    if (place.live) slots[place.n + blockIdx.x] = sum;
    return;
  }
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  if (!place.live) sum = Real(0);
  const bool one_run = parameter.is_same_for_all();
  if (one_run) {  // what the lanes after the first get from beyond their warp is not used
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
      sum += __shfl_down_sync(kWholeWarp, sum, distance);
    }
  } else {
    run.find(place, parameter.inner);
    const int in_warp = run.end - thread < kWarpThreads - lane ? run.end - thread : kWarpThreads - lane;
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
      const Real other = __shfl_down_sync(kWholeWarp, sum, distance);
      if (distance < in_warp) sum += other;
    }
  }
  __syncthreads();  // whoever reads what was there has done so
  if (lane == 0) first_lane.values[thread / kWarpThreads] = sum;
  __syncthreads();
  if (one_run) {
    if (thread > 0) return;
#pragma unroll
    for (int warp = 1; warp < kBlockThreads / kWarpThreads; ++warp) sum += first_lane.values[warp];
    slots[blockIdx.x] = sum;
  } else if (thread == run.begin && place.live) {
    for (int warp = thread / kWarpThreads + 1; warp * kWarpThreads < run.end; ++warp) sum += first_lane.values[warp];
    slots[run.index + blockIdx.x] = sum;
  }
}

// ---- of all blocks ----

constexpr int kSumThreads = 512;

// So many of the tiles have neurons before neuron n; their size is 1 or 4 times kBlockThreads.
__device__ __forceinline__ int64 whole_tiles(int64 n, int64 tile) {
  const uint64 of_single_neurons = static_cast<uint64>(n) / kBlockThreads;
  return static_cast<int64>(tile > kBlockThreads ? of_single_neurons / 4 : of_single_neurons);
}

// The blocks of the parts lie one behind another. Threads side by side have neighbouring elements, or where there is
// one element for a block, neighbouring slots.
template <class Real>
__global__ void __launch_bounds__(kSumThreads, 2) gradient_sum_kernel(const GradientSum<Real> sum) {
  constexpr int kLoads = 8;  // that are under way at a time
  const int thread = static_cast<int>(threadIdx.x);
  int64 block = blockIdx.x;
  int id = 0;
  for (; block >= sum.parts[id].blocks; ++id) block -= sum.parts[id].blocks;
  const GradientPart<Real>& part = sum.parts[id];
  const int64 inner = part.parameter.inner, count = part.parameter.count, neurons = sum.shape.neurons();
  // These are thread % elements_each, thread / elements_each and so on; powers of two need no division.
  const int slots_each = part.slots_each, turn = thread * (part.runs_each * slots_each) / kSumThreads;
  const int64 element = block * part.elements_each + (thread & (part.elements_each - 1));
  const int64 first_run = turn * (part.elements_each * part.runs_each) / kSumThreads;
  const int64 first_slot = turn & (slots_each - 1);
  double total = 0;
  if (element < part.elements(sum.shape)) {
    const int64 t = part.parameter.step_stride != 0 ? element / count : 0;
    for (int64 run = element - t * count + first_run * count; run * inner < neurons; run += part.runs_each * count) {
      const int64 tile = whole_tiles(run * inner, sum.tile);
      const int64 slots = whole_tiles((run + 1) * inner - 1, sum.tile) - tile + 1;
      const Real* from = part.partials.data + (t * part.partials.slots + run + tile + first_slot);
      int64 left = slots - first_slot;
      for (; left > (kLoads - 1) * slots_each; left -= kLoads * slots_each) {
#pragma unroll
        for (int k = 0; k < kLoads; ++k, from += slots_each) total += static_cast<double>(*from);
      }
      for (; left > 0; left -= slots_each, from += slots_each) total += static_cast<double>(*from);
    }
  }
  __shared__ double totals[kSumThreads];
  totals[thread] = total;
  for (int half = kSumThreads / 2; half >= part.elements_each; half /= 2) {
    __syncthreads();
    if (thread < half) totals[thread] += totals[thread + half];
  }
  if (thread < part.elements_each && element < part.elements(sum.shape)) part.store(element, totals[thread]);
}

}  // namespace asgl
