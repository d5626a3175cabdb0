// The operators of csrc/ops.h on the CUDA kernels and launchers as the emulation runs them, as
// torch.ops.asgl_cuda_emulated, for tensors on the CPU.
#include "lif_cuda.h"
#include "ops.h"

namespace asgl {
namespace {

class EmulatedBackend {
 public:
  explicit EmulatedBackend(const at::Tensor&) {}

  template <class Scalar>
  TilePlan backward_tiles(const BackwardParams<Scalar>& params) const {
    TilePlan plan{};
    check(cuda::backward_tiles(params, &plan));
    return plan;
  }
  template <class Params>
  void launch_forward(Surrogate surrogate, bool hard_reset, const Params& params) const {
    check(cuda::launch_forward(surrogate, hard_reset, params, nullptr));
  }
  template <class Params>
  void launch_backward(Surrogate surrogate, bool hard_reset, const Params& params) const {
    check(cuda::launch_backward(surrogate, hard_reset, params, nullptr));
  }
  template <class Real>
  void launch_gradient_sum(const GradientSum<Real>& sum) const {
    check(cuda::launch_gradient_sum(sum, nullptr));
  }

 private:
  // A fault sticks, as on a device; here the next call may go on.
  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    const std::string message = asgl_emulation::error_message();
    asgl_emulation::clear_errors();
    TORCH_CHECK(false, "emulated CUDA: ", cudaGetErrorString(error), " ", message);
  }
};

}  // namespace

TORCH_LIBRARY(asgl_cuda_emulated, m) { ops::define(m); }
TORCH_LIBRARY_IMPL(asgl_cuda_emulated, CPU, m) { ops::implement<EmulatedBackend>(m); }

}  // namespace asgl

// For tests, through ctypes.

extern "C" void asgl_emulated_set_multiprocessors(int count) { asgl_emulation::settings().multiprocessors = count; }

// Grid and block of the launches since the last call: up to `capacity` pairs; returns how many there were.
extern "C" int asgl_emulated_take_launches(unsigned* pairs, int capacity) {
  const auto launches = asgl_emulation::recorded_launches();
  for (int i = 0; i < static_cast<int>(launches.size()) && i < capacity; ++i) {
    pairs[2 * i] = launches[i].grid.x;
    pairs[2 * i + 1] = launches[i].block.x;
  }
  asgl_emulation::clear_recorded_launches();
  return static_cast<int>(launches.size());
}
