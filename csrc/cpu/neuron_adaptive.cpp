// Instantiates the general kernels of cpu/neuron.h for adaptive neurons, in a file of their own so that files compile
// in parallel.
#include "cpu/neuron.h"

namespace asgl::cpu {

template <class Params>
void run_adaptive(const Params& params) {
  run_general<AdaptiveLIF<typename Params::Real>>(params);
}

template void run_adaptive(const ForwardParams<Half>&);
template void run_adaptive(const ForwardParams<BFloat16>&);
template void run_adaptive(const ForwardParams<float>&);
template void run_adaptive(const ForwardParams<double>&);
template void run_adaptive(const BackwardParams<Half>&);
template void run_adaptive(const BackwardParams<BFloat16>&);
template void run_adaptive(const BackwardParams<float>&);
template void run_adaptive(const BackwardParams<double>&);

}  // namespace asgl::cpu
