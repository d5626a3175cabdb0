// Included first, the CPU's kernels have no clones for other instruction sets: a third of the time to compile. The
// standard headers stay as they are.
#pragma once

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

#undef __x86_64__
