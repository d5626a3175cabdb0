#include "cuda/launch.cuh"

namespace asgl::cuda {

template cudaError_t cut(ForwardParams<Half>&);
template cudaError_t launch(const ForwardParams<Half>&, cudaStream_t);
template cudaError_t cut(BackwardParams<Half>&);
template cudaError_t launch(const BackwardParams<Half>&, cudaStream_t);
template cudaError_t cut(MomentsParams<Half>&);
template cudaError_t launch(const MomentsParams<Half>&, cudaStream_t);
template cudaError_t cut(InputGradientParams<Half>&);
template cudaError_t launch(const InputGradientParams<Half>&, cudaStream_t);

}  // namespace asgl::cuda
