// Substitutes the CPU kernels for the CUDA kernels in the latter's tests. Included first.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(ASGL_TEST_BASELINE)  // no clones for other instruction sets: a third of the compile time
#undef __x86_64__
#endif

#include "launch.h"

namespace asgl {

constexpr int kBlockThreads = 128;

namespace cuda {

inline int64 blocks_for(int64 work, int64 per_block) { return (work + per_block - 1) / per_block; }

template <class Params>
cudaError_t plan_tiles(Params& params) {
  cpu::plan_tiles(params);
  return cudaSuccess;
}

template <class Params>
cudaError_t launch(const Params& params, cudaStream_t) {
  cpu::launch(params);
  return cudaSuccess;
}

// The options select the model.
template <class Model, class Params>
cudaError_t launch(Model, const Params& params, cudaStream_t stream) {
  return launch(params, stream);
}

}  // namespace cuda
}  // namespace asgl
