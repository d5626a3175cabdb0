// The CUDA backend's launchers for every type, surrogate and reset.
#include "dispatch.h"
#include "lif_cuda.cuh"

namespace asgl::cuda {

template <class Scalar>
cudaError_t backward_tiles(const BackwardParams<Scalar>& params, TilePlan* plan) {
  int lanes = 1;
  const cudaError_t error = choose_lanes(params, &lanes);
  const int64 tile = int64{lanes} * kBlockThreads;
  *plan = {tile, blocks_for(params.shape.neurons(), tile)};
  return error;
}

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

template <class Real>
cudaError_t launch_gradient_sum(const GradientSum<Real>& sum, cudaStream_t stream) {
  constexpr int64 kManySlots = 256;
  if (sum.slots() >= kManySlots) {
    return launch(&gradient_sum_kernel<Real, true>, sum.elements(), kSumThreads, sum, stream);
  }
  return launch(&gradient_sum_kernel<Real, false>, blocks_for(sum.elements(), kSumThreads), kSumThreads, sum, stream);
}

#define ASGL_INSTANTIATE(Scalar)                                                                       \
  template cudaError_t backward_tiles<Scalar>(const BackwardParams<Scalar>&, TilePlan*);               \
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
