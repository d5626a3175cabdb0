// What the tests of the CPU kernels are compiled with.
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

#if defined(ASGL_TEST_BASELINE)  // without the clones for other instruction sets, which take two thirds of the time
#undef __x86_64__
#endif

#include "host_device.h"

namespace asgl {

constexpr int kBlockThreads = 128;

namespace cuda {

inline int64 blocks_for(int64 work, int64 per_block) { return (work + per_block - 1) / per_block; }

}  // namespace cuda
}  // namespace asgl
