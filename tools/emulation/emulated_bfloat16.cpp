#include "cuda/launch_bfloat16.cu"
