#include "cuda/launch_float32.cu"
