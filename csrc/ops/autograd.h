// Kernels for torch's autograd keys. A call without gradients is redispatched to the backend. Every other call goes to
// the Python kernel of asgl_cuda/backends/derivatives.py. If all calls went there, each call of a compiled graph would
// take 8 us more.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

namespace asgl::ops {

// Whether autograd differentiates a call with this tensor: in reverse mode, or in forward mode, which the Python kernel
// refuses.
inline bool is_differentiated(const at::Tensor& tensor) {
  return (tensor.requires_grad() && at::GradMode::is_enabled()) || tensor._fw_grad(/*level=*/0).defined();
}

// Calls the Python kernel if autograd differentiates the call, else the kernel of the backend.
inline void autograd_or_redispatch(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor() && is_differentiated(argument.toTensor())) {
      return op.callBoxedForDispatchKey(c10::DispatchKey::Autograd, *stack);
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

// Has the interface of torch::Library, but registers autograd_or_redispatch instead of the given kernel.
class AutogradLibrary {
 public:
  explicit AutogradLibrary(torch::Library& m) : library_(m) {}

  template <class Kernel>
  void impl(const char* name, Kernel&&) {
    library_.impl(name, torch::CppFunction::makeFromBoxedFunction<&autograd_or_redispatch>());
  }

 private:
  torch::Library& library_;
};

}  // namespace asgl::ops
