// The CUDA kernels and launchers as they are, for the host's compiler, and the kernels by the names that a run-time
// compiler is asked for.
#include "emulated_kernels.h"

#include "cuda/launch.cu"

namespace asgl_emulation {
namespace {

using namespace asgl;

class Kernels {
 public:
  Kernels() {
    add_scalar<Half>("asgl::Half");
    add_scalar<BFloat16>("asgl::BFloat16");
    add_scalar<float>("float");
    add_scalar<double>("double");
    add_real<float>("float");
    add_real<double>("double");
  }

  static const Kernels& table() {
    static const Kernels the_table;
    return the_table;
  }

  const EmulatedKernel* find(const std::string& name) const {
    const auto found = by_name_.find(name);
    return found == by_name_.end() ? nullptr : &found->second;
  }
  const char* name_of(const void* address) const {
    const auto found = names_.find(address);
    return found == names_.end() ? "" : found->second.c_str();
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

  template <class Scalar>
  void add_scalar(const std::string& scalar) {
    add("asgl::batch_moments_kernel<" + scalar + ", 1>", &batch_moments_kernel<Scalar, 1>);
    add("asgl::batch_norm_input_gradient_kernel<" + scalar + ", 1>", &batch_norm_input_gradient_kernel<Scalar, 1>);
    if constexpr (!std::is_same_v<Scalar, double>) {
      add("asgl::batch_moments_kernel<" + scalar + ", 4>", &batch_moments_kernel<Scalar, 4>);
      add("asgl::batch_norm_input_gradient_kernel<" + scalar + ", 4>", &batch_norm_input_gradient_kernel<Scalar, 4>);
    }
    for (int surrogate = 0; surrogate < kNumSurrogates; ++surrogate) {
      for (const bool hard_reset : {false, true}) {
        NeuronOptions<float> options{};
        options.surrogate = static_cast<Surrogate>(surrogate);
        options.hard_reset = hard_reset;
        const std::string name =
            "asgl::LIF<(asgl::Surrogate)" + std::to_string(surrogate) + (hard_reset ? ", true>" : ", false>");
        with_model(options, [&](auto model) { add_model<Scalar, decltype(model)>("<" + scalar + ", " + name); });
      }
    }
  }

  template <class Scalar, class Model>
  void add_model(const std::string& kinds) {
    const auto forward = "asgl::lif_forward_kernel" + kinds, backward = "asgl::lif_backward_kernel" + kinds;
    add(forward + ", 1, (asgl::Input)0>", &lif_forward_kernel<Scalar, Model, 1, Input::kGeneral>);
    add(backward + ", 1>", &lif_backward_kernel<Scalar, Model, 1>);
    if constexpr (!std::is_same_v<Scalar, double>) {
      add(forward + ", 4, (asgl::Input)0>", &lif_forward_kernel<Scalar, Model, 4, Input::kGeneral>);
      add(backward + ", 4>", &lif_backward_kernel<Scalar, Model, 4>);
      add_uniform<Scalar, Model, Input::kNormalised>(kinds, ", (asgl::Input)1>");
      add_uniform<Scalar, Model, Input::kPlain>(kinds, ", (asgl::Input)2>");
    }
  }

  template <class Scalar, class Model, Input kInput>
  void add_uniform(const std::string& kinds, const std::string& input) {
    const auto forward = "asgl::lif_forward_kernel" + kinds, backward = "asgl::lif_backward_uniform_kernel" + kinds;
    add(forward + ", 4" + input, &lif_forward_kernel<Scalar, Model, 4, kInput>);
    add(backward + ", 4" + input, &lif_backward_uniform_kernel<Scalar, Model, 4, kInput>);
    add(backward + ", 8" + input, &lif_backward_uniform_kernel<Scalar, Model, 8, kInput>);
    add(backward + ", 16" + input, &lif_backward_uniform_kernel<Scalar, Model, 16, kInput>);
  }

  template <class Real>
  void add_real(const std::string& real) {
    add("asgl::batch_norm_coefficients_kernel<" + real + ">", &batch_norm_coefficients_kernel<Real>);
    add("asgl::batch_norm_running_kernel<" + real + ">", &batch_norm_running_kernel<Real>);
    add("asgl::batch_norm_adjoint_kernel<" + real + ">", &batch_norm_adjoint_kernel<Real>);
    add("asgl::gradient_sum_kernel<" + real + ">", &gradient_sum_kernel<Real>);
  }

  std::map<std::string, EmulatedKernel> by_name_;
  std::map<const void*, std::string> names_;
};

}  // namespace

const EmulatedKernel* find_kernel(const char* name) { return Kernels::table().find(name); }

const char* kernel_name(const void* address) { return Kernels::table().name_of(address); }

}  // namespace asgl_emulation
