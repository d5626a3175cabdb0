#include "cuda/launch.cuh"

template cudaError_t asgl::cuda::launch_for<double>(const Start&);
