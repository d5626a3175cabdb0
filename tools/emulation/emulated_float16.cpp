#include "cuda/compiled_float16.cu"
