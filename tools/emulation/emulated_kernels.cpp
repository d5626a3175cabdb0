// The unchanged CUDA kernels and their launchers, compiled for the host, by the kernels' names. Called through ctypes.
#include <map>

#include "cuda/start.cuh"

namespace asgl_emulation {
namespace {

const asgl::cuda::Kernel* find_kernel(const std::string& name) {
  static const std::map<std::string, asgl::cuda::Kernel> kernels = [] {
    std::map<std::string, asgl::cuda::Kernel> made;
    for (const asgl::cuda::Kernel& kernel : asgl::cuda::all_kernels())
      made[asgl::cuda::name_expression(kernel)] = kernel;
    return made;
  }();
  const auto found = kernels.find(name);
  return found == kernels.end() ? nullptr : &found->second;
}

}  // namespace
}  // namespace asgl_emulation

// Returns an error message, or null.
extern "C" const char* asgl_emulated_launch(const char* name, asgl::int64 blocks, int threads, const void* params) {
  static thread_local std::string problem;
  const auto* kernel = asgl_emulation::find_kernel(name);
  if (kernel == nullptr) return "there is no such kernel";
  const cudaError_t error = asgl::cuda::launch({*kernel, blocks, threads}, params, nullptr);
  if (error == cudaSuccess) return nullptr;
  problem = std::string(cudaGetErrorString(error)) + " " + std::exchange(asgl_emulation::error_message, "");
  return problem.c_str();
}
