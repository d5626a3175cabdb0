#include "cuda/launch_float16.cu"
