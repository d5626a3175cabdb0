// Huge pages for large CPU tensors of the operators. Fresh memory is mapped at its first access, a page at a time: with
// 4 KiB pages that takes longer than the kernel.
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

// The smallest size for which huge pages are requested. A smaller block contains a whole huge page of 2 MiB only by
// chance.
constexpr size_t kMinHugePageBytes = size_t{1} << 22;

// Whether the system grants transparent huge pages on request, its setting "madvise". "always" and "never" need no
// request.
inline bool has_huge_pages_on_request() {
  static const bool on_request = [] {
    std::ifstream setting("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string words;
    return std::getline(setting, words) && words.find("[madvise]") != std::string::npos;
  }();
  return on_request;
}

// Requests huge pages for an untouched tensor, and returns it. The request is rounded outward to whole pages: a
// block of malloc begins 64 bytes after a page boundary, and if a huge page begins there too, it would otherwise be
// lost. Neighbouring memory does not become resident, because the system uses a huge page only if all of it is
// requested.
inline Tensor request_huge_pages(Tensor tensor) {
  if (tensor.is_cpu() && tensor.nbytes() >= kMinHugePageBytes && has_huge_pages_on_request()) {
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t begin = address / page * page;
    madvise(reinterpret_cast<void*>(begin), address + tensor.nbytes() - begin, MADV_HUGEPAGE);
  }
  return tensor;
}

#else

inline Tensor request_huge_pages(Tensor tensor) { return tensor; }

#endif

}  // namespace asgl::ops
