// The CUDA kernels and launchers as they are, for the host's compiler.
#include "lif_cuda.cu"
