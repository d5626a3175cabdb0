// The CPU kernels' only need of torch, on two threads, for programs without torch.
#pragma once

#include <cstdint>
#include <thread>

namespace at {

inline int get_num_threads() { return 2; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end - begin <= grain) return f(begin, end);
  const int64_t middle = begin + (end - begin) / 2;
  std::thread other([&] { f(middle, end); });
  f(begin, middle);
  other.join();
}

}  // namespace at
