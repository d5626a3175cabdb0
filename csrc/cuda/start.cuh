// Kernel launch, and alignment of arrays.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "math/neuron.h"

namespace asgl::cuda {

// The launchers of launch.h call the overload for their params. Device makes argument-dependent lookup find overloads
// that are declared later.
struct Device {};

template <class Params>
cudaError_t plan_tiles(Params& params) {
  return plan_on(Device{}, params);
}

template <class Params>
cudaError_t launch(const Params& params, cudaStream_t stream) {
  return launch_on(Device{}, params, stream);
}

template <class Kernel, class Params>
cudaError_t start(Kernel* kernel, int64 blocks, int threads, const Params& params, cudaStream_t stream) {
  constexpr int64 kMostBlocks = 0x7FFFFFFF;
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t error =
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, 0, stream);
  // Cleared, or a later call would report it. An error of others stays for them; one that outlasts this, as of an
  // illegal access, is returned by the launch itself.
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

inline int64 blocks_for(int64 work, int64 per_block) { return (work + per_block - 1) / per_block; }

template <class Element>
ASGL_HOST_DEVICE bool is_aligned(const Element* first) {
  return reinterpret_cast<unsigned long>(first) % (4 * sizeof(Element)) == 0;
}

// float64 would need two accesses of 16 bytes, without a gain.
template <class Scalar>
constexpr bool kHasFours = !std::is_same_v<Scalar, double>;

}  // namespace asgl::cuda
