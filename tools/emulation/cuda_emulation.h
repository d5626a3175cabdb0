// Runs CUDA kernels and their launchers on the CPU, for tests on machines without a GPU.
//
// Put include/ first on the include path and compile the CUDA sources as C++17 or later with -pthread.
// A launch runs to its end before cudaLaunchKernel returns, as under CUDA_LAUNCH_BLOCKING=1.
//
// By default every CUDA thread is a fibre, all fibres of a block share one OS thread, and blocks are distributed
// over several OS threads. With -DASGL_EMULATE_THREADS every CUDA thread of a block is an OS thread and blocks run
// one after another: slow, but it lets ThreadSanitizer see a missing barrier.
//
// A fault that would hang or corrupt on a device (a barrier that some threads never reach, a shuffle that lanes
// do not all reach, a misaligned vector access) is written to stderr, kept in asgl_emulation::error_message(),
// and returned by every later launch and error query until asgl_emulation::clear_errors().
#ifndef ASGL_CUDA_EMULATION_H
#define ASGL_CUDA_EMULATION_H

#include <type_traits>
#include <utility>

#include "cuda_emulation_fibres.h"

namespace asgl_emulation {

struct History {
  std::mutex mutex;
  cudaError_t sticky_error = cudaSuccess;
  std::string error_message;
};

inline History& history() {
  static History the_history;
  return the_history;
}

inline thread_local cudaError_t last_error = cudaSuccess;

inline std::string error_message() {
  std::lock_guard<std::mutex> lock(history().mutex);
  return history().error_message;
}

inline void clear_errors() {
  std::lock_guard<std::mutex> lock(history().mutex);
  history().sticky_error = last_error = cudaSuccess;
  history().error_message.clear();
}

// The size of a kernel's parameters, laid out as struct members.
template <class... P>
constexpr std::size_t parameter_bytes() {
  std::size_t end = 0;
  ((end = (end + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  return end;
}

inline bool within_limits(const dim3& grid, const dim3& block, std::size_t shared_bytes) {
  const bool grid_fits =
      grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
  const bool block_fits = block.x >= 1 && block.x <= 1024 && block.y >= 1 && block.y <= 1024 && block.z >= 1 &&
                          block.z <= 64 && std::uint64_t(block.x) * block.y * block.z <= 1024;
  return grid_fits && block_fits && shared_bytes <= 48 * 1024;
}

inline cudaError_t set_last_error(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

inline cudaError_t run_kernel(std::function<void()> kernel, dim3 grid, dim3 block, std::size_t shared_bytes) {
  Launch launch;
  {
    std::lock_guard<std::mutex> lock(history().mutex);
    if (history().sticky_error != cudaSuccess) return history().sticky_error;
    if (!within_limits(grid, block, shared_bytes)) return set_last_error(cudaErrorInvalidConfiguration);
  }
  launch.grid = grid;
  launch.block = block;
  launch.kernel = std::move(kernel);
  launch.blocks = std::uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  launch.block_threads = launch.block.x * launch.block.y * launch.block.z;
  run_launch(launch);
  if (launch.error != cudaSuccess) {
    std::fprintf(stderr, "asgl_emulation: %s\n", launch.message.c_str());
    std::lock_guard<std::mutex> lock(history().mutex);
    history().sticky_error = launch.error;
    history().error_message = launch.message;
  }
  return launch.error;
}

inline const char* error_text(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorMisalignedAddress:
      return "misaligned address";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

template <class... P, std::size_t... I>
cudaError_t launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes,
                          std::index_sequence<I...>) {
  return run_kernel([=] { kernel(*static_cast<const P*>(arguments[I])...); }, grid, block, shared_bytes);
}

inline std::uint64_t warp_operation(Operation operation, unsigned mask, std::uint64_t value, unsigned source_lane,
                                    const Site& site) {
  return current_block->exchange(*current_thread, {operation, site, mask, value, source_lane});
}

template <class T>
T shuffle(Operation operation, unsigned mask, T value, unsigned source_lane, const Site& site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "the device shuffles values of 4 or 8 bytes");
  static_assert(std::is_trivially_copyable<T>::value, "a shuffle copies the value's bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(operation, mask, bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned current_lane() { return current_thread->lane(); }
inline unsigned segment_begin(int width) { return current_lane() & ~(unsigned(width) - 1); }
inline unsigned segment_last(int width) { return current_lane() | (unsigned(width) - 1); }

}  // namespace asgl_emulation

inline void __syncthreads(asgl_emulation::Site site = asgl_emulation::Site::here()) {
  asgl_emulation::current_block->synchronise(*asgl_emulation::current_thread, site);
}

inline void __syncwarp(unsigned mask = 0xffffffff, asgl_emulation::Site site = asgl_emulation::Site::here()) {
  asgl_emulation::warp_operation(asgl_emulation::Operation::syncwarp, mask, 0, 0, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              asgl_emulation::Site site = asgl_emulation::Site::here()) {
  const unsigned lane = asgl_emulation::segment_begin(width) | (unsigned(source) & (unsigned(width) - 1));
  return asgl_emulation::shuffle(asgl_emulation::Operation::shfl, mask, value, lane, site);
}

// As in hardware, only the low five bits of a delta or lane mask count, and a lane whose source is outside its segment
// keeps its own value; only __shfl_xor_sync may read an earlier segment.
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 asgl_emulation::Site site = asgl_emulation::Site::here()) {
  const unsigned lane = asgl_emulation::current_lane();
  const bool inside = lane >= asgl_emulation::segment_begin(width) + (delta & 31);
  return asgl_emulation::shuffle(asgl_emulation::Operation::shfl_up, mask, value, inside ? lane - (delta & 31) : lane,
                                 site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   asgl_emulation::Site site = asgl_emulation::Site::here()) {
  const unsigned lane = asgl_emulation::current_lane(), source = lane + (delta & 31);
  const bool inside = source <= asgl_emulation::segment_last(width);
  return asgl_emulation::shuffle(asgl_emulation::Operation::shfl_down, mask, value, inside ? source : lane, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  asgl_emulation::Site site = asgl_emulation::Site::here()) {
  const unsigned lane = asgl_emulation::current_lane(), source = lane ^ (unsigned(lane_mask) & 31);
  const bool inside = source <= asgl_emulation::segment_last(width);
  return asgl_emulation::shuffle(asgl_emulation::Operation::shfl_xor, mask, value, inside ? source : lane, site);
}

template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, const T& value) {
  *address = value;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

using cudaStream_t = struct CUstream_st*;

// The values are CUDA's own.
enum cudaDeviceAttr {
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
};

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments,
                             std::size_t shared_bytes = 0, cudaStream_t = nullptr) {
  static_assert(asgl_emulation::parameter_bytes<P...>() <= 4096, "a kernel's parameters take at most 4 KiB");
  return asgl_emulation::launch_kernel(kernel, grid, block, arguments, shared_bytes, std::index_sequence_for<P...>{});
}

inline cudaError_t cudaGetLastError() {
  std::lock_guard<std::mutex> lock(asgl_emulation::history().mutex);
  const cudaError_t sticky = asgl_emulation::history().sticky_error;
  const cudaError_t error = sticky != cudaSuccess ? sticky : asgl_emulation::last_error;
  asgl_emulation::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) { return asgl_emulation::error_text(error); }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch (device == 0 ? attribute : 0) {
    case cudaDevAttrWarpSize:
      *value = warpSize;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = asgl_emulation::settings().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      return cudaSuccess;
  }
  return asgl_emulation::set_last_error(cudaErrorInvalidValue);
}

#endif  // ASGL_CUDA_EMULATION_H
