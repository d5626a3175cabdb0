#include "cuda/compiled.cuh"

template cudaError_t asgl::cuda::start_compiled<float>(const KernelStarter&);
