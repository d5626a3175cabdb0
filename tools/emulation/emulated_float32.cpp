#include "cuda/launch_float32.cu"
#include "emulated_table.h"

template void asgl_emulation::KernelTable::add_scalar<float>(const std::string&);
