// Launches every call of files of recorder.cpp again, and compares the plan and each result, bit for bit. No torch, and
// few instantiations, so that it compiles in a minute, also for a sanitizer. `replay small FILES` leaves out large
// calls, for an emulation in which every CUDA thread is an OS thread.
#if defined(ASGL_TEST_CPU)
#include "cpu/kernels.h"
#include "cpu/philox_simd.h"
#include "cpu/product.h"
#else
#include "cuda/compiled.cuh"
#endif

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/plan.h"
#include "recording.h"

namespace {

using namespace asgl;
using asgl_recording::for_each_array;
using asgl_recording::Header;
using asgl_recording::kAlignment;

// In a build with seeded mutants, the environment selects one, and the first failure ends the program. Without a
// sanitizer arrays have room for accesses beyond their ends: results must reveal mutants.
#if defined(ASGL_TEST_MUTANTS)
constexpr size_t kMostFailures = 1;
void choose_mutant() { asgl::mutant = std::atoi(std::getenv("ASGL_MUTANT")); }
#else
constexpr size_t kMostFailures = 3;
void choose_mutant() {}
#endif
#if defined(ASGL_TEST_MUTANTS) && !defined(__SANITIZE_ADDRESS__)
constexpr int64 kRoom = 65536;
#else
constexpr int64 kRoom = 0;
#endif
constexpr unsigned char kRoomByte = 0x7F;  // large numbers of each type: NaN would stay NaN

constexpr int64 kFewThreads = 1024, kFewBytes = 300000;

// ---- planning and starting a kernel, as the operators do ----

#if defined(ASGL_TEST_CPU)
constexpr bool kOnCpu = true;

template <class Params>
bool is_planned(Params& params, const Header&) {
  if constexpr (requires { params.tiles; }) cpu::plan_tiles(params);
  return true;
}

template <class Params>
std::string launch(const Params& params) {
  if constexpr (requires { cpu::recurrent_forward(params); }) {
    cpu::recurrent_forward(params);
  } else if constexpr (requires { cpu::recurrent_backward(params); }) {
    cpu::recurrent_backward(params);
  } else {
    cpu::launch(params);
  }
  return "";
}
#else
constexpr bool kOnCpu = false;

template <class Params>
cuda::Launch planned(Params& params, int64 resident) {
  if constexpr (requires { params.parts; }) {  // what the first plan changed
    for (auto& part : params.parts) part.neurons = params.tile > 1 ? params.shape.neurons() : part.neurons;
  }
  if constexpr (requires { cuda::plan_tiles(params, [] { return int64{0}; }); }) {
    cuda::plan_tiles(params, [&] { return resident; });
  }
  return cuda::launch_of(params);
}

// Whether the plan is that of the file, and no other kernel than one for single neurons takes a misaligned array.
template <class Params>
bool is_planned(Params& params, const Header& header) {
  const Params before = params;
  const cuda::Launch launch = planned(params, header.resident);
  bool same = cuda::name_expression(launch.kernel) == header.kernel && launch.blocks == header.blocks &&
              launch.threads == header.threads;
  if constexpr (requires { params.parts; }) {
    for (int id = 0; id < params.count; ++id) {
      const auto &is = params.parts[id], &was = before.parts[id];
      same = same && is.elements_each == was.elements_each && is.runs_each == was.runs_each &&
             is.slots_each == was.slots_each && is.splits == was.splits && is.blocks == was.blocks;
    }
  }
  if (launch.kernel.lanes == 1) return same;
  Params other = before;
  for_each_array(other, [&](auto*& pointer, int64, bool in_fours) {
    if (!in_fours) return;
    ++pointer;
    same = same && planned(other, header.resident).kernel.lanes == 1;
    --pointer;
  });
  return same;
}

// Settled kernels of two surrogates are compiled.
template <class Scalar>
constexpr bool is_compiled(const cuda::Kernel& kernel) {
  if (kernel.template_id != cuda::Template::kForward && kernel.template_id != cuda::Template::kSettledBackward)
    return true;
  if (kernel.is_general() || (kernel.surrogate == Surrogate::kSigmoid && !kernel.hard_reset)) return true;
  return !std::is_same_v<Scalar, double> && kernel.surrogate == Surrogate::kRectangle && kernel.hard_reset;
}

template <class Scalar, size_t... kIndices>
cudaError_t start_one(const cuda::KernelStarter& start, std::index_sequence<kIndices...>) {
  cudaError_t error = cudaErrorInvalidValue;
  const auto try_kernel = [&](auto index) {
    constexpr cuda::Kernel kKernel = cuda::kKernelList<Scalar>.all[index()];
    if constexpr (is_compiled<Scalar>(kKernel)) {
      if (kKernel.key() == start.launch.kernel.key()) error = cuda::start_kernel<Scalar, index()>(start);
    }
  };
  (try_kernel(std::integral_constant<size_t, kIndices>{}), ...);
  return error;
}

template <template <class> class Params, class Scalar>
cudaError_t start(const Params<Scalar>&, const cuda::KernelStarter& start) {
  return start_one<Scalar>(start, std::make_index_sequence<cuda::kKernelList<Scalar>.count>{});
}

template <class Params>
std::string launch(const Params& params) {
  const cudaError_t error = start(params, {cuda::launch_of(params), &params, nullptr});
  if (error == cudaSuccess) return "";
  return std::string(cudaGetErrorString(error)) + " " + std::exchange(asgl_emulation::error_message, "");
}
#endif

// ---- a call ----

template <class Element>
bool is_same(Element a, Element b) {
  if constexpr (std::is_integral_v<Element>) {
    return a == b;
  } else {
    const double is = to_real(a), was = to_real(b);
    return is == was || (std::isnan(is) && std::isnan(was));
  }
}
bool is_same(const Moments& a, const Moments& b) {
  return is_same(a.count, b.count) && is_same(a.mean, b.mean) && is_same(a.variance, b.variance);
}

// The bytes of a file from here on.
class Reader {
 public:
  explicit Reader(const char* next) : next_(next) {}
  const char* take(int64 bytes) {
    next_ += bytes;
    return next_ - bytes;
  }
  template <class Value>
  Value take() {
    Value value;
    std::memcpy(static_cast<void*>(&value), take(sizeof(value)), sizeof(value));
    return value;
  }

 private:
  const char* next_;
};

struct Deleter {
  void operator()(char* bytes) const { ::operator delete(bytes, std::align_val_t(kAlignment)); }
};
using Storage = std::unique_ptr<char, Deleter>;

// An array that ends with its storage, so that a sanitizer sees an overrun; with room behind it, that shows one itself.
template <class Element>
std::string first_difference(const Element* is, const char* was, int64 elements) {
  for (int64 i = 0; i < elements; ++i) {
    Element expected;
    std::memcpy(static_cast<void*>(&expected), was + i * sizeof(Element), sizeof(Element));
    if (!is_same(is[i], expected)) return "[" + std::to_string(i) + "]";
  }
  const auto* room = reinterpret_cast<const unsigned char*>(is + elements);
  const bool overrun = std::any_of(room, room + kRoom, [](unsigned char byte) { return byte != kRoomByte; });
  return overrun ? " beyond its end" : "";
}

// Returns what differs, or nothing.
template <class Params>
std::string replay(const Header& header, Reader file) {
  auto params = file.take<Params>();
  std::vector<Storage> storage;
  std::vector<std::function<std::string()>> compare;
  for_each_array(params, [&](auto*& pointer, int64 elements, bool) {
    using Element = std::remove_const_t<std::remove_reference_t<decltype(*pointer)>>;
    const auto offset = file.take<int64>();
    const int64 bytes = elements * static_cast<int64>(sizeof(Element));
    auto* first = static_cast<char*>(::operator new(offset + bytes + kRoom, std::align_val_t(kAlignment)));
    storage.emplace_back(first);
    std::memcpy(first + offset, file.take(bytes), bytes);
    std::memset(first + offset + bytes, kRoomByte, kRoom);
    pointer = reinterpret_cast<Element*>(first + offset);
    if constexpr (!std::is_const_v<std::remove_reference_t<decltype(*pointer)>>) {
      compare.push_back([now = pointer, after = file.take(bytes), elements, number = storage.size()] {
        const std::string found = first_difference(now, after, elements);
        return found.empty() ? "" : "array " + std::to_string(number) + found + " differs";
      });
    }
  });
  if (!is_planned(params, header)) return "another plan";
  const std::string problem = launch(params);
  if (!problem.empty()) return problem;
  for (const auto& each : compare) {
    const std::string difference = each();
    if (!difference.empty()) return difference;
  }
  return "";
}

// ---- what no call of a file shows ----

// analog_below from the state is clamped to [0, kAlwaysAnalog].
bool is_analog_below_resolved() {
  constexpr int64 kLimit = std::numeric_limits<int64>::max(), kAlways = kAlwaysAnalog;
  for (const int64 below : {-kLimit, int64{-1}, int64{0}, int64{1}, kAlways - 1, kAlways, kLimit}) {
    const int64 state[] = {7, 11, below};
    const NoiseParams resolved = NoiseParams{state, kAnalogBelowInState}.resolved();
    if (resolved.analog_below != std::clamp<int64>(below, 0, kAlways)) return false;
  }
  return true;
}

// Kernels divide 31 bits, and start for at most 2048 splits.
bool are_large_sizes_planned() {
  ForwardParams<float> params{};
  params.parameters[kInputGain].constant = 1;
  params.shape = {1, 1, (int64{1} << 31) - 1};
  const bool settled = cuda::input_of(params) == Input::kPlain;
  ++params.shape.inner;
  return settled && cuda::input_of(params) == Input::kGeneral &&
         ChannelTiles::plan({5000, 3, 4}, 1, 8, 1).splits <= 2048;
}

// The kernels of a type are found by keys.
bool are_keys_different() {
  for (const cuda::Type type : {cuda::Type::kHalf, cuda::Type::kFloat, cuda::Type::kDouble}) {
    const cuda::KernelList kernels = cuda::kernels_of(type);
    std::set<uint32> keys;
    for (size_t i = 0; i < kernels.count; ++i) keys.insert(kernels.all[i].key());
    if (keys.size() != kernels.count) return false;
  }
  return true;
}

// A launch reports its own error alone, and leaves none behind; an error of others stays for them.
bool are_errors_their_own() {
#if !defined(ASGL_TEST_CPU)
  float mean = 0, variance = 0, coefficient = 0;  // apart: threads read the former while one stores the latter
  Moments total{};
  CoefficientsParams<float> params{};
  params.mean = &mean;
  params.variance = &variance;
  params.coefficients = &coefficient;
  params.total = &total;
  const auto error = [&](int64 channels) {
    params.channels = channels;
    return start(params, {cuda::launch_of(params), &params, nullptr});
  };
  if (error(0) != cudaErrorInvalidConfiguration || cudaGetLastError() != cudaSuccess) return false;
  asgl_emulation::last_error = cudaErrorInvalidValue;
  params.channels = 0;
  const cuda::Launch launch = {cuda::launch_of(params).kernel, 1};
  if (start(params, {launch, &params, nullptr}) != cudaSuccess || cudaGetLastError() != cudaErrorInvalidValue) {
    return false;
  }
#endif
  return true;
}

#if defined(ASGL_TEST_CPU)
// Calls f() with a loop's clone for each instruction set that the processor has, the vectors as its argument in bytes.
template <class F>
void for_each_vector(const F& f) {
  f(std::integral_constant<int, 16>{});
#if defined(__x86_64__)
  if (cpu::best_instruction_set() >= cpu::InstructionSet::kAvx2 && __builtin_cpu_supports("fma")) {
    f(std::integral_constant<int, 32>{});
  }
  if (cpu::best_instruction_set() == cpu::InstructionSet::kAvx512) f(std::integral_constant<int, 64>{});
#endif
}

template <class Loop, int kBytes>
void run_clone(const typename Loop::Args& args) {
#if defined(__x86_64__)
  if constexpr (kBytes == 64) return cpu::run_avx512<Loop>(args);
  if constexpr (kBytes == 32 && std::is_same_v<Loop, cpu::NoiseLoop>) return cpu::run_avx2<Loop>(args);
  if constexpr (kBytes == 32) return cpu::run_fma<Loop>(args);
#endif
  cpu::run_baseline<Loop>(args);
}

// Products of small whole numbers, most of them zeros, in arrays of just their size.
template <class Real>
bool is_product_right(int64 rows, int64 depth, int64 columns, bool transposed) {
  std::vector<Real> a(rows * depth), b(depth * columns), panels(cpu::panels_size<Real>(depth, columns));
  for (int64 i = 0; i < rows * depth; ++i) a[i] = i % 3 == 0 ? Real(i % 5) : Real(0);
  for (int64 i = 0; i < depth * columns; ++i) b[i] = Real(i % 7 - 3);
  const int64 row_stride = transposed ? 1 : columns, column_stride = transposed ? depth : 1;
  cpu::fill_panels(b.data(), row_stride, column_stride, depth, columns, panels.data());
  bool right = true;
  const auto is_right = [&](const std::vector<Real>& out) {
    for (int64 i = 0; i < rows; ++i) {
      for (int64 j = 0; j < columns; ++j) {
        Real sum = 1;  // the products add to ones
        for (int64 k = 0; k < depth; ++k) sum += a[i * depth + k] * b[k * row_stride + j * column_stride];
        right = right && out[i * columns + j] == sum;
      }
    }
  };
  for_each_vector([&](auto bytes) {
    std::vector<Real> out(rows * columns, Real(1));
    run_clone<cpu::DenseProductLoop<Real, bytes()>, bytes()>(
        {a.data(), depth, rows, depth, columns, panels.data(), /*accumulate=*/true, out.data()});
    is_right(out);
    std::vector<Real> gathered(rows * columns, Real(1));
    for (int64 i = 0; i < rows; ++i) {
      const std::vector<Real> row(a.begin() + i * depth, a.begin() + (i + 1) * depth);
      std::vector<int32_t> indices(depth);
      int64 count = cpu::append_nonzero(0, row.data(), depth, indices.data(), 0);
#if defined(__x86_64__)
      if (bytes() > 16) count = cpu::list_nonzero_avx2(row.data(), depth, indices.data());
#endif
      run_clone<cpu::GatheredProductLoop<Real, bytes()>, bytes()>(
          {{row.data(), depth, 1, depth, columns, panels.data(), /*accumulate=*/true, &gathered[i * columns]},
           indices.data(),
           count});
    }
    is_right(gathered);
  });
  return right;
}

// Stores are whole vectors, for a multiple of kNoiseGroups.
bool is_noise_right(int64 groups) {
  const NoiseKey key = {1, 2, 3};
  bool right = true;
  for_each_vector([&](auto bytes) {
    const int64 room = (groups + cpu::kNoiseGroups - 1) / cpu::kNoiseGroups * cpu::kNoiseGroups;
    std::vector<uint64> even(room), odd(room);
    run_clone<cpu::NoiseLoop, bytes()>({key, uint64{1} << 32, groups, 700, even.data(), odd.data()});
    for (int64 i = 0; i < groups; ++i) {
      const NoiseBlock block = noise_block((uint64{1} << 32) + static_cast<uint64>(i), 700, key);
      right = right && even[i] == block.draws[0] && odd[i] == block.draws[1];
    }
  });
  return right;
}
#endif

// The loops written for vectors, of which recorded calls run those of the smallest.
bool are_vectors_right() {
  bool right = true;
#if defined(ASGL_TEST_CPU)
  for (const int64 groups : {1, 32, 33, 100}) right = right && is_noise_right(groups);
  for (const int64 rows : {1, 6, 16}) {
    for (const int64 depth : {1, 7, 8, 9, 33}) {
      for (const int64 columns : {1, 15, 33, 130}) {
        for (const bool transposed : {false, true}) {
          right = right && is_product_right<float>(rows, depth, columns, transposed) &&
                  is_product_right<double>(rows, depth, columns, transposed);
        }
      }
    }
  }
#endif
  return right;
}

std::string replay_one(const Header& header, const char* params) {
  std::string found = "no such kernel";
  asgl_recording::with_params(header.kernel, [&]<class Params>() {
    constexpr bool kRecurrent = requires(Params each) { each.elementwise; };  // for the CPU alone
    if constexpr (kOnCpu || !kRecurrent) found = replay<Params>(header, Reader(params));
  });
  return found;
}

// The bytes of a file.
std::string_view mapped(const char* path) {
  struct stat status{};
  const int file = open(path, O_RDONLY);
  if (file < 0 || fstat(file, &status) != 0) return {};
  const auto size = static_cast<size_t>(status.st_size);
  void* const bytes = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  return bytes == MAP_FAILED ? std::string_view() : std::string_view(static_cast<const char*>(bytes), size);
}

}  // namespace

int main(int argc, char** argv) {
  choose_mutant();
  int calls = 0;
  std::vector<std::string> failures;
  for (const auto& [holds, what] : {std::pair{is_analog_below_resolved(), "a wrong share of analog elements"},
                                    {are_large_sizes_planned(), "large sizes"},
                                    {are_keys_different(), "kernels of the same key"},
                                    {are_errors_their_own(), "errors"},
                                    {are_vectors_right(), "products and noise of vectors"}}) {
    if (!holds) failures.push_back(what);
  }
  const bool small = argc > 1 && std::string(argv[1]) == "small";
  for (int i = small ? 2 : 1; i < argc; ++i) {
    const std::string_view file = mapped(argv[i]);
    for (size_t at = 0; at < file.size() && failures.size() < kMostFailures;) {
      const char* const params = file.data() + at + sizeof(Header);
      const auto header = Reader(file.data() + at).take<Header>();
      at += header.bytes;
      if (small && (header.blocks * header.threads > kFewThreads || header.bytes > kFewBytes)) continue;
      const std::string difference = replay_one(header, params);
      if (!difference.empty())
        failures.push_back(std::string(header.kernel) + ", call " + std::to_string(calls) + ": " + difference);
      ++calls;
    }
  }
  for (const std::string& failure : failures) std::printf("%s\n", failure.c_str());
  std::printf("%zu of %d calls differ\n", failures.size(), calls);
  return failures.empty() && calls > 0 ? 0 : 1;
}
