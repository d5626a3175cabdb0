// Definitions of plan_tiles and launch (cpu/kernels.h), for the files that instantiate them: each calls the overload
// of plan_tiles_on or launch_kernel for its params. The argument Device makes argument-dependent lookup find overloads
// that are declared later.
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
