// Runs CUDA kernels and their launchers on the CPU, for tests on machines without a GPU.
//
// Put include/ first on the include path and compile the CUDA sources as C++20 with -pthread.
// A launch runs to its end before cudaLaunchKernel returns, as under CUDA_LAUNCH_BLOCKING=1.
//
// By default every CUDA thread is a fibre, all fibres of a block share one OS thread, and blocks are distributed
// over several OS threads. With -DASGL_EMULATE_THREADS every CUDA thread of a block is an OS thread and blocks run
// one after another: slow, but it lets ThreadSanitizer see a missing barrier.
//
// A fault that would hang or corrupt on a device (a barrier that some threads never reach, a shuffle that lanes
// do not all reach, a misaligned vector access) is written to stderr, kept in asgl_emulation::error_message, and
// returned by the launch. It does not outlast the launch, as it would on a device.
#ifndef ASGL_CUDA_EMULATION_H
#define ASGL_CUDA_EMULATION_H

#include <type_traits>
#include <utility>

#include "cuda_emulation_fibres.h"

namespace asgl_emulation {

// Of launches by this thread.
inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local std::string error_message;

inline cudaError_t run_kernel(std::function<void()> kernel, unsigned blocks, unsigned block_threads) {
  const bool fits = 1 <= blocks && blocks <= 0x7fffffffu && 1 <= block_threads && block_threads <= 1024;
  if (!fits) return last_error = cudaErrorInvalidConfiguration;
  Launch launch;
  launch.kernel = std::move(kernel);
  launch.blocks = blocks;
  launch.block_threads = block_threads;
  run_launch(launch);
  if (launch.error == cudaSuccess) return cudaSuccess;
  std::fprintf(stderr, "asgl_emulation: %s\n", launch.message.c_str());
  error_message = launch.message;
  return last_error = launch.error;
}

template <class T>
T shuffle(Operation operation, unsigned mask, T value, unsigned source_lane, const Site& site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "the device shuffles values of 4 or 8 bytes");
  static_assert(std::is_trivially_copyable<T>::value, "a shuffle copies the value's bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = current_block->exchange(*current_thread, {operation, site, mask, bits, source_lane});
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace asgl_emulation

inline void __syncthreads(asgl_emulation::Site site = asgl_emulation::Site::here()) {
  asgl_emulation::current_block->synchronise(*asgl_emulation::current_thread, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source, unsigned width = 32,
              asgl_emulation::Site site = asgl_emulation::Site::here()) {
  const unsigned segment = asgl_emulation::current_thread->lane() / width;
  return asgl_emulation::shuffle(asgl_emulation::Operation::shfl, mask, value, segment * width + source % width, site);
}

// As in hardware, only the low five bits of a delta count, and a lane whose source is beyond the warp keeps its value.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, asgl_emulation::Site site = asgl_emulation::Site::here()) {
  const unsigned lane = asgl_emulation::current_thread->lane(), source = lane + delta % 32;
  return asgl_emulation::shuffle(asgl_emulation::Operation::shfl_down, mask, value, source < 32 ? source : lane, site);
}

template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, const T& value) {
  *address = value;
}

using cudaStream_t = struct CUstream_st*;

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, std::size_t,
                             cudaStream_t) {
  static_assert(sizeof(Params) <= 4096, "a kernel's parameters take at most 4 KiB");
  return asgl_emulation::run_kernel([=] { kernel(*static_cast<const Params*>(arguments[0])); }, grid.x, block.x);
}

inline cudaError_t cudaGetLastError() { return std::exchange(asgl_emulation::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorMisalignedAddress:
      return "misaligned address";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

#endif  // ASGL_CUDA_EMULATION_H
