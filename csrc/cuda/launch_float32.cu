#include "cuda/launch.cuh"

template cudaError_t asgl::cuda::launch_for<float>(const Start&);
