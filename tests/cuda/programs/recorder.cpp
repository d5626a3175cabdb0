// Writes launches to files: of the CPU's kernels, whose functions this library replaces if it is loaded before the
// extension, and of emulated CUDA kernels, which it is asked to start.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/kernels.h"
#include "recording.h"

namespace {

using namespace asgl_recording;

struct Files {
  std::FILE *cpu, *cuda;
  void* extension;  // the library with the CPU's kernels
};
Files files{};

constexpr int64 kMostBytes = 3 << 20;

using Bytes = std::vector<char>;

void append(Bytes& bytes, const void* from, int64 size) {
  const auto* first = static_cast<const char*>(from);
  bytes.insert(bytes.end(), first, first + size);
}

// Calls launch() with arrays that are written to the file before and after.
template <class Params, class Launch>
void record(std::FILE* file, Header header, Params params, const Launch& launch) {
  if (file == nullptr) return launch();
  std::vector<Bytes> arrays;
  for_each_array(params, [&](auto* pointer, int64 elements, bool) {
    const auto offset = static_cast<int64>(reinterpret_cast<std::uintptr_t>(pointer) % kAlignment);
    Bytes& bytes = arrays.emplace_back();
    append(bytes, &offset, sizeof(offset));
    append(bytes, pointer, elements * static_cast<int64>(sizeof(*pointer)));
  });
  launch();
  auto array = arrays.begin();
  header.bytes = sizeof(header) + sizeof(params);
  for_each_array(params, [&](auto* pointer, int64 elements, bool) {
    if constexpr (!std::is_const_v<std::remove_pointer_t<decltype(pointer)>>) {
      append(*array, pointer, elements * static_cast<int64>(sizeof(*pointer)));
    }
    header.bytes += static_cast<int64>((array++)->size());
  });
  constexpr bool kNeurons = requires { params.summary; };
  if (kNeurons && header.bytes > kMostBytes) return;  // of sums over many neurons, only these
  std::fwrite(&header, sizeof(header), 1, file);
  std::fwrite(&params, sizeof(params), 1, file);
  for (const Bytes& bytes : arrays) std::fwrite(bytes.data(), 1, bytes.size(), file);
}

Header header_of(const std::string& kernel) {
  Header header{};
  std::strncpy(header.kernel, kernel.c_str(), sizeof(header.kernel) - 1);
  return header;
}

// The extension's function, in whose place `own` is called.
template <class Function>
Function* replaced_by(Function* own) {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(own), &info);
  void* const found = files.extension == nullptr ? nullptr : dlsym(files.extension, info.dli_sname);
  if (found == nullptr) throw std::runtime_error(std::string("the extension has no ") + info.dli_sname);
  return reinterpret_cast<Function*>(found);
}

}  // namespace

namespace asgl::cpu {

template <class Params>
void launch(const Params& params) {
  static const auto kernel = replaced_by(&launch<Params>);
  record(files.cpu, header_of(name_of_cpu_kernel<Params>()), params, [&] { kernel(params); });
}
template <class Scalar>
void recurrent_forward(const RecurrentForwardParams<Scalar>& params) {
  static const auto kernel = replaced_by(&recurrent_forward<Scalar>);
  record(files.cpu, header_of(name_of_cpu_kernel<RecurrentForwardParams<Scalar>>()), params, [&] { kernel(params); });
}
template <class Scalar>
void recurrent_backward(const RecurrentBackwardParams<Scalar>& params) {
  static const auto kernel = replaced_by(&recurrent_backward<Scalar>);
  record(files.cpu, header_of(name_of_cpu_kernel<RecurrentBackwardParams<Scalar>>()), params, [&] { kernel(params); });
}

// Calls the functions of every kernel, which instantiates them.
[[gnu::used]] void call_all() {
  asgl_recording::for_each_kernel([]<class Params>(const char*, const char*) {
    const Params params{};
    if constexpr (requires { recurrent_forward(params); }) {
      recurrent_forward(params);
    } else if constexpr (requires { recurrent_backward(params); }) {
      recurrent_backward(params);
    } else {
      launch(params);
    }
  });
}

}  // namespace asgl::cpu

// Records the launches from now on, of the extension and of asgl_record_launch; without paths none.
extern "C" void asgl_record(const char* cpu, const char* cuda, const char* extension) {
  for (std::FILE* file : {files.cpu, files.cuda}) {
    if (file != nullptr) std::fclose(file);
  }
  files = {};
  if (cpu == nullptr) return;
  files = {std::fopen(cpu, "wb"), std::fopen(cuda, "wb"), dlopen(extension, RTLD_LAZY | RTLD_NOLOAD)};
}

// Starts an emulated kernel by `launch`, the emulation's function, and returns what that returns.
extern "C" const char* asgl_record_launch(const char* kernel, int64 blocks, int threads, const void* params,
                                          int64 resident, const char* (*launch)(const char*, int64, int, const void*)) {
  const char* problem = "no kernel that is recorded";
  with_params(kernel, [&]<class Params>() {
    Header header = header_of(kernel);
    header.blocks = blocks, header.threads = threads, header.resident = resident;
    record(files.cuda, header, *static_cast<const Params*>(params),
           [&] { problem = launch(kernel, blocks, threads, params); });
  });
  return problem;
}
