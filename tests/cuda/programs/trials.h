// Shared by the kernel tests: random values, buffers that show an overrun, checks of launches.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/plan.h"
#include "launch.h"
#include "params/gradient.h"

namespace asgl_emulation {

using Texts = std::vector<std::string>;

#if defined(ASGL_TEST_CPU)
constexpr bool kOnCpu = true;
#else
constexpr bool kOnCpu = false;
#endif

// In a build with seeded mutants, the environment selects one, the first failure ends the program, and buffers have
// room for accesses beyond their ends: results must reveal mutants.
#if defined(ASGL_TEST_MUTANTS)
constexpr int kManyFailures = 1;
constexpr asgl::int64 kRoom = 8192;
inline void choose_mutant() { asgl::mutant = std::atoi(std::getenv("ASGL_MUTANT")); }
#else
constexpr int kManyFailures = 3;
constexpr asgl::int64 kRoom = 0;
inline void choose_mutant() {}
#endif

class Random {
 public:
  explicit Random(unsigned seed) : bits_(seed) {}

  bool once_in(unsigned times) { return bits_() % times == 0; }
  bool toss() { return once_in(2); }
  double between(double low, double high) { return low + (high - low) * (bits_() * 0x1p-32); }
  asgl::int64 one_of(const std::vector<asgl::int64>& choices) { return choices[bits_() % choices.size()]; }
  // A divisor of `number` that is a multiple of `unit`, itself a divisor.
  asgl::int64 divisor(asgl::int64 number, asgl::int64 unit) {
    std::vector<asgl::int64> divisors;
    for (asgl::int64 k = unit; k <= number; k += unit) {
      if (number % k == 0) divisors.push_back(k);
    }
    return one_of(divisors);
  }

 private:
  std::mt19937 bits_;
};

#if defined(__SANITIZE_ADDRESS__) || defined(ASGL_TEST_MUTANTS)
template <class Element>
using Storage = std::unique_ptr<Element[]>;

template <class Element>
Storage<Element> allocate(std::size_t size) {
  return Storage<Element>(new Element[size]);
}
#else
// Ends at a page without access, and has one in front of its first page: an access outside is an error in any run. Up
// to three elements are in between, so that the launchers find four of them aligned.
struct Unmap {
  char* pages = nullptr;
  std::size_t bytes = 0;

  void operator()(const void*) const { munmap(pages, bytes); }
};

template <class Element>
using Storage = std::unique_ptr<Element[], Unmap>;

inline void refuse_access(int) {
  constexpr char kText[] = "a read or a write outside of the arrays\n";
  _exit(write(STDERR_FILENO, kText, sizeof(kText) - 1) > 0 ? 1 : 2);
}

template <class Element>
Storage<Element> allocate(std::size_t size) {
  static const auto before = std::signal(SIGSEGV, refuse_access);
  const std::size_t page = sysconf(_SC_PAGESIZE), elements = (size + 3) / 4 * 4;
  const std::size_t usable = (elements * sizeof(Element) + page - 1) / page * page;
  void* const pages = mmap(nullptr, usable + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* const first = static_cast<char*>(pages) + page;
  if (before == SIG_ERR || pages == MAP_FAILED || mprotect(first, usable, PROT_READ | PROT_WRITE) != 0) std::abort();
  return {reinterpret_cast<Element*>(first + usable) - elements, Unmap{first - page, usable + 2 * page}};
}
#endif

// Ends with its last element, so that an overrun shows. Filled with NaN: all bits set.
template <class Element>
class Buffer {
 public:
  Buffer() = default;
  Buffer(asgl::int64 size, asgl::int64 offset)
      : size_(size), offset_(offset), storage_(allocate<Element>(size + offset + kRoom)) {
    std::memset(static_cast<void*>(storage_.get()), 0xFF, (size + offset + kRoom) * sizeof(Element));
  }

  void fill(Random& random, double low, double high) {
    for (asgl::int64 i = 0; i < size_; ++i) set(i, random.between(low, high));
  }
  void set(asgl::int64 i, double value) {
    data()[i] = asgl::from_real<Element>(static_cast<asgl::Real_t<Element>>(value));
  }

  Element* data() const { return storage_ == nullptr ? nullptr : storage_.get() + offset_; }
  asgl::int64 size() const { return size_; }
  bool is_aligned() const { return offset_ == 0; }

  // Whether the room beyond the end was written to.
  bool overrun() const {
    const auto* room = reinterpret_cast<const unsigned char*>(data() + size_);
    return std::any_of(room, room + kRoom * sizeof(Element), [](unsigned char byte) { return byte != 0xFF; });
  }

 private:
  asgl::int64 size_ = 0, offset_ = 0;
  Storage<Element> storage_;
};

inline bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// Adds an error of a launcher to the differences.
inline void check(const char* what, cudaError_t error, Texts& differences) {
  if (error == cudaSuccess) return;
  differences.push_back(text("%s: %s", what, cudaGetErrorString(error)));
  clear_errors();
}

// Plans and starts a kernel as the operators of csrc/ops do.
#if defined(ASGL_TEST_CPU)
template <class Params>
void plan(Params& params) {
  asgl::cpu::plan_tiles(params);
}
template <class Params>
cudaError_t launch_on_cpu(const Params& params) {
  asgl::cpu::launch(params);
  return cudaSuccess;
}
template <class Real>
cudaError_t launch_sum(const asgl::GradientSum<Real>& sum) {
  return launch_on_cpu(sum);
}
#else
template <class Params>
void plan(Params& params) {
  asgl::cuda::plan_tiles(params, [] { return asgl::int64{2048} * settings().multiprocessors; });
}
template <class Params>
asgl::cuda::Start start_of(const Params& params) {
  return {asgl::cuda::launch_of(params), &params, nullptr};
}
template <class Real>
cudaError_t launch_sum(const asgl::GradientSum<Real>& sum) {
  return start_of(sum)(&asgl::gradient_sum_kernel<Real>);
}
#endif

// Sums the gradients by one launch or two, as ParameterGradients in csrc/ops does. Calls each(sum) after a launch.
template <class Real, class F>
void sum_gradients(asgl::GradientSum<Real> sum, Texts& differences, F&& each) {
  plan(sum);
  Buffer<Real> totals(sum.num_totals(), 0);
  asgl::GradientSum<Real> second = sum.place_totals(totals.data());
  check("sum", launch_sum(sum), differences);
  each(sum);
  if (second.count > 0) {
    plan(second);
    check("sum of totals", launch_sum(second), differences);
    each(second);
  }
  if (totals.overrun()) differences.push_back("a total beyond the last");
}

inline asgl::int64 blocks_of_last_launch() {
  const auto launches = recorded_launches();
  return launches.empty() ? 0 : launches.back().grid.x;
}

}  // namespace asgl_emulation
