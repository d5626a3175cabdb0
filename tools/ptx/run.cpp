// Runs translated kernels on the fibres of the emulation, block by block, with its barriers and shuffles.
#include <atomic>
#include <set>

#include "cuda_emulation.h"
#include "machine.h"

namespace ptx {
namespace {

using asgl_emulation::current_block;
using asgl_emulation::current_thread;
using asgl_emulation::Operation;
using asgl_emulation::Site;

using Kernel = void (*)(const Machine& m);

// The arguments of asgl_ptx_run.
struct Call {
  Kernel kernel;
  u32 shared_bytes;
  Range params;
  const Range* buffers;
  std::size_t buffer_count;
  int rcp_units, ex2_units;
  bool traced;
  std::set<std::string>* waits;  // barriers and shuffles at which a failed block's threads waited
};

struct Access {
  const char* where;
  u32 block, thread;
  bool stores;
  u32 bytes;
  u64 address;
};

std::mutex waits_mutex, access_mutex;
std::vector<Access> accesses;

// What the threads of a block share.
struct Shared {
  u64 launch = 0;
  u32 block = 0;
  std::vector<char> memory;
  std::vector<std::vector<const char*> > barriers;  // that each warp has reached
};

// Blocks run in sequence on an OS thread: each starts with uninitialised shared memory.
Shared& shared_in_block(u64 launch, u32 block, u32 bytes) {
  thread_local Shared shared;
  if (shared.launch != launch || shared.block != block) {
    shared.launch = launch;
    shared.block = block;
    shared.memory.resize(bytes);
    const u32 pattern = kPoison<u32>;
    for (u32 i = 0; i < bytes; ++i) shared.memory[i] = reinterpret_cast<const char*>(&pattern)[i % sizeof(pattern)];
    shared.barriers.assign(current_block->warps.size(), {});
  }
  return shared;
}

class EmulatedMachine final : public Machine {
 public:
  EmulatedMachine(const Call& call, u64 launch)
      : waits_(call.waits), in_block_(shared_in_block(launch, blockIdx.x, call.shared_bytes)) {
    tid_x = threadIdx.x;
    ctaid_x = blockIdx.x;
    ntid_x = blockDim.x;
    nctaid_x = gridDim.x;
    params = call.params;
    shared = {kSharedBegin, kSharedBegin + call.shared_bytes};
    shared_memory = in_block_.memory.data();
    buffers = call.buffers;
    buffer_count = call.buffer_count;
    rcp_units = call.rcp_units;
    ex2_units = call.ex2_units;
    traced = call.traced;
  }

  // bar.sync is barrier.sync.aligned: the threads of a warp must be at the same instruction, warps may be at several.
  void barrier(const char* where) const override {
    std::vector<const char*>& reached = in_block_.barriers[tid_x / 32];
    if (passed_ == reached.size()) reached.push_back(where);
    if (const char* const other = reached[passed_++]; other != where) {
      stop(where, std::string("has another thread of its warp at ") + other);
    }
    noting(where, [] { current_block->synchronise(*current_thread, Site{"PTX", 0}); });
  }

  // Lanes may be at several shfl.sync of one mode.
  u32 exchange(const char* where, Shuffle mode, u32 mask, u32 value, u32 source_lane) const override {
    const Operation operation = mode == Shuffle::down ? Operation::shfl_down : Operation::shfl;
    u32 result = 0;
    noting(where, [&] {
      result = u32(current_block->exchange(*current_thread, {operation, Site{"PTX", 0}, mask, value, source_lane}));
    });
    return result;
  }

  void trace(const char* where, bool stores, u64 address, u32 bytes) const override {
    std::lock_guard<std::mutex> lock(access_mutex);
    accesses.push_back({where, ctaid_x, tid_x, stores, bytes, address});
  }

  [[noreturn]] void fail(const char* where, const char* problem, u64 value) const override {
    stop(where, problem + asgl_emulation::text(": 0x%llx", static_cast<unsigned long long>(value)));
  }

 private:
  [[noreturn]] static void stop(const char* where, const std::string& problem) {
    current_block->stop(current_block->describe(*current_thread) + ": " + where + " " + problem);
  }

  template <class Wait>
  void noting(const char* where, Wait wait) const {
    try {
      wait();
    } catch (const asgl_emulation::KernelAborted&) {
      std::lock_guard<std::mutex> lock(waits_mutex);
      waits_->insert(where);
      throw;
    }
  }

  std::set<std::string>* waits_;
  Shared& in_block_;
  mutable std::size_t passed_ = 0;  // barriers of this thread
};

}  // namespace
}  // namespace ptx

// Returns an error message, or null.
extern "C" const char* asgl_ptx_run(ptx::Kernel kernel, ptx::u32 shared_bytes, unsigned blocks, unsigned threads,
                                    const void* params, std::size_t bytes, const ptx::Range* buffers,
                                    std::size_t buffer_count, int rcp_units, int ex2_units, bool traced) {
  static std::atomic<ptx::u64> launches{0};
  thread_local std::string problem;
  const auto first = reinterpret_cast<ptx::u64>(params);
  std::set<std::string> waits;
  const ptx::Call call{kernel, shared_bytes, {first, first + bytes}, buffers, buffer_count, rcp_units, ex2_units,
                       traced, &waits};
  const ptx::u64 number = ++launches;
  asgl_emulation::Launch launch;
  launch.blocks = blocks;
  launch.block_threads = threads;
  launch.kernel = [&] { call.kernel(ptx::EmulatedMachine(call, number)); };
  asgl_emulation::run_launch(launch);
  problem = launch.message;
  for (const std::string& where : waits) problem += "; threads were at " + where;
  return launch.error == cudaSuccess ? nullptr : problem.c_str();
}

// Reports every access to global memory since the last call.
extern "C" void asgl_ptx_take_accesses(void (*receive)(const char* where, unsigned block, unsigned thread, bool stores,
                                                       unsigned bytes, ptx::u64 address)) {
  for (const auto& access : ptx::accesses) {
    receive(access.where, access.block, access.thread, access.stores, access.bytes, access.address);
  }
  ptx::accesses.clear();
}
