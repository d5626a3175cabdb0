#include "cuda/compiled_float32.cu"
