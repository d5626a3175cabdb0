#include "cuda/launch_bfloat16.cu"
#include "emulated_table.h"

template void asgl_emulation::KernelTable::add_scalar<asgl::BFloat16>(const std::string&);
