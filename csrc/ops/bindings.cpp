// Registers the operators of this folder for the backends of this build, and defines the Python module.
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

// Implements all operators with the kernels that `launcher` starts, or with the CPU kernels if it is null.
template <class Library>
void implement_all(Library& library, const ops::Launcher* launcher) {
  ops::implement_neuron(library, launcher);
  ops::implement_integrator(library, launcher);
  ops::implement_batch_norm(library, launcher);
  ops::implement_recurrent(library, launcher);
}

// Starts kernels by functions of Python (asgl_cuda/backends/launcher.py); `params` is an address there.
class __attribute__((visibility("hidden"))) PythonLauncher : public ops::Launcher {  // as pybind11::object
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

// Registers the operators of a namespace that Python has defined, for tensors on 'CPU' or 'CUDA', with the kernels that
// a launcher in Python starts. Returns them as functions (direct_calls.h).
pybind11::object implement(const std::string& name_space, const std::string& device, pybind11::object launch,
                           pybind11::object resident_threads) {
  // The launcher and the libraries are never deleted. The launcher holds Python objects, and when the process ends
  // there is no interpreter to release them.
  const auto* launcher = new PythonLauncher(std::move(launch), std::move(resident_threads));
  const auto library = [&](const std::string& key) {
    return new torch::Library(torch::Library::IMPL, name_space, c10::parseDispatchKey(key), __FILE__, __LINE__);
  };
  implement_all(*library(device), launcher);
  ops::AtAutograd at_autograd(*library("Autograd" + device));
  implement_all(at_autograd, launcher);
  const pybind11::object functions = pybind11::module_::import("types").attr("SimpleNamespace")();
  ops::DirectCalls calls(functions, name_space);
  implement_all(calls, launcher);
  return functions;
}

}  // namespace

TORCH_LIBRARY_IMPL(asgl_cuda, CPU, m) {
  implement_all(m, nullptr);
  ops::implement_spikes(m);
}

TORCH_LIBRARY_IMPL(asgl_cuda, AutogradCPU, m) {
  ops::AtAutograd at_autograd(m);
  implement_all(at_autograd, nullptr);
  ops::implement_spikes(at_autograd);
}

#if defined(ASGL_WITH_CUDA)
TORCH_LIBRARY_IMPL(asgl_cuda, CUDA, m) { implement_all(m, &compiled_launcher); }

TORCH_LIBRARY_IMPL(asgl_cuda, AutogradCUDA, m) {
  ops::AtAutograd at_autograd(m);
  implement_all(at_autograd, &compiled_launcher);
}
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() =
      "asgl_cuda's compiled part: importing it adds kernels to torch.ops.asgl_cuda. Its operators are the same ones.";
  m.def("cpu_threads", &cpu::num_threads, "Threads that the kernels run on; 1 where they were built without OpenMP.");
  m.def("cpu_instruction_set", [] { return cpu::instruction_set_name(); });
  m.def("kernel_names", [] {
    std::vector<std::string> names;
    for (const cuda::Kernel& kernel : cuda::all_kernels()) names.push_back(cuda::name_expression(kernel));
    return names;
  });
  m.def("implement", &implement);
  ops::DirectCalls calls(m, "asgl_cuda");
  implement_all(calls, nullptr);
  ops::implement_spikes(calls);
  m.def("spike_panels", &ops::spike_panels);
  m.def("pack_spikes", &ops::pack_spikes);
}

}  // namespace asgl
