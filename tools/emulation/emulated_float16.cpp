#include "cuda/launch_float16.cu"
#include "emulated_table.h"

template void asgl_emulation::KernelTable::add_scalar<asgl::Half>(const std::string&);
