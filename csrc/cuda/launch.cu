// The CUDA launchers for every type and model.
#include "cuda/choose.cuh"
#include "launch.h"

namespace asgl::cuda {

template <class Scalar>
cudaError_t launch(const ForwardParams<Scalar>& params, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_model(params.options, [&](auto model) { error = launch(model, params, stream); });
  return error;
}

template <class Scalar>
cudaError_t launch(const BackwardParams<Scalar>& params, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_model(params.options, [&](auto model) { error = launch(model, params, stream); });
  return error;
}

template cudaError_t cut(ForwardParams<Half>&);
template cudaError_t launch(const ForwardParams<Half>&, cudaStream_t);
template cudaError_t cut(BackwardParams<Half>&);
template cudaError_t launch(const BackwardParams<Half>&, cudaStream_t);
template cudaError_t cut(MomentsParams<Half>&);
template cudaError_t launch(const MomentsParams<Half>&, cudaStream_t);
template cudaError_t cut(InputGradientParams<Half>&);
template cudaError_t launch(const InputGradientParams<Half>&, cudaStream_t);
template cudaError_t cut(ForwardParams<BFloat16>&);
template cudaError_t launch(const ForwardParams<BFloat16>&, cudaStream_t);
template cudaError_t cut(BackwardParams<BFloat16>&);
template cudaError_t launch(const BackwardParams<BFloat16>&, cudaStream_t);
template cudaError_t cut(MomentsParams<BFloat16>&);
template cudaError_t launch(const MomentsParams<BFloat16>&, cudaStream_t);
template cudaError_t cut(InputGradientParams<BFloat16>&);
template cudaError_t launch(const InputGradientParams<BFloat16>&, cudaStream_t);
template cudaError_t cut(ForwardParams<float>&);
template cudaError_t launch(const ForwardParams<float>&, cudaStream_t);
template cudaError_t cut(BackwardParams<float>&);
template cudaError_t launch(const BackwardParams<float>&, cudaStream_t);
template cudaError_t cut(MomentsParams<float>&);
template cudaError_t launch(const MomentsParams<float>&, cudaStream_t);
template cudaError_t cut(InputGradientParams<float>&);
template cudaError_t launch(const InputGradientParams<float>&, cudaStream_t);
template cudaError_t cut(ForwardParams<double>&);
template cudaError_t launch(const ForwardParams<double>&, cudaStream_t);
template cudaError_t cut(BackwardParams<double>&);
template cudaError_t launch(const BackwardParams<double>&, cudaStream_t);
template cudaError_t cut(MomentsParams<double>&);
template cudaError_t launch(const MomentsParams<double>&, cudaStream_t);
template cudaError_t cut(InputGradientParams<double>&);
template cudaError_t launch(const InputGradientParams<double>&, cudaStream_t);
template cudaError_t cut(GradientSum<float>&);
template cudaError_t launch(const GradientSum<float>&, cudaStream_t);
template cudaError_t launch(const CoefficientsParams<float>&, cudaStream_t);
template cudaError_t launch(const RunningParams<float>&, cudaStream_t);
template cudaError_t launch(const AdjointParams<float>&, cudaStream_t);
template cudaError_t cut(GradientSum<double>&);
template cudaError_t launch(const GradientSum<double>&, cudaStream_t);
template cudaError_t launch(const CoefficientsParams<double>&, cudaStream_t);
template cudaError_t launch(const RunningParams<double>&, cudaStream_t);
template cudaError_t launch(const AdjointParams<double>&, cudaStream_t);

}  // namespace asgl::cuda
