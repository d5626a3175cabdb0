#include "cuda/launch.cuh"

template cudaError_t asgl::cuda::launch_for<asgl::Half>(const Start&);
