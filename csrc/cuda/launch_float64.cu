#include "cuda/launch.cuh"

namespace asgl::cuda {

template cudaError_t cut(ForwardParams<double>&);
template cudaError_t launch(const ForwardParams<double>&, cudaStream_t);
template cudaError_t cut(BackwardParams<double>&);
template cudaError_t launch(const BackwardParams<double>&, cudaStream_t);
template cudaError_t cut(MomentsParams<double>&);
template cudaError_t launch(const MomentsParams<double>&, cudaStream_t);
template cudaError_t cut(InputGradientParams<double>&);
template cudaError_t launch(const InputGradientParams<double>&, cudaStream_t);
template cudaError_t cut(GradientSum<double>&);
template cudaError_t launch(const GradientSum<double>&, cudaStream_t);
template cudaError_t launch(const CoefficientsParams<double>&, cudaStream_t);
template cudaError_t launch(const RunningParams<double>&, cudaStream_t);
template cudaError_t launch(const AdjointParams<double>&, cudaStream_t);

}  // namespace asgl::cuda
