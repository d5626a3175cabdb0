// How the CUDA kernels of batch normalisation are launched, for every type.
#include "batch_norm_cuda.h"
#include "batch_norm_kernels.cuh"
#include "lif_cuda.cuh"

namespace asgl::cuda {

template <class Scalar>
ChannelTiles channel_tiles(const ChannelShape& shape, const Scalar* x_seq, const Scalar* grad_x_seq) {
  const bool fours =
      !std::is_same_v<Scalar, double> && shape.inner % 4 == 0 && is_aligned(x_seq) && is_aligned(grad_x_seq);
  const int lanes = fours ? 4 : 1;
  return ChannelTiles::cut(shape, lanes, kBlockThreads, kChannelRowsEach / lanes);
}

template <class Scalar>
cudaError_t launch_moments(const MomentsParams<Scalar>& params, cudaStream_t stream) {
  auto* kernel = &batch_moments_kernel<Scalar, 1>;
  if constexpr (!std::is_same_v<Scalar, double>) {
    if (params.tiles.lanes == 4) kernel = &batch_moments_kernel<Scalar, 4>;
  }
  return launch(kernel, params.tiles.tasks(), kBlockThreads, params, stream);
}

template <class Real>
cudaError_t launch_coefficients(const CoefficientsParams<Real>& params, cudaStream_t stream) {
  return launch(&batch_norm_coefficients_kernel<Real>, params.channels, kBlockThreads, params, stream);
}

template <class Real>
cudaError_t launch_adjoint(const AdjointParams<Real>& params, cudaStream_t stream) {
  const int64 blocks = blocks_for(params.channels, kBlockThreads);
  return launch(&batch_norm_adjoint_kernel<Real>, blocks, kBlockThreads, params, stream);
}

template <class Scalar>
cudaError_t launch_input_gradient(const InputGradientParams<Scalar>& params, cudaStream_t stream) {
  auto* kernel = &batch_norm_input_gradient_kernel<Scalar, 1>;
  if constexpr (!std::is_same_v<Scalar, double>) {
    if (params.tiles.lanes == 4) kernel = &batch_norm_input_gradient_kernel<Scalar, 4>;
  }
  return launch(kernel, params.tiles.tasks(), kBlockThreads, params, stream);
}

#define ASGL_INSTANTIATE(Scalar)                                                                  \
  template ChannelTiles channel_tiles<Scalar>(const ChannelShape&, const Scalar*, const Scalar*); \
  template cudaError_t launch_moments<Scalar>(const MomentsParams<Scalar>&, cudaStream_t);        \
  template cudaError_t launch_input_gradient<Scalar>(const InputGradientParams<Scalar>&, cudaStream_t);
ASGL_INSTANTIATE(Half)
ASGL_INSTANTIATE(BFloat16)
ASGL_INSTANTIATE(float)
ASGL_INSTANTIATE(double)
#undef ASGL_INSTANTIATE
template cudaError_t launch_coefficients<float>(const CoefficientsParams<float>&, cudaStream_t);
template cudaError_t launch_coefficients<double>(const CoefficientsParams<double>&, cudaStream_t);
template cudaError_t launch_adjoint<float>(const AdjointParams<float>&, cudaStream_t);
template cudaError_t launch_adjoint<double>(const AdjointParams<double>&, cudaStream_t);

}  // namespace asgl::cuda
