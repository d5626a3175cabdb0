#include "cuda/launch.cuh"

namespace asgl::cuda {

template cudaError_t cut(ForwardParams<BFloat16>&);
template cudaError_t launch(const ForwardParams<BFloat16>&, cudaStream_t);
template cudaError_t cut(BackwardParams<BFloat16>&);
template cudaError_t launch(const BackwardParams<BFloat16>&, cudaStream_t);
template cudaError_t cut(MomentsParams<BFloat16>&);
template cudaError_t launch(const MomentsParams<BFloat16>&, cudaStream_t);
template cudaError_t cut(InputGradientParams<BFloat16>&);
template cudaError_t launch(const InputGradientParams<BFloat16>&, cudaStream_t);

}  // namespace asgl::cuda
