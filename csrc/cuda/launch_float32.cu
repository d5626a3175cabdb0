#include "cuda/launch_neuron.cuh"
#include "cuda/launch_normalisation.cuh"

namespace asgl::cuda {

template cudaError_t plan_tiles(ForwardParams<float>&);
template cudaError_t launch(const ForwardParams<float>&, cudaStream_t);
template cudaError_t plan_tiles(BackwardParams<float>&);
template cudaError_t launch(const BackwardParams<float>&, cudaStream_t);
template cudaError_t plan_tiles(MomentsParams<float>&);
template cudaError_t launch(const MomentsParams<float>&, cudaStream_t);
template cudaError_t plan_tiles(InputGradientParams<float>&);
template cudaError_t launch(const InputGradientParams<float>&, cudaStream_t);
template cudaError_t plan_tiles(GradientSum<float>&);
template cudaError_t launch(const GradientSum<float>&, cudaStream_t);
template cudaError_t launch(const CoefficientsParams<float>&, cudaStream_t);
template cudaError_t launch(const RunningParams<float>&, cudaStream_t);
template cudaError_t launch(const AdjointParams<float>&, cudaStream_t);

}  // namespace asgl::cuda
