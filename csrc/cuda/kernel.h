// The list of CUDA kernels. A Kernel names a template and the template's arguments. Builds with nvcc compile the whole
// list (compiled.cuh). NVRTC instead compiles single kernels by their names. This file includes no CUDA header, so that
// builds without CUDA can include it.
#pragma once

#include <string>
#include <vector>

#include "params/gradient.h"
#include "params/integrator.h"
#include "params/normalisation.h"

namespace asgl::cuda {

// The function templates of the kernels.
enum class Template {
  kForward,          // lif_forward_kernel
  kSettledBackward,  // lif_backward_settled_kernel
  kBackward,         // lif_backward_kernel
  kAdaptiveForward,
  kAdaptiveBackward,
  kIntegrator,
  kGradientSum,
  kMoments,
  kCoefficients,
  kInputGradient,
};

// The type for which a kernel is compiled: the type of sequences such as x_seq, or the arithmetic type for kernels that
// take no sequence.
enum class Type { kHalf, kBFloat16, kFloat, kDouble };

template <class Scalar>
constexpr Type kTypeOf = Type::kFloat;
template <>
inline constexpr Type kTypeOf<Half> = Type::kHalf;
template <>
inline constexpr Type kTypeOf<BFloat16> = Type::kBFloat16;
template <>
inline constexpr Type kTypeOf<double> = Type::kDouble;

// Whether kernels with four neurons per thread exist for this type. Only float64 has none, because four of its values
// would need two accesses of 16 bytes.
template <class Scalar>
constexpr bool kHasFourLanes = kTypeOf<Scalar> != Type::kDouble;

// A kernel: its template and the arguments of the template. Arguments that a template does not have keep the defaults
// below.
struct Kernel {
  Template template_id = Template::kForward;
  Type type = Type::kFloat;
  int lanes = 1;  // neurons or columns per thread
  Input input = Input::kGeneral;
  int steps = 0;                                // 0 for any number
  Surrogate surrogate = Surrogate::kRectangle;  // this and hard_reset: of the model LIF, unless the input is general
  bool hard_reset = false;
  Pass pass = Pass::kForward;
  bool residual = false;  // of kernels for batch normalisation

  // Whether the kernel of a neuron reads all options at run time.
  constexpr bool is_general() const { return input == Input::kGeneral || input == Input::kGeneralResidual; }

  // One number that encodes the template and its arguments other than the type.
  uint32 key() const {
    uint32 key = 0;
    for (const int each :
         {static_cast<int>(template_id), lanes, static_cast<int>(input), steps, static_cast<int>(surrogate),
          static_cast<int>(hard_reset), static_cast<int>(pass), static_cast<int>(residual)}) {
      key = key << 4 | static_cast<uint32>(each);
    }
    return key;
  }
};

// A kernel and its grid, which a launcher starts.
struct Launch {
  Kernel kernel;
  int64 blocks;
  int threads = kBlockThreads;
};

// The C++ expression that names a kernel, such as asgl::gradient_sum_kernel<float>, for NVRTC to instantiate.
inline std::string name_expression(const Kernel& kernel) {
  static const char* const kTypes[] = {"asgl::Half", "asgl::BFloat16", "float", "double"};
  const auto call = [&](const char* name, auto... arguments) {
    std::string text = std::string("asgl::") + name + "<" + kTypes[static_cast<int>(kernel.type)];
    ((text += ", " + std::string(arguments)), ...);
    return text + ">";
  };
  const auto number = [](auto value) { return std::to_string(static_cast<int>(value)); };
  const auto boolean = [](bool value) { return value ? "true" : "false"; };
  const std::string lanes = number(kernel.lanes), input = "(asgl::Input)" + number(kernel.input);
  const auto model = [&] {
    if (kernel.is_general()) {
      return std::string("asgl::LIFByOptions<") + (kernel.type == Type::kDouble ? "double" : "float") + ">";
    }
    return "asgl::LIF<(asgl::Surrogate)" + number(kernel.surrogate) + ", " + boolean(kernel.hard_reset) + ">";
  };
  switch (kernel.template_id) {
    case Template::kForward:
      return call("lif_forward_kernel", model(), lanes, input, number(kernel.steps));
    case Template::kSettledBackward:
      return call("lif_backward_settled_kernel", model(), lanes, input, number(kernel.steps));
    case Template::kBackward:
      return call("lif_backward_kernel", lanes, input);
    case Template::kAdaptiveForward:
      return call("adaptive_forward_kernel");
    case Template::kAdaptiveBackward:
      return call("adaptive_backward_kernel");
    case Template::kIntegrator:
      return call("integrator_kernel", lanes, "(asgl::Pass)" + number(kernel.pass));
    case Template::kGradientSum:
      return call("gradient_sum_kernel");
    case Template::kMoments:
      return call("batch_moments_kernel", lanes);
    case Template::kCoefficients:
      return call("batch_norm_coefficients_kernel");
    case Template::kInputGradient:
      return call("batch_norm_input_gradient_kernel", lanes, boolean(kernel.residual));
  }
  return {};
}

constexpr size_t kMaxKernels = 320;  // of one type

// A list of kernels that can be built in a constant expression.
struct KernelList {
  Kernel all[kMaxKernels];
  size_t count = 0;  // above kMaxKernels if not all fit, which fails to compile below

  constexpr void add(const Kernel& kernel) {
    if (count < kMaxKernels) all[count] = kernel;
    ++count;
  }
};

// Every kernel of this type that launch_of in plan.h may choose.
constexpr KernelList kernels_of(Type type) {
  KernelList kernels{};
  if (type == Type::kFloat || type == Type::kDouble) {
    kernels.add({Template::kGradientSum, type});
    kernels.add({Template::kCoefficients, type});
  }
  kernels.add({Template::kAdaptiveForward, type});
  kernels.add({Template::kAdaptiveBackward, type});
  for (const int lanes : {1, 4}) {
    if (lanes == 4 && type == Type::kDouble) continue;
    kernels.add({Template::kMoments, type, lanes});
    for (const bool residual : {false, true}) {
      Kernel kernel{Template::kInputGradient, type, lanes};
      kernel.residual = residual;
      kernels.add(kernel);
    }
    for (const Pass pass : {Pass::kForward, Pass::kBackward, Pass::kSums}) {
      Kernel kernel{Template::kIntegrator, type, lanes};
      kernel.pass = pass;
      kernels.add(kernel);
    }
    for (const Input input : {Input::kGeneral, Input::kGeneralResidual}) {
      kernels.add({Template::kForward, type, lanes, input});
      kernels.add({Template::kBackward, type, lanes, input});
    }
    for (int surrogate = 0; surrogate < kNumSurrogates; ++surrogate) {
      for (const bool hard : {false, true}) {
        if (hard && surrogate == static_cast<int>(Surrogate::kInteger)) continue;
        for (const Input input : {Input::kNormalised, Input::kPlain, Input::kNormalisedResidual, Input::kApart}) {
          if (lanes == 1 && input != Input::kNormalised) continue;
          for (const int steps : {0, kShortSequence}) {
            if (lanes == 1 && steps > 0) continue;
            for (const Template each : {Template::kForward, Template::kSettledBackward}) {
              kernels.add({each, type, lanes, input, steps, static_cast<Surrogate>(surrogate), hard});
            }
          }
        }
      }
    }
  }
  return kernels;
}
static_assert(kernels_of(Type::kHalf).count <= kMaxKernels && kernels_of(Type::kBFloat16).count <= kMaxKernels &&
                  kernels_of(Type::kFloat).count <= kMaxKernels && kernels_of(Type::kDouble).count <= kMaxKernels,
              "kMaxKernels is smaller than the number of kernels of a type");

// The kernels of all types, in one list.
inline std::vector<Kernel> all_kernels() {
  std::vector<Kernel> every;
  for (const Type type : {Type::kHalf, Type::kBFloat16, Type::kFloat, Type::kDouble}) {
    const KernelList kernels = kernels_of(type);
    every.insert(every.end(), kernels.all, kernels.all + kernels.count);
  }
  return every;
}

}  // namespace asgl::cuda
