// A launcher in Python, and the operators on the kernels that it starts.
#pragma once

#include <torch/extension.h>

#include <string>

#include "ops/launched.h"

namespace asgl::ops {

// `launch(device, kernel, blocks, threads, params, bytes)` starts a kernel by its name; `params` is an address.
// `resident_threads(device)` is called where the size of the device decides.
class __attribute__((visibility("hidden"))) PythonLauncher : public Launcher {  // as pybind11::object
 public:
  PythonLauncher(pybind11::object launch, pybind11::object resident_threads)
      : launch_(std::move(launch)), resident_threads_(std::move(resident_threads)) {}

  int64_t resident_threads(at::Device device) const override {
    const pybind11::gil_scoped_acquire gil;
    return resident_threads_(device).cast<int64_t>();
  }

  void launch(at::Device device, const cuda::Launch& launch, const void* params, size_t bytes) const override {
    const pybind11::gil_scoped_acquire gil;
    launch_(device, cuda::name_of(launch.kernel), launch.blocks, launch.threads, reinterpret_cast<uintptr_t>(params),
            bytes);
  }

 private:
  pybind11::object launch_, resident_threads_;
};

}  // namespace asgl::ops
