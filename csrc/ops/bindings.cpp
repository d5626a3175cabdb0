// Registers the operators of this folder for the CPU, and for CUDA if the build has its kernels. Defines the Python
// module, whose function `implement` registers the operators for kernels that Python starts.
#include <torch/extension.h>
#if defined(ASGL_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "cpu/clones.h"
#if defined(ASGL_WITH_CUDA)
#include "cuda/start.cuh"
#endif
#include "ops/autograd.h"
#include "ops/direct_calls.h"
#include "ops/integrator.h"
#include "ops/neuron.h"
#include "ops/normalisation.h"
#include "ops/recurrent_steps.h"
#include "ops/spikes.h"

namespace asgl {
namespace {

// Registers the operators that every backend has, with the kernels that `launcher` starts, or with the CPU kernels if
// it is null. `library` is a torch::Library or has its interface.
template <class Library>
void register_backend_operators(Library& library, const ops::Launcher* launcher) {
  ops::register_neuron_operators(library, launcher);
  ops::register_integrator_operators(library, launcher);
  ops::register_batch_norm_operators(library, launcher);
  ops::register_recurrent_operators(library, launcher);
}

// Starts kernels by the Python function `launch` (asgl_cuda/backends/launcher.py), which gets the address of `params`
// as an integer. The class has hidden visibility, because its fields have a type of pybind11, which is hidden.
class __attribute__((visibility("hidden"))) PythonLauncher : public ops::Launcher {
 public:
  PythonLauncher(pybind11::object launch, pybind11::object resident_threads)
      : launch_(std::move(launch)), resident_threads_(std::move(resident_threads)) {}

  int64_t resident_threads(at::Device device) const override {
    const pybind11::gil_scoped_acquire gil;
    return resident_threads_(device).cast<int64_t>();
  }

  void launch(at::Device device, const cuda::Launch& launch, const void* params, size_t bytes) const override {
    const pybind11::gil_scoped_acquire gil;
    launch_(device, cuda::name_expression(launch.kernel), launch.blocks, launch.threads,
            reinterpret_cast<uintptr_t>(params), bytes);
  }

 private:
  pybind11::object launch_, resident_threads_;
};

#if defined(ASGL_WITH_CUDA)
// Starts the kernels that nvcc compiled.
class CompiledLauncher : public ops::Launcher {
 public:
  int64_t resident_threads(at::Device device) const override {
    int multiprocessors = 0, threads_each = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device.index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&threads_each, cudaDevAttrMaxThreadsPerMultiProcessor, device.index()));
    return static_cast<int64_t>(multiprocessors) * threads_each;
  }

  void launch(at::Device device, const cuda::Launch& launch, const void* params, size_t) const override {
    C10_CUDA_CHECK(cuda::launch(launch, params, c10::cuda::getCurrentCUDAStream(device.index())));
  }
};

const CompiledLauncher compiled_launcher;
#endif

// Registers implementations of the operators that Python has defined in a namespace, and their autograd kernels, for
// tensors on `device`, "CPU" or "CUDA". Of the two Python functions (asgl_cuda/backends/launcher.py), `launch` starts a
// kernel, and `resident_threads` returns the number of threads that a device can hold at a time. Returns an object with
// the operators as functions (direct_calls.h).
pybind11::object implement(const std::string& name_space, const std::string& device, pybind11::object launch,
                           pybind11::object resident_threads) {
  // The launcher and the libraries are never deleted. The launcher holds Python objects, and when the process ends
  // there is no interpreter to release them.
  const auto* launcher = new PythonLauncher(std::move(launch), std::move(resident_threads));
  const auto library = [&](const std::string& key) {
    return new torch::Library(torch::Library::IMPL, name_space, c10::parseDispatchKey(key), __FILE__, __LINE__);
  };
  register_backend_operators(*library(device), launcher);
  ops::AutogradLibrary autograd_library(*library("Autograd" + device));
  register_backend_operators(autograd_library, launcher);
  const pybind11::object functions = pybind11::module_::import("types").attr("SimpleNamespace")();
  ops::DirectCalls calls(functions, name_space);
  register_backend_operators(calls, launcher);
  return functions;
}

// The number of threads that the CPU kernels run on. Without OpenMP at::parallel_for is silently serial.
int num_cpu_threads() {
#if defined(_OPENMP)
  return at::get_num_threads();
#else
  return 1;
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(asgl_cuda, CPU, m) {
  register_backend_operators(m, nullptr);
  ops::register_spike_operators(m);
}

TORCH_LIBRARY_IMPL(asgl_cuda, AutogradCPU, m) {
  ops::AutogradLibrary autograd_library(m);
  register_backend_operators(autograd_library, nullptr);
  ops::register_spike_operators(autograd_library);
}

#if defined(ASGL_WITH_CUDA)
TORCH_LIBRARY_IMPL(asgl_cuda, CUDA, m) { register_backend_operators(m, &compiled_launcher); }

TORCH_LIBRARY_IMPL(asgl_cuda, AutogradCUDA, m) {
  ops::AutogradLibrary autograd_library(m);
  register_backend_operators(autograd_library, &compiled_launcher);
}
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() =
      "The compiled part of asgl_cuda. Importing it implements torch.ops.asgl_cuda; functions call these operators.";
  m.def("cpu_threads", &num_cpu_threads,
        "The number of threads of the CPU kernels; 1 if they were built without OpenMP.");
  m.def("cpu_instruction_set", [] { return cpu::instruction_set_name(); });
  m.def("kernel_names", [] {
    std::vector<std::string> names;
    for (const cuda::Kernel& kernel : cuda::all_kernels()) names.push_back(cuda::name_expression(kernel));
    return names;
  });
  m.def("implement", &implement);
  ops::DirectCalls calls(m, "asgl_cuda");
  register_backend_operators(calls, nullptr);
  ops::register_spike_operators(calls);
  m.def("spike_panels", &ops::spike_panels);
  m.def("pack_spikes", &ops::pack_spikes);
}

}  // namespace asgl
