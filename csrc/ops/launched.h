// What operators run on. `on(x_seq)` of CpuKernels or CudaKernels returns a backend for one call, whose
// plan_tiles(params) and launch(params) return when the work is done or queued, and throw on failure.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "cuda/plan.h"
#include "launch.h"

namespace asgl::ops {

class CpuKernels {
 public:
  struct Backend {
    template <class Params>
    void plan_tiles(Params& params) const {
      cpu::plan_tiles(params);
    }
    template <class Params>
    void launch(const Params& params) const {
      cpu::launch(params);
    }
  };

  Backend on(const at::Tensor&) const { return {}; }
};

// Starts CUDA kernels on a device, in the stream that is current there. Both may be called by any thread.
class Launcher {
 public:
  virtual ~Launcher() = default;
  // The most threads that the device holds at a time.
  virtual int64_t resident_threads(at::Device device) const = 0;
  // `params` are the kernel's, valid until it returns.
  virtual void launch(at::Device device, const cuda::Launch& launch, const void* params, size_t bytes) const = 0;
};

// The CUDA kernels, started by a launcher, which is never deleted.
class CudaKernels {
 public:
  class Backend {
   public:
    Backend(const Launcher& launcher, at::Device device) : launcher_(launcher), device_(device), guard_(device) {}

    template <class Params>
    void plan_tiles(Params& params) const {
      cuda::plan_tiles(params, [&] { return launcher_.resident_threads(device_); });
    }
    template <class Params>
    void launch(const Params& params) const {
      launcher_.launch(device_, cuda::launch_of(params), &params, sizeof(params));
    }

   private:
    const Launcher& launcher_;
    const at::Device device_;
    const c10::DeviceGuard guard_;
  };

  explicit CudaKernels(const Launcher& launcher) : launcher_(&launcher) {}
  Backend on(const at::Tensor& x_seq) const { return {*launcher_, x_seq.device()}; }

 private:
  const Launcher* launcher_;
};

// An operator on these kernels, as torch registers it.
template <class Kernels, class Result, class... Arguments>
auto on_kernels(const Kernels& kernels, Result (*run)(const Kernels&, Arguments...)) {
  return [=](Arguments... arguments) -> Result { return run(kernels, arguments...); };
}

}  // namespace asgl::ops
