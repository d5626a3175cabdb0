// The threads of a block and their synchronisation.
#ifndef ASGL_CUDA_EMULATION_BLOCKS_H
#define ASGL_CUDA_EMULATION_BLOCKS_H

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_emulation_types.h"

#if defined(__SANITIZE_THREAD__) && !defined(ASGL_EMULATE_THREADS)
#error "ThreadSanitizer cannot follow fibres: compile with -DASGL_EMULATE_THREADS"
#endif

#ifdef ASGL_EMULATE_THREADS
#include <condition_variable>
#endif

namespace asgl_emulation {

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

enum class Operation : unsigned char { syncthreads, shfl, shfl_down };

inline const char* name_of(Operation operation) {
  static const char* const names[] = {"__syncthreads", "__shfl_sync", "__shfl_down_sync"};
  return names[static_cast<int>(operation)];
}

// A source location in the kernel. As a default argument, `here()` is the location of the outermost call.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

struct Request {
  Operation operation;
  Site site;
  unsigned mask;         // lanes that take part, for a warp's operations
  std::uint64_t value;   // of this lane
  unsigned source_lane;  // of the shuffle

  std::string describe() const {
    std::string description = text("%s at %s:%d", name_of(operation), site.file, site.line);
    return operation == Operation::syncthreads ? description : description + text(" with mask 0x%08x", mask);
  }
};

// A Gate guards the state that threads of a block or warp share, a Bed is where one thread sleeps. Waking up through a
// shared mutex would order the thread, for ThreadSanitizer, after all threads that left the gate meanwhile.
#ifdef ASGL_EMULATE_THREADS
using Gate = std::mutex;
struct Bed {
  std::mutex mutex;
  std::condition_variable changed;

  template <class Done>
  void sleep_until(Done done) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, done);
  }
  template <class Change>
  void wake_after(Change change) {
    std::lock_guard<std::mutex> lock(mutex);
    change();
    changed.notify_one();
  }
};
#else
// The fibres of a block take turns on one OS thread: no locks, and a thread is resumed once its wait is over.
void yield_fibre();
struct Gate {
  void lock() {}
  void unlock() {}
};
struct Bed {
  template <class Done>
  void sleep_until(Done) {
    yield_fibre();
  }
  template <class Change>
  void wake_after(Change change) {
    change();
  }
};
#endif
using Lock = std::unique_lock<Gate>;

template <class Visit>
void for_each_lane(unsigned lanes, Visit visit) {
  for (; lanes; lanes &= lanes - 1) visit(unsigned(__builtin_ctz(lanes)));
}

class Fibre;

struct Thread {
  unsigned number;  // in the block
  Request request;
  std::uint64_t result;
  bool waiting;
  bool finished;
  Bed bed;
  Fibre* fibre;  // from the thread's first instruction to its last; null for an OS thread

  unsigned lane() const { return number % 32; }
  unsigned lane_bit() const { return 1u << lane(); }
};

struct Warp {
  Gate gate;
  Thread* lanes;
  unsigned live;     // lanes that have not exited
  unsigned arrived;  // lanes whose request is not yet granted
};

// Thrown to unwind the threads of a failed block.
struct KernelAborted {};

struct Launch {
  std::function<void()> kernel;
  unsigned blocks, block_threads;
  std::atomic<std::uint64_t> next_block{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  cudaError_t error = cudaSuccess;
  std::string message;

  // Only the first fault is reported; blocks not yet begun are skipped.
  void report(cudaError_t kind, const std::string& fault) {
    std::lock_guard<std::mutex> lock(mutex);
    if (error != cudaSuccess) return;
    error = kind;
    message = fault;
    failed = true;
  }
};

class Block {
 public:
  explicit Block(Launch& launch_)
      : launch(launch_), threads(launch_.block_threads), warps((launch_.block_threads + 31) / 32) {}

  void begin(unsigned number);
  void run_thread(Thread& self);
  void synchronise(Thread& self, const Site& site);
  std::uint64_t exchange(Thread& self, const Request& request);
  [[noreturn]] void stop(const std::string& fault);
  std::string describe(const Thread& thread) const { return text("thread %u of block %u", thread.number, index); }

  Launch& launch;
  unsigned index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::atomic<bool> aborted;

 private:
  void pause(Lock& lock, Thread& self);
  void leave(Thread& self);
  void release(Thread& thread);
  void release_barrier();
  bool complete(Warp& warp, const Request& request, Lock& lock);
  [[noreturn]] void fail(Lock& lock, const std::string& fault);
  [[noreturn]] void fail_stuck(Lock& lock);

  Gate gate;
  unsigned live;        // threads that have not exited
  unsigned at_barrier;  // threads that wait at __syncthreads
  Thread* first_at_barrier;
  // Relaxed: ordered accesses would hide a race between warps from ThreadSanitizer.
  std::atomic<unsigned> running;
};

inline thread_local Block* current_block = nullptr;
inline thread_local Thread* current_thread = nullptr;

inline void Block::begin(unsigned number) {
  index = number;
  for (unsigned i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    thread.number = i;
    thread.waiting = thread.finished = false;
    thread.fibre = nullptr;
  }
  for (unsigned w = 0; w < warps.size(); ++w) {
    const unsigned lanes = launch.block_threads - 32 * w;
    warps[w].lanes = &threads[32 * w];
    warps[w].live = lanes < 32 ? (1u << lanes) - 1 : ~0u;
    warps[w].arrived = 0;
  }
  live = launch.block_threads;
  at_barrier = 0;
  running = live;
  aborted = false;
}

// Not inlined: a fibre may change OS threads between blocks, and its outermost frame must not keep addresses of
// thread_local variables.
__attribute__((noinline)) inline void Block::run_thread(Thread& self) {
  try {
    launch.kernel();
    leave(self);
  } catch (const KernelAborted&) {
  }
  self.finished = true;
}

inline void Block::synchronise(Thread& self, const Site& site) {
  Lock lock(gate);
  self.request = {Operation::syncthreads, site, 0, 0, 0};
  if (at_barrier == 0) first_at_barrier = &self;
  const Request& first = first_at_barrier->request;
  if (!(first.site == site)) {
    fail(lock, describe(self) + " has reached " + self.request.describe() + " while " + describe(*first_at_barrier) +
                   " waits at " + first.describe());
  }
  if (++at_barrier == live) {
    release_barrier();
  } else {
    pause(lock, self);
  }
}

inline std::uint64_t Block::exchange(Thread& self, const Request& request) {
  Warp& warp = warps[self.number / 32];
  Lock lock(warp.gate);
  self.request = request;
  if (!(request.mask & self.lane_bit())) {
    fail(lock, describe(self) + ", lane " + std::to_string(self.lane()) + ", is not in the mask of its " +
                   request.describe());
  }
  warp.arrived |= self.lane_bit();
  if (!complete(warp, request, lock)) pause(lock, self);
  return self.result;
}

inline void Block::pause(Lock& lock, Thread& self) {
  self.waiting = true;
  if (running.fetch_sub(1, std::memory_order_relaxed) == 1) fail_stuck(lock);
  lock.unlock();
  self.bed.sleep_until([&] { return !self.waiting || aborted; });
  if (aborted) throw KernelAborted{};
}

inline void Block::release(Thread& thread) {
  if (!thread.waiting) return;  // the thread that completes an operation has not begun to wait
  running.fetch_add(1, std::memory_order_relaxed);
  thread.bed.wake_after([&] { thread.waiting = false; });
}

inline void Block::release_barrier() {
  at_barrier = 0;
  for (Thread& thread : threads) release(thread);
}

// Grants the operation once all lanes of its mask have arrived. An exited lane in the mask is a fault.
inline bool Block::complete(Warp& warp, const Request& request, Lock& lock) {
  if (const unsigned gone = request.mask & ~warp.live) {
    fail(lock, text("block %u: ", index) + request.describe() +
                   text(" names lane %d, which has exited or does not exist", __builtin_ctz(gone)));
  }
  const unsigned members = request.mask;
  if (members & ~warp.arrived) return false;

  Thread* const lanes = warp.lanes;
  bool same_mask = true;
  for_each_lane(members, [&](unsigned lane) { same_mask &= lanes[lane].request.mask == members; });
  if (!same_mask) return false;
  for_each_lane(members, [&](unsigned lane) {
    const Request& other = lanes[lane].request;
    if (other.operation == request.operation && other.site == request.site) return;
    fail(lock, "the warp of " + describe(lanes[lane]) + " has diverged: this thread is at " + other.describe() +
                   ", another at " + request.describe());
  });

  for_each_lane(members, [&](unsigned lane) {
    // The value of a lane outside the mask is undefined: here all ones, a NaN.
    const unsigned source = lanes[lane].request.source_lane;
    lanes[lane].result = members >> source & 1 ? lanes[source].request.value : ~std::uint64_t(0);
  });
  warp.arrived &= ~members;
  // Last, since a released lane may change its request at once.
  for_each_lane(members, [&](unsigned lane) { release(lanes[lane]); });
  return true;
}

inline void Block::leave(Thread& self) {
  if (aborted) return;
  Warp& warp = warps[self.number / 32];
  {
    Lock lock(warp.gate);
    warp.live &= ~self.lane_bit();
    for_each_lane(warp.arrived, [&](unsigned lane) {
      const Request& request = warp.lanes[lane].request;
      const bool still_waits = warp.arrived >> lane & 1;
      if (still_waits && (request.mask & self.lane_bit())) complete(warp, request, lock);
    });
  }
  Lock lock(gate);
  --live;
  if (live > 0 && at_barrier == live) release_barrier();
  if (running.fetch_sub(1, std::memory_order_relaxed) == 1 && live > 0) fail_stuck(lock);
}

// A fault of the running thread ends its block.
inline void Block::stop(const std::string& fault) {
  Lock lock(gate);
  fail(lock, fault);
}

inline void Block::fail(Lock& lock, const std::string& fault) {
  lock.unlock();
  launch.report(cudaErrorLaunchFailure, fault);
  for (Thread& thread : threads) thread.bed.wake_after([&] { aborted = true; });
  throw KernelAborted{};
}

// Called by the last runnable thread of the block: the others are in a deadlock.
inline void Block::fail_stuck(Lock& lock) {
  lock.unlock();
  std::vector<Lock> locks;
  for (Warp& warp : warps) locks.emplace_back(warp.gate);
  locks.emplace_back(gate);

  struct Waiters {
    unsigned count = 0;
    const Thread* first = nullptr;
  };
  std::map<std::string, Waiters> places;
  for (const Thread& thread : threads) {
    if (!thread.waiting) continue;
    Waiters& waiters = places[thread.request.describe()];
    if (waiters.count++ == 0) waiters.first = &thread;
  }
  std::string fault = text("block %u cannot go on: %u of its %u threads have exited", index,
                           launch.block_threads - live, launch.block_threads);
  for (const auto& [place, waiters] : places) {
    fault += text("; %u wait at ", waiters.count) + place + text(", the first is thread %u", waiters.first->number);
  }
  locks.clear();
  lock.lock();
  fail(lock, fault);
}

inline void set_thread(Block& block, Thread& thread) {
  current_block = &block;
  current_thread = &thread;
  threadIdx.x = thread.number;
  blockIdx.x = block.index;
  blockDim.x = block.launch.block_threads;
  gridDim.x = block.launch.blocks;
}

inline void check_alignment(const void* address, std::size_t alignment, const char* access) {
  const std::size_t excess = reinterpret_cast<std::uintptr_t>(address) % alignment;
  if (__builtin_expect(excess == 0 || !current_thread, 1)) return;
  current_block->launch.report(
      cudaErrorMisalignedAddress,
      current_block->describe(*current_thread) +
          text(": a vector %s that needs %zu-byte alignment is %zu bytes off", access, alignment, excess));
}

}  // namespace asgl_emulation

#endif  // ASGL_CUDA_EMULATION_BLOCKS_H
