// The CUDA backend's launchers for every type, surrogate and reset.
#include "dispatch.h"
#include "lif_cuda.cuh"

namespace asgl::cuda {

template <class Scalar>
cudaError_t launch_forward(Surrogate surrogate, bool hard_reset, const ForwardParams<Scalar>& params,
                           cudaStream_t stream) {
  return with_surrogate(surrogate, [&](auto kind) {
    return with_bool(hard_reset, [&](auto hard) { return launch_forward<kind, hard>(params, stream); });
  });
}

template <class Scalar>
cudaError_t launch_backward(Surrogate surrogate, bool hard_reset, const BackwardParams<Scalar>& params,
                            cudaStream_t stream) {
  return with_surrogate(surrogate, [&](auto kind) {
    return with_bool(hard_reset, [&](auto hard) { return launch_backward<kind, hard>(params, stream); });
  });
}

#define ASGL_INSTANTIATE(Scalar)                                                                            \
  template cudaError_t backward_tiles<Scalar>(const BackwardParams<Scalar>&, TilePlan*);                    \
  template cudaError_t launch_forward<Scalar>(Surrogate, bool, const ForwardParams<Scalar>&, cudaStream_t); \
  template cudaError_t launch_backward<Scalar>(Surrogate, bool, const BackwardParams<Scalar>&, cudaStream_t);
ASGL_INSTANTIATE(Half)
ASGL_INSTANTIATE(BFloat16)
ASGL_INSTANTIATE(float)
ASGL_INSTANTIATE(double)
#undef ASGL_INSTANTIATE
template cudaError_t launch_gradient_sum<float>(const GradientSum<float>&, cudaStream_t);
template cudaError_t launch_gradient_sum<double>(const GradientSum<double>&, cudaStream_t);

}  // namespace asgl::cuda
