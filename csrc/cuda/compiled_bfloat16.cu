#include "cuda/compiled.cuh"

template cudaError_t asgl::cuda::start_compiled<asgl::BFloat16>(const KernelStarter&);
