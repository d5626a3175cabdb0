// Registers the operators of ops.h for the backends that this build has, and the small Python module.
#include <torch/extension.h>
#if defined(ASGL_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "batch_norm_ops.h"
#include "cpu_clones.h"
#include "ops.h"
#if defined(ASGL_WITH_CUDA)
#include "batch_norm_cuda.h"
#include "lif_cuda.h"
#endif

namespace asgl {
namespace {

class CpuBackend {
 public:
  explicit CpuBackend(const at::Tensor&) {}

  template <class Scalar>
  TilePlan backward_tiles(const BackwardParams<Scalar>& params) const {
    return cpu::backward_tiles(params.shape);
  }
  template <class Params>
  void launch_forward(Surrogate surrogate, bool hard_reset, const Params& params) const {
    cpu::launch_forward(surrogate, hard_reset, params);
  }
  template <class Params>
  void launch_backward(Surrogate surrogate, bool hard_reset, const Params& params) const {
    cpu::launch_backward(surrogate, hard_reset, params);
  }
  template <class Real>
  void launch_gradient_sum(const GradientSum<Real>& sum) const {
    cpu::launch_gradient_sum(sum);
  }
  template <class Scalar>
  ChannelTiles channel_tiles(const ChannelShape& shape, const Scalar*, const Scalar*) const {
    return cpu::channel_tiles(shape);
  }
  template <class Params>
  void launch_moments(const Params& params) const {
    cpu::launch_moments(params);
  }
  template <class Params>
  void launch_coefficients(const Params& params) const {
    cpu::launch_coefficients(params);
  }
  template <class Params>
  void launch_adjoint(const Params& params) const {
    cpu::launch_adjoint(params);
  }
  template <class Params>
  void launch_input_gradient(const Params& params) const {
    cpu::launch_input_gradient(params);
  }
};

#if defined(ASGL_WITH_CUDA)

// On x_seq's device and its current stream.
class CudaBackend {
 public:
  explicit CudaBackend(const at::Tensor& x_seq)
      : guard_(x_seq.device()), stream_(c10::cuda::getCurrentCUDAStream(x_seq.device().index())) {}

  template <class Scalar>
  TilePlan backward_tiles(const BackwardParams<Scalar>& params) const {
    TilePlan plan{};
    C10_CUDA_CHECK(cuda::backward_tiles(params, &plan));
    return plan;
  }
  template <class Params>
  void launch_forward(Surrogate surrogate, bool hard_reset, const Params& params) const {
    C10_CUDA_CHECK(cuda::launch_forward(surrogate, hard_reset, params, stream_));
  }
  template <class Params>
  void launch_backward(Surrogate surrogate, bool hard_reset, const Params& params) const {
    C10_CUDA_CHECK(cuda::launch_backward(surrogate, hard_reset, params, stream_));
  }
  template <class Real>
  void launch_gradient_sum(const GradientSum<Real>& sum) const {
    C10_CUDA_CHECK(cuda::launch_gradient_sum(sum, stream_));
  }
  template <class Scalar>
  ChannelTiles channel_tiles(const ChannelShape& shape, const Scalar* x_seq, const Scalar* grad_x_seq) const {
    return cuda::channel_tiles(shape, x_seq, grad_x_seq);
  }
  template <class Params>
  void launch_moments(const Params& params) const {
    C10_CUDA_CHECK(cuda::launch_moments(params, stream_));
  }
  template <class Params>
  void launch_coefficients(const Params& params) const {
    C10_CUDA_CHECK(cuda::launch_coefficients(params, stream_));
  }
  template <class Params>
  void launch_adjoint(const Params& params) const {
    C10_CUDA_CHECK(cuda::launch_adjoint(params, stream_));
  }
  template <class Params>
  void launch_input_gradient(const Params& params) const {
    C10_CUDA_CHECK(cuda::launch_input_gradient(params, stream_));
  }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

#endif

}  // namespace

TORCH_LIBRARY_IMPL(asgl_cuda, CPU, m) {
  ops::implement<CpuBackend>(m);
  ops::implement_batch_norm<CpuBackend>(m);
}

#if defined(ASGL_WITH_CUDA)
TORCH_LIBRARY_IMPL(asgl_cuda, CUDA, m) {
  ops::implement<CudaBackend>(m);
  ops::implement_batch_norm<CudaBackend>(m);
}
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build information of asgl_cuda's compiled part; importing it adds kernels to torch.ops.asgl_cuda.";
  m.def("cpu_threads", &cpu::num_threads, "Threads that the kernels run on; 1 where they were built without OpenMP.");
  m.def("cpu_instruction_set", [] { return cpu::instruction_set_name(); });
}

}  // namespace asgl
