// The unchanged CUDA kernels and launchers, compiled for the host, and the kernels by their NVRTC names.
#include "cuda/launch_integrator.cu"
#include "emulated_table.h"

namespace asgl_emulation {
namespace {

const KernelTable& table() {
  static const KernelTable kernels = [] {
    KernelTable made;
    made.add_scalar<Half>("asgl::Half");
    made.add_scalar<BFloat16>("asgl::BFloat16");
    made.add_scalar<float>("float");
    made.add_scalar<double>("double");
    made.add_real<float>("float");
    made.add_real<double>("double");
    return made;
  }();
  return kernels;
}

}  // namespace

const EmulatedKernel* find_kernel(const char* name) { return table().find(name); }

const char* kernel_name(const void* address) { return table().name_of(address); }

}  // namespace asgl_emulation
