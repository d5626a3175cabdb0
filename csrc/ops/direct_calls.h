// The operators as functions of the Python module, which call torch's dispatcher as torch.ops does, except that they do
// not ask each argument, and the first element of each list, whether it overrides torch's functions. That question is
// slowest for what is no tensor: in a training step on a tiny input it took a tenth of all instructions. Nor do they
// pass by autograd, which would box all arguments to find that the operator has no derivative: whoever calls them has
// a torch.autograd.Function around them, or nothing to differentiate.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/extension.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "ops/neuron.h"

namespace asgl::ops {

// What pybind11 makes of an argument from Python, and how an operator takes it.
template <class Argument>
struct FromPython {
  using type = std::decay_t<Argument>;
  static type& taken(type& given) { return given; }
};
template <class Element>
struct FromPython<at::ArrayRef<Element>> {
  using type = std::vector<Element>;
  static at::ArrayRef<Element> taken(const type& given) { return given; }
};
template <>
struct FromPython<const c10::List<OptionalTensor>&> {
  using type = std::vector<OptionalTensor>;
  static c10::List<OptionalTensor> taken(const type& given) {
    c10::List<OptionalTensor> list;
    list.reserve(given.size());
    for (const OptionalTensor& tensor : given) list.push_back(tensor);
    return list;
  }
};

// It stands in for a library: what is registered there as the kernel of an operator, which asgl_cuda/ops.py has
// defined, Python can call here. The kernel says no more than the types; which one runs the dispatcher chooses.
class DirectCalls {
 public:
  explicit DirectCalls(pybind11::module_& m) : module_(m) {}

  template <class Result, class... Arguments>
  void impl(const char* name, Result (*)(Arguments...)) {
    const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("asgl_cuda::") + name).c_str(), "");
    const auto call = [typed = handle.typed<Result(Arguments...)>()](typename FromPython<Arguments>::type... given) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      try {
        return typed.call(FromPython<Arguments>::taken(given)...);
      } catch (const std::invalid_argument& error) {  // of code that knows no torch; it would be a RuntimeError
        TORCH_CHECK_VALUE(false, error.what());
      }
    };
    module_.def(name, torch::wrap_pybind_function_no_gil(call));
  }

 private:
  pybind11::module_& module_;
};

}  // namespace asgl::ops
