// The operators of csrc/ops on the emulated CUDA kernels and launchers, as torch.ops.asgl_cuda_emulated for CPU
// tensors; and the emulated device for the launchers in Python.
#include "emulated_kernels.h"
#include "ops/integrator.h"
#include "ops/neuron.h"
#include "ops/normalisation.h"

namespace asgl {
namespace {

class EmulatedBackend {
 public:
  explicit EmulatedBackend(const at::Tensor&) {}

  template <class Params>
  void plan_tiles(Params& params) const {
    check(cuda::plan_tiles(params));
  }
  template <class Params>
  void launch(const Params& params) const {
    check(cuda::launch(params, nullptr));
  }

 private:
  // Faults are sticky, as on a device; cleared for the next call.
  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    const std::string message = asgl_emulation::error_message();
    asgl_emulation::clear_errors();
    TORCH_CHECK(false, "emulated CUDA: ", cudaGetErrorString(error), " ", message);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(asgl_cuda_emulated, CPU, m) {
  ops::implement<EmulatedBackend>(m);
  ops::implement_integrator<EmulatedBackend>(m);
  ops::implement_batch_norm<EmulatedBackend>(m);
}

}  // namespace asgl

// Tests call these through ctypes.

extern "C" void asgl_emulated_set_multiprocessors(int count) { asgl_emulation::settings().multiprocessors = count; }

// Reports every launch since the last call.
extern "C" void asgl_emulated_take_launches(void (*receive)(const char* kernel, unsigned blocks, unsigned threads,
                                                            const void* params, std::size_t bytes)) {
  for (const auto& launch : asgl_emulation::recorded_launches()) {
    const auto& params = launch.arguments.at(0);
    receive(asgl_emulation::kernel_name(launch.kernel), launch.grid.x, launch.block.x, params.data(), params.size());
  }
  asgl_emulation::clear_recorded_launches();
}

// Runs a kernel on params given as bytes. Returns an error message, or null.
extern "C" const char* asgl_emulated_launch(const char* kernel, unsigned blocks, unsigned threads, const void* params,
                                            std::size_t bytes) {
  static std::string problem;
  const auto* found = asgl_emulation::find_kernel(kernel);
  if (found == nullptr) return "there is no such kernel";
  if (found->params_bytes != bytes) {
    problem = "its parameters take " + std::to_string(found->params_bytes) + " bytes, got " + std::to_string(bytes);
    return problem.c_str();
  }
  const cudaError_t error = found->launch(blocks, threads, params);
  if (error == cudaSuccess) return nullptr;
  problem = std::string(cudaGetErrorString(error)) + " " + asgl_emulation::error_message();
  asgl_emulation::clear_errors();
  return problem.c_str();
}
