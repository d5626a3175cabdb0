#include "cuda/launch_neuron.cuh"
#include "cuda/launch_normalisation.cuh"

namespace asgl::cuda {

template cudaError_t plan_tiles(ForwardParams<BFloat16>&);
template cudaError_t launch(const ForwardParams<BFloat16>&, cudaStream_t);
template cudaError_t plan_tiles(BackwardParams<BFloat16>&);
template cudaError_t launch(const BackwardParams<BFloat16>&, cudaStream_t);
template cudaError_t plan_tiles(MomentsParams<BFloat16>&);
template cudaError_t launch(const MomentsParams<BFloat16>&, cudaStream_t);
template cudaError_t plan_tiles(InputGradientParams<BFloat16>&);
template cudaError_t launch(const InputGradientParams<BFloat16>&, cudaStream_t);

}  // namespace asgl::cuda
