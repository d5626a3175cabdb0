// The kernels by their NVRTC names. Those of each type are instantiated in a file of their own, emulated_<type>.cpp,
// which compile in parallel.
#pragma once

#include "cuda/adaptive_kernels.cuh"
#include "cuda/integrator_kernels.cuh"
#include "cuda/neuron_kernels.cuh"
#include "cuda/normalisation_kernels.cuh"
#include "emulated_kernels.h"
#include "launch.h"

namespace asgl_emulation {

using namespace asgl;

class KernelTable {
 public:
  const EmulatedKernel* find(const std::string& name) const {
    const auto found = by_name_.find(name);
    return found == by_name_.end() ? nullptr : &found->second;
  }
  const char* name_of(const void* address) const {
    const auto found = names_.find(address);
    return found == names_.end() ? "" : found->second.c_str();
  }

  template <class Scalar>
  void add_scalar(const std::string& scalar) {
    add("asgl::batch_moments_kernel<" + scalar + ", 1>", &batch_moments_kernel<Scalar, 1>);
    add_input_gradient<Scalar, 1>("<" + scalar + ", 1, ");
    if constexpr (!std::is_same_v<Scalar, double>) {
      add("asgl::batch_moments_kernel<" + scalar + ", 4>", &batch_moments_kernel<Scalar, 4>);
      add_input_gradient<Scalar, 4>("<" + scalar + ", 4, ");
      add_integrator<Scalar, 4>("<" + scalar + ", 4");
    }
    add_integrator<Scalar, 1>("<" + scalar + ", 1");
    add("asgl::adaptive_forward_kernel<" + scalar + ">", &adaptive_forward_kernel<Scalar>);
    add("asgl::adaptive_backward_kernel<" + scalar + ">", &adaptive_backward_kernel<Scalar>);
    add_general<Scalar, 1, Input::kGeneral>(scalar, "1", "0");
    add_general<Scalar, 1, Input::kGeneralResidual>(scalar, "1", "4");
    if constexpr (!std::is_same_v<Scalar, double>) {
      add_general<Scalar, 4, Input::kGeneral>(scalar, "4", "0");
      add_general<Scalar, 4, Input::kGeneralResidual>(scalar, "4", "4");
    }
    for (int surrogate = 0; surrogate < kNumSurrogates; ++surrogate) {
      for (const bool hard_reset : {false, true}) {
        if (hard_reset && surrogate == static_cast<int>(Surrogate::kInteger)) continue;
        LIFByOptions<float> options{};
        options.surrogate = static_cast<Surrogate>(surrogate);
        options.hard_reset = hard_reset;
        const std::string name =
            "asgl::LIF<(asgl::Surrogate)" + std::to_string(surrogate) + (hard_reset ? ", true>" : ", false>");
        with_model(options, [&](auto model) {
          using Model = decltype(model);
          if constexpr (!Model::kOnlyGeneral) add_model<Scalar, Model>("<" + scalar + ", " + name);
        });
      }
    }
  }

  template <class Real>
  void add_real(const std::string& real) {
    add("asgl::batch_norm_coefficients_kernel<" + real + ">", &batch_norm_coefficients_kernel<Real>);
    add("asgl::batch_norm_running_kernel<" + real + ">", &batch_norm_running_kernel<Real>);
    add("asgl::batch_norm_adjoint_kernel<" + real + ">", &batch_norm_adjoint_kernel<Real>);
    add("asgl::gradient_sum_kernel<" + real + ">", &gradient_sum_kernel<Real>);
  }

 private:
  template <class Params>
  void add(const std::string& name, void (*kernel)(Params)) {
    const auto launch = [kernel](unsigned blocks, unsigned threads, const void* params) {
      void* arguments[] = {const_cast<void*>(params)};
      return cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), arguments);
    };
    by_name_[name] = {sizeof(Params), launch};
    names_[reinterpret_cast<const void*>(kernel)] = name;
  }

  template <class Scalar, int kLanes>
  void add_input_gradient(const std::string& kinds) {
    const std::string name = "asgl::batch_norm_input_gradient_kernel" + kinds;
    add(name + "false>", &batch_norm_input_gradient_kernel<Scalar, kLanes, false>);
    add(name + "true>", &batch_norm_input_gradient_kernel<Scalar, kLanes, true>);
  }

  template <class Scalar, int kLanes>
  void add_integrator(const std::string& kinds) {
    add("asgl::integrator_kernel" + kinds + ", (asgl::Pass)0>", &integrator_kernel<Scalar, kLanes, Pass::kForward>);
    add("asgl::integrator_kernel" + kinds + ", (asgl::Pass)1>", &integrator_kernel<Scalar, kLanes, Pass::kBackward>);
    add("asgl::integrator_kernel" + kinds + ", (asgl::Pass)2>", &integrator_kernel<Scalar, kLanes, Pass::kSums>);
  }

  template <class Scalar, class Model>
  void add_model(const std::string& kinds) {
    add_settled<Scalar, Model, 1, Input::kNormalised>(kinds + ", 1", ", (asgl::Input)1");
    if constexpr (!std::is_same_v<Scalar, double>) {
      add_fours<Scalar, Model, Input::kNormalised>(kinds + ", 4", ", (asgl::Input)1");
      add_fours<Scalar, Model, Input::kPlain>(kinds + ", 4", ", (asgl::Input)2");
      add_fours<Scalar, Model, Input::kNormalisedResidual>(kinds + ", 4", ", (asgl::Input)3");
      add_fours<Scalar, Model, Input::kApart>(kinds + ", 4", ", (asgl::Input)5");
    }
  }

  template <class Scalar, int kLanes, Input kInput>
  void add_general(const std::string& scalar, const std::string& lanes, const std::string& input) {
    const std::string real = std::is_same_v<Scalar, double> ? "double" : "float";
    const std::string kinds = lanes + ", (asgl::Input)" + input;
    add(kForward + "<" + scalar + ", asgl::LIFByOptions<" + real + ">, " + kinds + ", 0>",
        &lif_forward_kernel<Scalar, LIFByOptions<Real_t<Scalar>>, kLanes, kInput, 0>);
    add("asgl::lif_backward_kernel<" + scalar + ", " + kinds + ">", &lif_backward_kernel<Scalar, kLanes, kInput>);
  }

  template <class Scalar, class Model, int kLanes, Input kInput>
  void add_settled(const std::string& kinds, const std::string& input) {
    add(kForward + kinds + input + ", 0>", &lif_forward_kernel<Scalar, Model, kLanes, kInput, 0>);
    add(kSettled + kinds + input + ", 0>", &lif_backward_settled_kernel<Scalar, Model, kLanes, kInput, 0>);
  }

  template <class Scalar, class Model, Input kInput>
  void add_fours(const std::string& kinds, const std::string& input) {
    add_settled<Scalar, Model, 4, kInput>(kinds, input);
    add(kForward + kinds + input + ", 4>", &lif_forward_kernel<Scalar, Model, 4, kInput, 4>);
    add(kSettled + kinds + input + ", 4>", &lif_backward_settled_kernel<Scalar, Model, 4, kInput, 4>);
  }

  const std::string kForward = "asgl::lif_forward_kernel", kSettled = "asgl::lif_backward_settled_kernel";
  std::map<std::string, EmulatedKernel> by_name_;
  std::map<const void*, std::string> names_;
};

extern template void KernelTable::add_scalar<Half>(const std::string&);
extern template void KernelTable::add_scalar<BFloat16>(const std::string&);
extern template void KernelTable::add_scalar<float>(const std::string&);
extern template void KernelTable::add_scalar<double>(const std::string&);

}  // namespace asgl_emulation
