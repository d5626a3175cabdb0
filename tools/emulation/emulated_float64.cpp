#include "cuda/launch_float64.cu"
