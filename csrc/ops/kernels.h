// The kernels that operators run: CPU kernels, or CUDA kernels that a launcher starts.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "cpu/kernels.h"
#include "cuda/plan.h"

namespace asgl::ops {

// Starts CUDA kernels on a device, in the stream that is current there. Any thread may call it.
class Launcher {
 public:
  virtual ~Launcher() = default;
  // The largest number of threads that the device can hold at a time.
  virtual int64_t resident_threads(at::Device device) const = 0;
  // Starts a kernel. `params` points to the params struct of the kernel, which is valid until this function returns.
  virtual void launch(at::Device device, const cuda::Launch& launch, const void* params, size_t bytes) const = 0;
};

// The kernels of one call, on the device of its tensors: CPU kernels if `launcher` is null, else CUDA kernels. The
// functions return when the work is done or queued, and throw on failure.
class Kernels {
 public:
  Kernels(const Launcher* launcher, at::Device device) : launcher_(launcher), device_(device), guard_(device) {}

  // Divides the values of a call into tiles, and stores the division in params.
  template <class Params>
  void plan_tiles(Params& params) const {
    if (launcher_ == nullptr) return cpu::plan_tiles(params);
    cuda::plan_tiles(params, [&] { return launcher_->resident_threads(device_); });
  }

  // Runs the kernel that takes these params.
  template <class Params>
  void launch(const Params& params) const {
    if (launcher_ == nullptr) return cpu::launch(params);
    launcher_->launch(device_, cuda::launch_of(params), &params, sizeof(params));
  }

 private:
  const Launcher* const launcher_;
  const at::Device device_;
  const c10::DeviceGuard guard_;
};

// Binds the launcher as the first argument of `run`, and returns a function that torch can register. The launcher must
// live as long as the process.
template <class Result, class... Arguments>
auto bind_launcher(const Launcher* launcher, Result (*run)(const Launcher*, Arguments...)) {
  return [=](Arguments... arguments) -> Result { return run(launcher, arguments...); };
}

}  // namespace asgl::ops
