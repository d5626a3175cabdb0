// Instantiates the general kernels of cpu/neuron.h for adaptive neurons, in a file of their own so that files compile
// in parallel.
#include "cpu/neuron.h"

namespace asgl::cpu {

template <class Params>
void run_adaptive_kernel(const Params& params) {
  run_general_pass<AdaptiveLIF<typename Params::Real>>(params);
}

template void run_adaptive_kernel(const ForwardParams<Half>&);
template void run_adaptive_kernel(const ForwardParams<BFloat16>&);
template void run_adaptive_kernel(const ForwardParams<float>&);
template void run_adaptive_kernel(const ForwardParams<double>&);
template void run_adaptive_kernel(const BackwardParams<Half>&);
template void run_adaptive_kernel(const BackwardParams<BFloat16>&);
template void run_adaptive_kernel(const BackwardParams<float>&);
template void run_adaptive_kernel(const BackwardParams<double>&);

}  // namespace asgl::cpu
