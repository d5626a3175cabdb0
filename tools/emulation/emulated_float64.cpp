#include "cuda/compiled_float64.cu"
