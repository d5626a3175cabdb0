// Registers the operators of this folder for the backends of this build, and defines the Python module.
#include <torch/extension.h>
#if defined(ASGL_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "cpu/clones.h"
#include "ops/autograd.h"
#include "ops/direct_calls.h"
#include "ops/integrator.h"
#include "ops/neuron.h"
#include "ops/normalisation.h"
#include "ops/recurrent.h"

namespace asgl {
namespace {

class CpuBackend {
 public:
  explicit CpuBackend(const at::Tensor&) {}

  template <class Params>
  void plan_tiles(Params& params) const {
    cpu::plan_tiles(params);
  }
  template <class Params>
  void launch(const Params& params) const {
    cpu::launch(params);
  }
};

#if defined(ASGL_WITH_CUDA)

// Runs on x_seq's device, in the device's current stream.
class CudaBackend {
 public:
  explicit CudaBackend(const at::Tensor& x_seq)
      : guard_(x_seq.device()), stream_(c10::cuda::getCurrentCUDAStream(x_seq.device().index())) {}

  template <class Params>
  void plan_tiles(Params& params) const {
    C10_CUDA_CHECK(cuda::plan_tiles(params));
  }
  template <class Params>
  void launch(const Params& params) const {
    C10_CUDA_CHECK(cuda::launch(params, stream_));
  }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

#endif

template <class Backend, class Library>
void implement_all(Library& library) {
  ops::implement<Backend>(library);
  ops::implement_integrator<Backend>(library);
  ops::implement_batch_norm<Backend>(library);
}

}  // namespace

TORCH_LIBRARY_IMPL(asgl_cuda, CPU, m) {
  implement_all<CpuBackend>(m);
  ops::implement_recurrent(m);
}

TORCH_LIBRARY_IMPL(asgl_cuda, AutogradCPU, m) {
  ops::AtAutograd at_autograd(m);
  implement_all<CpuBackend>(at_autograd);
  ops::implement_recurrent(at_autograd);
}

#if defined(ASGL_WITH_CUDA)
TORCH_LIBRARY_IMPL(asgl_cuda, CUDA, m) { implement_all<CudaBackend>(m); }

TORCH_LIBRARY_IMPL(asgl_cuda, AutogradCUDA, m) {
  ops::AtAutograd at_autograd(m);
  implement_all<CudaBackend>(at_autograd);
  ops::implement_recurrent(at_autograd);
}
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() =
      "asgl_cuda's compiled part: importing it adds kernels to torch.ops.asgl_cuda. Its operators are the same ones.";
  m.def("cpu_threads", &cpu::num_threads, "Threads that the kernels run on; 1 where they were built without OpenMP.");
  m.def("cpu_instruction_set", [] { return cpu::instruction_set_name(); });
  ops::DirectCalls calls(m);
  implement_all<CpuBackend>(calls);
  ops::implement_recurrent(calls);
}

}  // namespace asgl
