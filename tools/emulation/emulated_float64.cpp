#include "cuda/launch_float64.cu"
#include "emulated_table.h"

template void asgl_emulation::KernelTable::add_scalar<double>(const std::string&);
