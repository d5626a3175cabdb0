// Substitutes the CPU kernels for the CUDA kernels in the latter's tests. Included first.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(ASGL_TEST_BASELINE)  // no clones for other instruction sets: a third of the compile time
#undef __x86_64__
#endif
