#include "cuda/launch_neuron.cuh"
#include "cuda/launch_normalisation.cuh"

namespace asgl::cuda {

template cudaError_t plan_tiles(ForwardParams<double>&);
template cudaError_t launch(const ForwardParams<double>&, cudaStream_t);
template cudaError_t plan_tiles(BackwardParams<double>&);
template cudaError_t launch(const BackwardParams<double>&, cudaStream_t);
template cudaError_t plan_tiles(MomentsParams<double>&);
template cudaError_t launch(const MomentsParams<double>&, cudaStream_t);
template cudaError_t plan_tiles(InputGradientParams<double>&);
template cudaError_t launch(const InputGradientParams<double>&, cudaStream_t);
template cudaError_t plan_tiles(GradientSum<double>&);
template cudaError_t launch(const GradientSum<double>&, cudaStream_t);
template cudaError_t launch(const CoefficientsParams<double>&, cudaStream_t);
template cudaError_t launch(const RunningParams<double>&, cudaStream_t);
template cudaError_t launch(const AdjointParams<double>&, cudaStream_t);

}  // namespace asgl::cuda
