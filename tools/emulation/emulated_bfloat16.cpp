#include "cuda/compiled_bfloat16.cu"
