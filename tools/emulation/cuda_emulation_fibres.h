// Runs the blocks of a launch: each thread is a fibre, or with ASGL_EMULATE_THREADS an OS thread.
#ifndef ASGL_CUDA_EMULATION_FIBRES_H
#define ASGL_CUDA_EMULATION_FIBRES_H

#include <memory>
#include <numeric>
#include <random>

#include "cuda_emulation_blocks.h"

#ifndef ASGL_EMULATE_THREADS
#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif
#endif

namespace asgl_emulation {

#ifdef ASGL_EMULATE_THREADS
inline void run_launch(Launch& launch) {
  Block block(launch);
  for (unsigned number = 0; number < launch.blocks && !launch.failed; ++number) {
    block.begin(number);
    std::vector<std::thread> os_threads;
    for (Thread& thread : block.threads) {
      os_threads.emplace_back([&block, &thread] {
        set_thread(block, thread);
        block.run_thread(thread);
      });
    }
    for (std::thread& os_thread : os_threads) os_thread.join();
  }
}

#else
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t fibre_stack_bytes = 256 * 1024;
constexpr auto announce_switch = &__sanitizer_start_switch_fiber;
constexpr auto confirm_switch = &__sanitizer_finish_switch_fiber;
#else
constexpr std::size_t fibre_stack_bytes = 64 * 1024;
inline void announce_switch(void**, const void*, std::size_t) {}
inline void confirm_switch(void*, const void**, std::size_t*) {}
#endif

// A suspended context. Bounds and fake stack are for AddressSanitizer.
struct Context {
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;
#ifndef __x86_64__
  ucontext_t registers;

  void prepare(void* bottom, void (*entry)()) {
    getcontext(&registers);
    registers.uc_stack.ss_sp = bottom;
    registers.uc_stack.ss_size = stack_bytes;
    makecontext(&registers, entry, 0);
  }
  void exchange(Context& to) { swapcontext(&registers, &to.registers); }
#else
  void* stack_pointer = nullptr;

  // The stack that exchange_stacks pops: six registers and the entry point, which finds a null return address.
  void prepare(void* bottom, void (*entry)()) {
    void** const top = reinterpret_cast<void**>(static_cast<char*>(bottom) + stack_bytes);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    stack_pointer = top - 8;
  }
  void exchange(Context& to) { exchange_stacks(&stack_pointer, to.stack_pointer); }

  // Saves the callee-saved registers on the old stack and restores the new one's. Floating-point control words
  // stay, since kernels do not change them.
  __attribute__((naked, noinline)) static void exchange_stacks(void** /*old_stack*/, void* /*new_stack*/) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n\t"
        "ret");
  }
#endif

  void switch_to(Context& to) {
    announce_switch(&fake_stack, to.stack, to.stack_bytes);
    exchange(to);
    confirm_switch(fake_stack, &to.stack, &to.stack_bytes);
  }
};

// A stack that runs one CUDA thread after another, going back to its scheduler whenever a thread waits or ends.
class Fibre {
 public:
  Fibre(Context& scheduler_, unsigned number) : scheduler(scheduler_) {
    memory = mmap(nullptr, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
      std::perror("asgl_emulation: no memory for a fibre's stack");
      std::abort();
    }
    // Stack tops at different offsets in a page, or the frames of a warp would compete for the same cache sets.
    void* const bottom = static_cast<char*>(memory) + page;
    context.stack = bottom;
    context.stack_bytes = fibre_stack_bytes + number % 16 * 256;
    context.prepare(bottom, &Fibre::main);
  }
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;
  ~Fibre() { munmap(memory, memory_bytes); }

  void resume(Block& block_, Thread& thread_) {
    block = &block_;
    thread = &thread_;
    starting = this;
    scheduler.switch_to(context);
  }

  void yield() { context.switch_to(scheduler); }

 private:
  static constexpr std::size_t page = 4096;
  static constexpr std::size_t memory_bytes = page + fibre_stack_bytes + page;  // the first page guards the stack

  [[noreturn]] static void main() {
    Fibre& self = *starting;
    confirm_switch(nullptr, &self.scheduler.stack, &self.scheduler.stack_bytes);
    for (;;) {
      self.block->run_thread(*self.thread);
      self.yield();
    }
  }

  inline static thread_local Fibre* starting = nullptr;

  Context& scheduler;
  Context context;
  void* memory;
  Block* block = nullptr;
  Thread* thread = nullptr;
};

inline void yield_fibre() { current_thread->fibre->yield(); }

// The order in which a block's warps, and a warp's lanes, run until they have to wait: ASGL_EMULATION_ORDER is the name
// of one, or a number that seeds a random one. `middle` descends from the middle and wraps round (2 1 0 3), so that
// index 0 runs after some and before others: a missing barrier then shows both where 0 writes for the others and where
// the others write for 0. With only two warps it cannot show the latter; `ascending` does.
inline std::vector<unsigned> visiting_order(unsigned count) {
  static const char* const given = std::getenv("ASGL_EMULATION_ORDER");
  static const std::string order = given ? given : "middle";
  std::vector<unsigned> visits(count);
  std::iota(visits.begin(), visits.end(), 0u);
  if (order == "middle" || order == "descending") {
    std::reverse(visits.begin(), visits.end());
    if (order == "middle") std::rotate(visits.begin(), visits.begin() + (count - 1) / 2, visits.end());
  } else if (order != "ascending") {
    std::shuffle(visits.begin(), visits.end(), std::minstd_rand(unsigned(std::stoul(order))));
  }
  return visits;
}

// Runs blocks, one at a time, on the calling OS thread.
class Scheduler {
 public:
  void run(Block& block) {
    const std::vector<unsigned> warps = visiting_order(unsigned(block.warps.size())), lanes = visiting_order(32);
    bool progress;
    do {
      progress = false;
      for (unsigned warp : warps) {
        while (visit_lanes(block, warp, lanes)) progress = true;
      }
    } while (progress);
  }

 private:
  bool visit_lanes(Block& block, unsigned warp, const std::vector<unsigned>& lanes) {
    bool progress = false;
    for (unsigned lane : lanes) {
      const unsigned number = 32 * warp + lane;
      if (number >= block.threads.size()) continue;
      Thread& thread = block.threads[number];
      // In a failed block waiting threads are resumed to unwind, and no new ones begin.
      const bool can_run = block.aborted ? thread.fibre != nullptr : !thread.waiting;
      if (thread.finished || !can_run) continue;
      step(block, thread);
      progress = true;
    }
    return progress;
  }

  void step(Block& block, Thread& thread) {
    if (!thread.fibre) thread.fibre = take_idle_fibre();
    set_thread(block, thread);
    thread.fibre->resume(block, thread);
    current_thread = nullptr;
    if (thread.finished) idle.push_back(thread.fibre);
  }

  // The most recently idle fibre first, so that a kernel without barriers runs on one warm stack.
  Fibre* take_idle_fibre() {
    if (idle.empty()) {
      fibres.push_back(std::make_unique<Fibre>(context, unsigned(fibres.size())));
      idle.push_back(fibres.back().get());
    }
    Fibre* const fibre = idle.back();
    idle.pop_back();
    return fibre;
  }

  Context context;
  std::vector<std::unique_ptr<Fibre> > fibres;
  std::vector<Fibre*> idle;
};

inline void run_blocks(Launch& launch) {
  // Schedulers outlive launches and OS threads, because their stacks are expensive to create.
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Scheduler> > idle;
  std::unique_ptr<Scheduler> scheduler;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (idle.empty()) idle.push_back(std::make_unique<Scheduler>());
    scheduler = std::move(idle.back());
    idle.pop_back();
  }
  Block block(launch);
  while (!launch.failed) {
    const std::uint64_t number = launch.next_block++;
    if (number >= launch.blocks) break;
    block.begin(unsigned(number));
    scheduler->run(block);
  }
  std::lock_guard<std::mutex> lock(mutex);
  idle.push_back(std::move(scheduler));
}

inline void run_launch(Launch& launch) {
  // Below about this many CUDA threads, starting an OS thread costs more than it saves.
  constexpr std::uint64_t worth_another_os_thread = 4096;
  const std::uint64_t threads = std::uint64_t(launch.blocks) * launch.block_threads;
  const std::uint64_t useful = std::min<std::uint64_t>(launch.blocks, threads / worth_another_os_thread);
  std::vector<std::thread> helpers;
  for (std::uint64_t i = 1; i < std::min<std::uint64_t>(std::thread::hardware_concurrency(), useful); ++i) {
    helpers.emplace_back([&launch] { run_blocks(launch); });
  }
  run_blocks(launch);
  for (std::thread& helper : helpers) helper.join();
}
#endif

}  // namespace asgl_emulation

#endif  // ASGL_CUDA_EMULATION_FIBRES_H
