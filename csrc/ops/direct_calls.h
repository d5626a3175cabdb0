// The operators as functions of the Python module. Unlike torch.ops they skip two things. One is the check of each
// argument for __torch_function__, which takes a tenth of all instructions of a training step on a tiny input. The
// other is torch's autograd, which would box all arguments only to find no derivative: callers have a
// torch.autograd.Function, or nothing to differentiate.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/extension.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "ops/call.h"

namespace asgl::ops {

// The type to which pybind11 converts a Python argument, and the conversion from this type to that of the operator.
template <class Argument>
struct FromPython {
  using type = std::decay_t<Argument>;
  static type& convert(type& given) { return given; }
};
template <class Element>
struct FromPython<at::ArrayRef<Element>> {
  using type = std::vector<Element>;
  static at::ArrayRef<Element> convert(const type& given) { return given; }
};

// Has the interface of torch::Library, but exports each operator of a namespace as a pybind11 function. Only the type
// of the kernel that `impl` gets is used: the dispatcher chooses the kernel at each call.
class __attribute__((visibility("hidden"))) DirectCalls {  // as its fields are
 public:
  // The functions become attributes of `scope`.
  DirectCalls(pybind11::object scope, std::string name_space) : scope_(std::move(scope)), namespace_(name_space) {}

  // Exports the operator of this name.
  template <class Kernel>
  void impl(const char* name, const Kernel&) {
    export_operator(name, &Kernel::operator());
  }

 private:
  // Exports the operator of this name, whose result and arguments have the types of the kernel's.
  template <class Kernel, class Result, class... Arguments>
  void export_operator(const char* name, Result (Kernel::*)(Arguments...) const) {
    const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow((namespace_ + "::" + name).c_str(), "");
    const auto call = [typed = handle.typed<Result(Arguments...)>()](typename FromPython<Arguments>::type... given) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      try {
        return typed.call(FromPython<Arguments>::convert(given)...);
      } catch (const std::invalid_argument& error) {  // code without torch throws these
        TORCH_CHECK_VALUE(false, error.what());
      }
    };
    pybind11::setattr(scope_, name,
                      pybind11::cpp_function(torch::wrap_pybind_function_no_gil(call), pybind11::name(name)));
  }

  pybind11::object scope_;
  std::string namespace_;
};

}  // namespace asgl::ops
