// Huge pages for large CPU tensors of the operators. Fresh memory is mapped at its first access, a page at a time. With
// pages of 4 KiB, this may take longer than the kernel that writes the tensor.
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

// Whether the system grants transparent huge pages on request, which is its setting "madvise". With "always" or
// "never", requests are pointless.
inline bool has_huge_pages_on_request() {
  static const bool on_request = [] {
    std::ifstream setting("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string words;
    return std::getline(setting, words) && words.find("[madvise]") != std::string::npos;
  }();
  return on_request;
}

// Requests huge pages for an untouched tensor, and returns the tensor. The request is rounded outward to whole pages. A
// large tensor usually begins 64 bytes after a page boundary, because malloc stores a header there and torch aligns
// tensors to 64 bytes. If a huge page begins at this boundary, it is lost unless the request includes the 64 bytes.
// Neighbouring memory does not become resident, because the system uses a huge page only if the request covers all of
// it.
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
