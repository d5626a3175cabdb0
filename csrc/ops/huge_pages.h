// Huge pages for the large tensors that an operator allocates on a CPU. Fresh memory is mapped when it is first
// touched, a page at a time: with 4 KiB pages that takes longer than the kernel does.
#pragma once

#include <ATen/ATen.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <string>
#endif

namespace asgl::ops {

using at::Tensor;

#if defined(__linux__)

// Smaller blocks hold a whole huge page, 2 MiB, by chance only.
constexpr size_t kLeastHugeBytes = size_t{1} << 22;

// Says whether the system gives huge pages to those who ask. If it gives them to all or to nobody, nothing is asked.
inline bool huge_pages_on_request() {
  static const bool on_request = [] {
    std::ifstream setting("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string words;
    return std::getline(setting, words) && words.find("[madvise]") != std::string::npos;
  }();
  return on_request;
}

// Asks for huge pages for a tensor that nothing has touched. The pages at its ends are included, since a block that the
// C library maps begins a few bytes behind a boundary of huge pages; of the memory around it no more becomes resident,
// as the system uses a huge page only where all of it was asked for. A refusal changes nothing but the time.
inline Tensor in_huge_pages(Tensor tensor) {
  if (tensor.is_cpu() && tensor.nbytes() >= kLeastHugeBytes && huge_pages_on_request()) {
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t begin = address / page * page;
    madvise(reinterpret_cast<void*>(begin), address + tensor.nbytes() - begin, MADV_HUGEPAGE);
  }
  return tensor;
}

#else

inline Tensor in_huge_pages(Tensor tensor) { return tensor; }

#endif

}  // namespace asgl::ops
