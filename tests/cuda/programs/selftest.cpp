// Tests the emulator itself. Without an argument every check must hold (exit status 0). With the name of a negative
// control the same kind of check runs on a spoiled kernel, and the program must end with a non-zero exit status.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

namespace emulation = asgl_emulation;

static int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      ++failures;                                                 \
    }                                                             \
  } while (false)

template <class... P, class... A>
static cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, A... arguments) {
  std::tuple<P...> values(arguments...);
  return std::apply(
      [&](P&... value) {
        void* pointers[] = {static_cast<void*>(&value)..., nullptr};
        return cudaLaunchKernel(kernel, grid, block, pointers);
      },
      values);
}

// The message of an intended fault; clears the error for the next check.
static std::string take_error_message() {
  std::string message = emulation::error_message();
  emulation::clear_errors();
  return message;
}

static bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

__global__ void number_elements(long long* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = 3LL * i;
}

__global__ void number_threads(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread;
}

static void check_indices() {
  const int n = 1000, padding = 24;
  std::vector<long long> numbers(n + padding, -1);
  CHECK(launch(number_elements, (n + 127) / 128, 128, numbers.data(), n) == cudaSuccess, "launch");
  for (int i = 0; i < n; ++i) CHECK(numbers[i] == 3LL * i, "element %d is %lld", i, numbers[i]);
  for (int i = n; i < n + padding; ++i) CHECK(numbers[i] == -1, "the tail was written at %d", i);

  const dim3 grid(3, 2, 2), block(5, 4, 3);
  std::vector<unsigned> threads(12 * 60, 0);
  CHECK(launch(number_threads, grid, block, threads.data()) == cudaSuccess, "launch");
  for (unsigned i = 0; i < threads.size(); ++i) {
    CHECK(threads[i] == i / 60 * 1000 + i % 60, "thread %u wrote %u", i, threads[i]);
  }
}

enum class Spoil { nothing, barrier_before_gather, barrier_before_broadcast, lane };

// Every warp sums its values and stores the sum for warp 0, which adds the sums and stores the total for all threads.
template <Spoil spoil>
__global__ void sum_blocks(const int* in, int* totals) {
  __shared__ int sums[32];
  __shared__ int total;
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize, warps = blockDim.x / warpSize;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  int value = in[i];
  for (int delta = 16; delta > 0; delta /= 2) {
    value += __shfl_down_sync(0xffffffff, value, spoil == Spoil::lane && delta == 4 ? 5 : delta);
  }
  if (lane == 0) sums[warp] = value;
  if (spoil != Spoil::barrier_before_gather) __syncthreads();
  if (warp == 0) {
    value = lane < warps ? sums[lane] : 0;
    for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(0xffffffff, value, delta);
    if (lane == 0) total = value;
  }
  if (spoil != Spoil::barrier_before_broadcast) __syncthreads();
  totals[i] = total;
}

template <Spoil spoil>
static void check_block_sums() {
  const int blocks = 6, threads = 128;
  std::vector<int> in(blocks * threads), totals(in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = int(i * i % 997);
  CHECK(launch(sum_blocks<spoil>, blocks, threads, in.data(), totals.data()) == cudaSuccess, "launch");
  for (int b = 0; b < blocks; ++b) {
    const int expected = std::accumulate(&in[b * threads], &in[b * threads] + threads, 0);
    for (int t = 0; t < threads; ++t) {
      if (totals[b * threads + t] == expected) continue;
      CHECK(false, "block %d thread %d: %d instead of %d", b, t, totals[b * threads + t], expected);
      break;
    }
  }
}

template <class T>
__global__ void shuffle_all(T* out, int width, int distance) {
  const int lane = threadIdx.x;
  const T value = T(lane) * 3 + T(1);
  out[lane] = __shfl_sync(0xffffffff, value, distance, width);
  out[32 + lane] = __shfl_up_sync(0xffffffff, value, distance, width);
  out[64 + lane] = __shfl_down_sync(0xffffffff, value, distance, width);
  out[96 + lane] = __shfl_xor_sync(0xffffffff, value, distance, width);
}

template <class T>
static void check_shuffles() {
  for (int width : {1, 2, 8, 32}) {
    for (int distance : {0, 1, 3, 5, 16, 31}) {
      std::vector<T> out(128);
      CHECK(launch(shuffle_all<T>, 1, 32, out.data(), width, distance) == cudaSuccess, "launch");
      for (int lane = 0; lane < 32; ++lane) {
        const int begin = lane / width * width, end = begin + width;
        const int sources[] = {begin + distance % width, lane - distance < begin ? lane : lane - distance,
                               lane + distance >= end ? lane : lane + distance,
                               (lane ^ distance) >= end ? lane : lane ^ distance};
        for (int kind = 0; kind < 4; ++kind) {
          CHECK(out[32 * kind + lane] == T(sources[kind]) * 3 + T(1), "kind %d width %d distance %d lane %d", kind,
                width, distance, lane);
        }
      }
    }
  }
}

// The two halves of the warp diverge, each with its own mask.
__global__ void half_warps(unsigned* out) {
  const unsigned lane = threadIdx.x;
  if (lane < 16) {
    out[lane] = __shfl_sync(0x0000ffff, lane, 5);
  } else {
    out[lane] = __shfl_xor_sync(0xffff0000, lane, 1);
  }
}

static void check_half_warps() {
  unsigned out[32];
  CHECK(launch(half_warps, 1, 32, &out[0]) == cudaSuccess, "launch");
  for (unsigned lane = 0; lane < 32; ++lane) {
    CHECK(out[lane] == (lane < 16 ? 5 : lane ^ 1), "lane %u: %u", lane, out[lane]);
  }
}

template <bool with_syncwarp>
__global__ void reverse_lanes(unsigned* out) {
  __shared__ unsigned slots[32];
  const unsigned lane = threadIdx.x;
  slots[lane] = __shfl_xor_sync(0xffffffff, 7 * lane, 1);
  if (with_syncwarp) __syncwarp();
  out[lane] = slots[31 - lane];
}

template <bool with_syncwarp>
static void check_reversed_lanes() {
  unsigned out[32];
  CHECK(launch(reverse_lanes<with_syncwarp>, 1, 32, &out[0]) == cudaSuccess, "launch");
  for (unsigned lane = 0; lane < 32; ++lane) {
    CHECK(out[lane] == 7 * ((31 - lane) ^ 1), "%u instead of %u at lane %u", out[lane], 7 * ((31 - lane) ^ 1), lane);
  }
}

// Threads without work exit before the barrier, as hardware allows.
__global__ void leave_early(int* out, int n) {
  __shared__ int slots[128];
  const int i = threadIdx.x;
  if (i >= n) return;
  slots[i] = i;
  __syncthreads();
  out[i] = slots[n - 1 - i];
}

static void check_early_exit() {
  for (int n : {1, 31, 64, 100, 128}) {
    std::vector<int> out(128, -1);
    CHECK(launch(leave_early, 1, 128, out.data(), n) == cudaSuccess, "launch");
    for (int i = 0; i < 128; ++i) CHECK(out[i] == (i < n ? n - 1 - i : -1), "n %d thread %d: %d", n, i, out[i]);
  }
}

__global__ void part_at_barrier(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = __shfl_sync(0xffffffff, 1, 0);
}

__global__ void barriers_at_two_sites() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffles_at_two_sites(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(0xffffffff, 1, 0);
  } else {
    out[threadIdx.x] = __shfl_sync(0xffffffff, 1, 0);
  }
}

__global__ void masks_that_never_meet(int* out) {
  out[threadIdx.x] = __shfl_sync(threadIdx.x == 0 ? 0x3u : 0xffffffffu, 1, 0);
}

__global__ void shuffle_with_exited_lane(int* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_down_sync(0xffffffff, 1, 1);
}

__global__ void shuffle_outside_own_mask(int* out) { out[threadIdx.x] = __shfl_sync(0xfffffffe, 1, 1); }

template <class... P, class... A>
static void check_fault(const char* expected, void (*kernel)(P...), int threads, A... arguments) {
  CHECK(launch(kernel, 3, threads, arguments...) == cudaErrorLaunchFailure, "no fault seen: %s", expected);
  CHECK(cudaGetLastError() == cudaErrorLaunchFailure, "the error must stay");
  CHECK(launch(number_threads, 1, 1, nullptr) == cudaErrorLaunchFailure, "nothing runs after a fault");
  const std::string message = take_error_message();
  CHECK(contains(message, expected), "the message is: %s", message.c_str());
  CHECK(cudaGetLastError() == cudaSuccess, "the error was cleared");
}

static void check_faults() {
  int out[64];
  check_fault("24 wait at __shfl_sync", part_at_barrier, 64, &out[0]);
  check_fault("has reached __syncthreads", barriers_at_two_sites, 64);
  check_fault("has diverged", shuffles_at_two_sites, 32, &out[0]);
  check_fault("with mask 0x00000003", masks_that_never_meet, 32, &out[0]);
  check_fault("names lane 7, which has exited", shuffle_with_exited_lane, 32, &out[0]);
  check_fault("names lane 20, which has exited or does not exist", shuffle_with_exited_lane, 20, &out[0]);
  check_fault("is not in the mask", shuffle_outside_own_mask, 32, &out[0]);
  check_block_sums<Spoil::nothing>();
}

static_assert(sizeof(uint4) == 16 && alignof(uint4) == 16 && sizeof(float2) == 8 && alignof(float2) == 8, "");
static_assert(sizeof(ushort4) == 8 && alignof(ushort4) == 8 && sizeof(uchar4) == 4 && alignof(uchar4) == 4, "");
static_assert(sizeof(double2) == 16 && alignof(double2) == 16 && alignof(ulonglong2) == 16, "");
static_assert(sizeof(double4) == 32 && alignof(double4) == 16 && sizeof(uint3) == 12 && alignof(uint3) == 4, "");
static_assert(std::is_trivially_default_constructible<uint4>::value, "needed for __shared__ arrays");
static_assert(emulation::parameter_bytes<char, double, int, uint4>() == 48, "");

// The misalignment is intended; UndefinedBehaviorSanitizer would report it, too.
template <class Vector>
__attribute__((no_sanitize("alignment"))) __global__ void copy_vectors(const unsigned char* in, unsigned char* out) {
  const Vector value = *reinterpret_cast<const Vector*>(in + threadIdx.x * sizeof(Vector));
  Vector changed = value;
  changed.x += 1;
  *reinterpret_cast<Vector*>(out + threadIdx.x * sizeof(Vector)) = changed;
}

template <class Vector>
static void check_vector_copies() {
  const int threads = 8;
  alignas(16) unsigned char in[16 * threads + 16], out[16 * threads + 16] = {};
  std::iota(in, in + sizeof in, 0);
  CHECK(launch(copy_vectors<Vector>, 1, threads, in, out) == cudaSuccess, "aligned copy");
  for (size_t i = 0; i < threads * sizeof(Vector); ++i) {
    CHECK(out[i] == in[i] + (i % sizeof(Vector) == 0 ? 1 : 0), "byte %zu is %d", i, out[i]);
  }
  for (size_t offset : {sizeof(Vector) / 2, sizeof(Vector) / 4}) {
    CHECK(launch(copy_vectors<Vector>, 1, threads, in + offset, out) == cudaErrorMisalignedAddress, "load");
    CHECK(contains(take_error_message(), "a vector load"), "wrong message");
    CHECK(launch(copy_vectors<Vector>, 1, threads, in, out + offset) == cudaErrorMisalignedAddress, "store");
    CHECK(contains(take_error_message(), "a vector store"), "wrong message");
    CHECK(out[offset] == in[0] + 1, "the copy goes on");
  }
}

static void check_vectors() {
  check_vector_copies<uint4>();
  check_vector_copies<uint2>();
  check_vector_copies<ushort4>();
  check_vector_copies<ulonglong2>();
  uint4 v = make_uint4(1, 2, 3, 4);
  const uint4 w = v;
  v.w = w.x + w.y;
  CHECK(v.x == 1 && v.y == 2 && v.z == 3 && v.w == 3 && w.w == 4 && uint4{}.w == 0, "vector members");
  const float2 f = make_float2(1.5f, -2.0f);
  CHECK(f.x == 1.5f && f.y == -2.0f, "vector members");
}

__global__ void do_nothing() {}

static void check_limits() {
  void* none[] = {nullptr};
  const auto refused = [&](dim3 grid, dim3 block, size_t shared_bytes) {
    const bool error = cudaLaunchKernel(do_nothing, grid, block, none, shared_bytes) == cudaErrorInvalidConfiguration;
    return error && cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess;
  };
  CHECK(refused(1, 1025, 0) && refused(1, dim3(1, 1025), 0) && refused(1, dim3(1, 1, 65), 0), "block sides");
  CHECK(refused(1, dim3(64, 32), 0) && refused(1, dim3(1024, 1024, 64), 0), "threads in a block");
  CHECK(refused(1, 0, 0) && refused(1, dim3(1, 0), 0) && refused(0, 1, 0) && refused(dim3(1, 1, 0), 1, 0), "zeros");
  CHECK(refused(0x80000000u, 1, 0) && refused(dim3(1, 65536), 1, 0) && refused(dim3(1, 1, 65536), 1, 0), "grid");
  CHECK(refused(1, 1, 48 * 1024 + 1), "shared memory");
  CHECK(cudaLaunchKernel(do_nothing, dim3(1, 3, 2), dim3(4, 4, 64), none, 48 * 1024) == cudaSuccess, "at the limits");

  int value = 0;
  emulation::settings().multiprocessors = 7;
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 7, "count");
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 3) == cudaErrorInvalidValue, "no such device");
  CHECK(cudaGetLastError() == cudaErrorInvalidValue, "last error");
  CHECK(std::string(cudaGetErrorString(cudaErrorInvalidConfiguration)) == "invalid configuration argument", "text");
}

static void check_all() {
  using emulation::Order;
  for (Order order : {Order::middle, Order::ascending, Order::descending, Order::shuffled}) {
    emulation::settings().order = order;
    emulation::settings().order_seed = 12345;
    check_indices();
    check_block_sums<Spoil::nothing>();
    check_half_warps();
    check_reversed_lanes<true>();
    check_early_exit();
  }
  emulation::settings().order = Order::middle;
  check_shuffles<int>();
  check_shuffles<float>();
  check_shuffles<double>();
  check_shuffles<unsigned long long>();
  check_faults();
  check_vectors();
  check_limits();
}

static void check_kernel_with_fault(void (*kernel)(int*)) {
  int out[64];
  const cudaError_t error = launch(kernel, 1, 64, &out[0]);
  CHECK(error == cudaSuccess, "%s", cudaGetErrorString(error));
}

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "all";
  alignas(16) unsigned char in[160] = {}, out[128];
  if (mode == "all") {
    check_all();
  } else if (mode == "missing-barrier-before-gather") {
    check_block_sums<Spoil::barrier_before_gather>();
  } else if (mode == "missing-barrier-before-broadcast") {
    check_block_sums<Spoil::barrier_before_broadcast>();
  } else if (mode == "missing-syncwarp") {
    check_reversed_lanes<false>();
  } else if (mode == "wrong-lane") {
    check_block_sums<Spoil::lane>();
  } else if (mode == "divergent-barrier") {
    check_kernel_with_fault(part_at_barrier);
  } else if (mode == "divergent-shuffle") {
    check_kernel_with_fault(shuffles_at_two_sites);
  } else if (mode == "exited-lane") {
    check_kernel_with_fault(shuffle_with_exited_lane);
  } else if (mode == "misaligned") {
    CHECK(launch(copy_vectors<uint4>, 1, 8, in + 4, out) == cudaSuccess, "%s", emulation::error_message().c_str());
  } else {
    std::printf("no such mode: %s\n", mode.c_str());
    return 2;
  }
  std::printf("%s: %d failures\n", mode.c_str(), failures);
  return failures != 0;
}
