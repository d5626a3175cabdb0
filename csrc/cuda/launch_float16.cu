#include "cuda/launch_neuron.cuh"
#include "cuda/launch_normalisation.cuh"

namespace asgl::cuda {

template cudaError_t plan_tiles(ForwardParams<Half>&);
template cudaError_t launch(const ForwardParams<Half>&, cudaStream_t);
template cudaError_t plan_tiles(BackwardParams<Half>&);
template cudaError_t launch(const BackwardParams<Half>&, cudaStream_t);
template cudaError_t plan_tiles(MomentsParams<Half>&);
template cudaError_t launch(const MomentsParams<Half>&, cudaStream_t);
template cudaError_t plan_tiles(InputGradientParams<Half>&);
template cudaError_t launch(const InputGradientParams<Half>&, cudaStream_t);

}  // namespace asgl::cuda
