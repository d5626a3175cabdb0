// Defines plan_tiles and launch (cpu/kernels.h) for the files that instantiate these templates. plan_tiles calls the
// overload of plan_tiles_on for its params, and launch that of launch_kernel. The argument Device makes
// argument-dependent lookup find overloads that are declared later.
#pragma once

#include "cpu/kernels.h"

namespace asgl::cpu {

struct Device {};

template <class Params>
void plan_tiles(Params& params) {
  plan_tiles_on(Device{}, params);
}

template <class Params>
void launch(const Params& params) {
  launch_kernel(Device{}, params);
}

}  // namespace asgl::cpu
