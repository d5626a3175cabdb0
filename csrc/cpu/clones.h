// Compiles each loop once per instruction set (a clone), and runs the clone that fits the processor.
//
// A loop is a type with `struct Args` and `static void run(Args)`, which is inlined into the clones. Args are passed by
// value: no store of the loop can then change them, so they stay in registers. Clones do not use FMA, because every
// backend rounds the result of each operation. Products with a matrix may use FMA, through run_with_fma in
// cpu/product.h.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace asgl::cpu {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The largest of these instruction sets that the processor supports.
inline InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

// The instruction set whose clones run. It is the largest that the processor supports, unless the environment variable
// ASGL_CUDA_INSTRUCTION_SET names a smaller one, as in tests.
inline InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    const char* variable = std::getenv("ASGL_CUDA_INSTRUCTION_SET");
    const std::string asked = variable == nullptr ? "" : variable;
    if (asked == "baseline") return InstructionSet::kBaseline;
    if (asked == "avx2") return std::min(InstructionSet::kAvx2, best_instruction_set());
    if (asked == "avx512" || asked.empty()) return best_instruction_set();
    throw std::invalid_argument("asgl_cuda: ASGL_CUDA_INSTRUCTION_SET must be baseline, avx2 or avx512, got '" + asked +
                                "'");
  }();
  return chosen;
}

// The name of instruction_set(), for users.
inline const char* instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return "AVX-512";
    case InstructionSet::kAvx2:
      return "AVX2";
    default:
      return "baseline";
  }
}

// The clones of a loop, a function for each instruction set.
template <class Loop>
void run_baseline(const typename Loop::Args& args) {
  Loop::run(args);
}

#if defined(__x86_64__)
#if defined(__clang__)
#define ASGL_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define ASGL_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif

template <class Loop>
__attribute__((target("avx2"))) void run_avx2(const typename Loop::Args& args) {
  Loop::run(args);
}

template <class Loop>
ASGL_TARGET_AVX512 void run_avx512(const typename Loop::Args& args) {
  Loop::run(args);
}
#endif

template <class Loop>
using Clone = void (*)(const typename Loop::Args&);

// The clone for an instruction set.
template <class Loop>
Clone<Loop> clone_for(InstructionSet set) {
#if defined(__x86_64__)
  switch (set) {
    case InstructionSet::kAvx512:
      return &run_avx512<Loop>;
    case InstructionSet::kAvx2:
      return &run_avx2<Loop>;
    case InstructionSet::kBaseline:
      break;
  }
#endif
  return &run_baseline<Loop>;
}

// Runs the clone of the loop for instruction_set().
template <class Loop>
void run(const typename Loop::Args& args) {
  static const Clone<Loop> clone = clone_for<Loop>(instruction_set());
  clone(args);
}

}  // namespace asgl::cpu
