// The CUDA kernels and their launchers, run by the emulation, against a plain loop over neurons and steps; with
// ASGL_TEST_CPU the CPU kernels. No torch, and few instantiations: it compiles in seconds, also for a sanitizer.
// `kernels_test small` runs fewer cases, for an emulation in which every CUDA thread is an OS thread.
#include <algorithm>
#include <limits>
#include <set>

#if defined(ASGL_TEST_CPU)
#include "cpu/neuron.cpp"
#include "cpu/neuron_settled.cpp"
namespace asgl::cpu {  // run by adaptive_test
template <class Params>
void run_adaptive(const Params&) {
  std::abort();
}
}  // namespace asgl::cpu
#else
#include "cuda/launch_neuron.cuh"
#endif
#include "expected.h"
#include "trials.h"

namespace {

using namespace asgl;
using asgl_emulation::Buffer;
using asgl_emulation::check;
using asgl_emulation::compare;
using asgl_emulation::expect;
using asgl_emulation::Expected;
using asgl_emulation::kOnCpu;
using asgl_emulation::plan;
using asgl_emulation::Random;
using asgl_emulation::sum_gradients;
using asgl_emulation::text;
using asgl_emulation::Texts;

// ---- a case ----

enum class Parameters { kPlain, kNormalised, kUniform, kInFours, kAny, kByNeuron };
const char* const kParametersNames[] = {"plain",           "normalised",       "uniform",
                                        "shared in fours", "shared at random", "by neuron"};
const char* const kParameterNames[] = {"width",      "decay",      "v_threshold", "reset",
                                       "input_gain", "input_bias", "input_mean"};

// The number seeds all other choices.
struct Case {
  SequenceShape shape;
  Parameters parameters;
  int multiprocessors;
  unsigned number;
  bool by_threshold = false;  // potentials are at the threshold, or above it by subnormal numbers
};

struct Coverage {
  std::set<const void*> kernels;
  // Sums of several runs by whole blocks, and of more runs than are summed in parallel.
  int whole_block_sums = 0, sums_side_by_side = 0;
};

// Settled: a model has a forward and a backward kernel for one neuron a thread, and except for double for four, plain,
// normalised, by neuron and with a residual, any T and T = 4. General: a type has one of each, with and
// without a residual, for one neuron a thread, and except for double for four.
constexpr std::size_t kKernels = 4 * (2 + 2 * (2 + 2 + 2 + 2)) + 2 + 2 * (2 * (2 + 2) + 2);

template <class Scalar, Surrogate kSurrogate, bool kHardReset, bool kByOptions = false>
class Trial {
  using Named = LIF<kSurrogate, kHardReset>;
  using Real = Real_t<Scalar>;
  using Model = std::conditional_t<kByOptions, LIFByOptions<Real>, Named>;

 public:
  explicit Trial(const Case& it) : case_(it), random_(it.number) {
    // Fewer options and outputs for settled kernels, or most cases would run the general ones.
    plain_ = it.parameters == Parameters::kPlain;
    settled_ =
        plain_ || it.parameters == Parameters::kNormalised || it.parameters == Parameters::kByNeuron || random_.toss();
    if (settled_ && it.parameters >= Parameters::kInFours) plain_ = random_.toss();
    const unsigned seldom = settled_ ? 8 : 2;
    const int64 neurons = it.shape.neurons(), elements = neurons * it.shape.steps;
    if (random_.once_in(4)) misaligned_ = static_cast<int>(random_.between(0, 13));
    infinite_ = random_.once_in(it.shape.steps == 1 ? 2 : 8);
    gradients_ = !infinite_ && !random_.once_in(4);

    forward_.shape = it.shape;
    const bool strict = random_.toss(), scaled = random_.once_in(settled_ ? 6 : 2), detached = random_.toss();
    const bool rests_at_zero = !random_.once_in(seldom);
    forward_.options = {Real(rests_at_zero ? 0.0 : random_.between(-0.2, 0.2)),
                        Real(random_.toss() ? 1.0 : 1.5),
                        kSurrogate,
                        kHardReset,
                        strict,
                        scaled,
                        detached && !infinite_};
    forward_.options.levels = kSurrogate == Surrogate::kInteger || it.number % 2 == 0 ? 2 : 0;
    const uint32 analog_below[] = {0, 20000, 20000, 20000, 65535, 65536};
    rng_state_[0] = static_cast<int64>(random_.between(-1e18, 1e18));
    rng_state_[1] = static_cast<int64>(random_.between(-1e10, 1e10));
    forward_.noise = {rng_state_, analog_below[it.number % 6]};
    if (kByOptions) choose_rules();
    make_parameters();

    x_seq_ = input<Scalar>(true, elements, -1, 2);
    v_init_ = input<Real>(random_.toss(), neurons, -0.5, 1);
    s_seq_ = output<Scalar>(true, elements);
    v_last_ = output<Real>(random_.toss(), neurons);
    v_seq_ = output<Real>(random_.once_in(seldom), elements);
    h_seq_ = output<Real>(random_.once_in(seldom), elements);
    checkpoints_ = output<Real>(!random_.once_in(8), (it.shape.steps - 1) / kCheckpointSteps * neurons);
    grad_s_seq_ = input<Scalar>(!random_.once_in(8), elements, -1, 1);
    grad_v_last_ = input<Real>(random_.toss() && !infinite_, neurons, -1, 1);
    grad_v_seq_ = input<Real>(random_.once_in(seldom) && !infinite_, elements, -1, 1);
    grad_h_seq_ = input<Real>(random_.once_in(seldom), elements, -1, 1);
    grad_x_seq_ = output<Scalar>(!random_.once_in(8), elements);
    grad_v_init_ = output<Real>(random_.toss(), neurons);
    Random others(it.number + 1000000);
    if (!it.by_threshold && others.once_in(3)) {
      const bool misaligned = others.once_in(8);
      residual_ = Buffer<Scalar>(elements, misaligned);
      residual_.fill(others, -1, 1);
      forward_.residual_gain = Real(others.toss() ? 1.0 : 0.5);
      if (!others.once_in(4)) grad_residual_ = Buffer<Scalar>(elements, others.once_in(8));
    }
    if (it.by_threshold) set_by_threshold();
  }

  Texts run(Coverage& coverage) {
    Texts differences;
    asgl_emulation::settings().multiprocessors = case_.multiprocessors;
    asgl_emulation::clear_recorded_launches();

    forward_.x_seq = x_seq_.data();
    forward_.residual = residual_.data();
    forward_.v_init = v_init_.data();
    forward_.s_seq = s_seq_.data();
    forward_.v_last = v_last_.data();
    forward_.v_seq = v_seq_.data();
    forward_.h_seq = h_seq_.data();
    forward_.checkpoints = checkpoints_.data();
    plan(forward_);
    check("forward", launch(forward_), differences);
    const Input forward_input = input(v_seq_.data() == nullptr && h_seq_.data() == nullptr);
    check_launch("forward", false, forward_input,
                 lanes(forward_input, x_seq_, residual_, v_init_, s_seq_, v_last_, v_seq_, h_seq_, checkpoints_),
                 coverage, differences);

    BackwardParams<Scalar> backward{};
    static_cast<LIFParams<Scalar>&>(backward) = forward_;
    backward.grad_s_seq = grad_s_seq_.data();
    backward.grad_v_last = grad_v_last_.data();
    backward.grad_v_seq = grad_v_seq_.data();
    backward.grad_h_seq = grad_h_seq_.data();
    backward.checkpoints = checkpoints_.data();
    backward.grad_x_seq = grad_x_seq_.data();
    backward.grad_residual = grad_residual_.data();
    backward.grad_v_init = grad_v_init_.data();
    const Expected<Real> expected =
        expect<std::conditional_t<kByOptions, asgl_emulation::RulesAgain<Named>, Named>>(backward);
    compare("s_seq", s_seq_, expected.s_seq, differences);
    compare("v_last", v_last_, expected.v_last, differences);
    compare("v_seq", v_seq_, expected.v_seq, differences);
    compare("h_seq", h_seq_, expected.h_seq, differences);
    if (checkpoints_.data() == nullptr) return differences;

    Real later;  // any non-null pointer: plan_tiles() needs to know which sums are wanted
    for (int id = 0; id < kNumParameters; ++id) {
      if (wanted_[id]) backward.partials[id].data = &later;
    }
    plan(backward);
    Buffer<Real> partials[kNumParameters], sums[kNumParameters];
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wanted_[id]) continue;
      const int64 rows = forward_.parameters[id].step_stride != 0 ? case_.shape.steps : 1;
      const int64 slots =
          GradientPartials<Real>::slots_for(forward_.parameters[id].inner, case_.shape.neurons(), backward.tiles.count);
      partials[id] = Buffer<Real>(rows * slots, 0);
      sums[id] = Buffer<Real>(rows * forward_.parameters[id].count, 0);
      backward.partials[id] = {partials[id].data(), slots};
    }
    const bool only_spikes = grad_s_seq_.data() != nullptr &&
                             (grad_x_seq_.data() != nullptr || grad_residual_.data() != nullptr) &&
                             grad_v_seq_.data() == nullptr && grad_h_seq_.data() == nullptr && !wanted_[kInputMean];
    const Input backward_input = input(only_spikes);
    if (!is_taken(backward, backward_input)) differences.push_back("the kernel assumes more than holds");
    if (!differences.empty()) return differences;  // the kernel might dereference null
    check("backward", launch(backward), differences);
    check_launch("backward", true, backward_input,
                 lanes(backward_input, x_seq_, residual_, v_init_, grad_s_seq_, grad_v_last_, grad_v_seq_, grad_h_seq_,
                       checkpoints_, grad_x_seq_, grad_residual_, grad_v_init_),
                 coverage, differences);
    compare("grad_x_seq", grad_x_seq_, expected.grad_x_seq, differences);
    compare("grad_residual", grad_residual_, expected.grad_residual, differences);
    compare("grad_v_init", grad_v_init_, expected.grad_v_init, differences);
    GradientSum<Real> sum{case_.shape, backward.tiles.tile, 0, {}};
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wanted_[id]) continue;
      const Derivative derivative = id == kWidth
                                        ? forward_.options.log_width ? Derivative::kOfLogWidth : Derivative::kOfWidth
                                    : id == kDecay && forward_.options.logit_decay ? Derivative::kOfLogitDecay
                                                                                   : Derivative::kNone;
      sum.parts[sum.count++] = {backward.partials[id], forward_.parameters[id], derivative, sums[id].data(),
                                case_.shape.neurons()};
    }
    for (int id = 0; id < kNumParameters; ++id) {
      if (partials[id].data() != nullptr && partials[id].overrun()) differences.push_back("a slot beyond the last");
    }
    if (sum.count == 0) return differences;
    sum_gradients(sum, differences, [&](const auto& launched) { check_sum(launched, coverage, differences); });
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wanted_[id]) continue;
      compare(std::string("grad_") + kParameterNames[id], sums[id], expected.grad_parameters[id], case_.shape.steps,
              differences);
    }
    return differences;
  }

 private:
  // Multiple spikes exclude noise.
  void choose_rules() {
    LIFByOptions<Real>& options = forward_.options;
    options.v_min = Real(random_.between(-0.3, 0.3));
    options.multi_spike = kSurrogate != Surrogate::kInteger && !kHardReset && !random_.once_in(4);
    options.periodic = options.multi_spike && random_.toss();
    options.floored = !options.multi_spike || random_.toss();
    if (options.multi_spike) forward_.noise.analog_below = 0;
  }

  void set_by_threshold() {
    forward_.options.strict_threshold = true;
    forward_.options.v_rest = 0;
    forward_.noise.analog_below = 0;
    for (const int id : {kThreshold, kReset, kInputGain, kInputBias, kInputMean}) {
      forward_.parameters[id] = {nullptr, id == kInputGain ? Real(1) : Real(0), 0, case_.shape.neurons(), 1};
      wanted_[id] = false;
    }
    forward_.parameters[kThreshold].constant = Real(0x1p-126);
    for (int64 i = 0; i < v_init_.size(); ++i) v_init_.set(i, 0);
    for (int64 i = 0; i < x_seq_.size(); ++i) {
      x_seq_.set(i, 0x1p-126 + (random_.toss() ? 0 : random_.toss() ? 0x1p-140 : 0x1p-149));
    }
  }

  // The buffer numbered misaligned_ begins one element after an aligned address.
  template <class Element>
  Buffer<Element> output(bool wanted, int64 size) {
    const bool misaligned = buffers_++ == misaligned_;
    return wanted ? Buffer<Element>(size, misaligned) : Buffer<Element>();
  }
  template <class Element>
  Buffer<Element> input(bool wanted, int64 size, double low, double high) {
    Buffer<Element> buffer = output<Element>(wanted, size);
    buffer.fill(random_, low, high);
    return buffer;
  }

  void make_parameters() {
    const bool normalised = settled_ && !plain_, per_step = random_.once_in(settled_ ? 8 : 3);
    // All parameters of the input have one value a channel, channels_last or not.
    const bool by_channel = kOnCpu && case_.parameters == Parameters::kNormalised && !random_.once_in(3);
    const int64 run = by_channel && random_.toss() ? random_.divisor(case_.shape.neurons(), 1) : 1;
    const int64 channels = by_channel ? random_.divisor(case_.shape.neurons() / run, 1) : 1;
    // The input is plain except for one of its parameters.
    const int64 other = random_.once_in(8) ? random_.one_of({kInputGain, kInputBias, kInputMean}) : -1;
    const double reset_low = kHardReset ? -0.2 : 0.5, reset_high = kHardReset ? 0.2 : 1;
    const double low[] = {0.5, 0.2, 0.6, reset_low, 0.5, -0.2, -0.3};
    const double high[] = {1.5, 0.95, 1.2, reset_high, 1.5, 0.2, 0.3};
    for (int id = 0; id < kNumParameters; ++id) {
      ParameterView<Real>& view = forward_.parameters[id];
      const int64 neurons = case_.shape.neurons();
      view = {nullptr, Real(random_.between(low[id], high[id])), 0, neurons, 1};
      const bool of_input = id >= kInputGain;
      if (plain_ && of_input && id != other) view.constant = Real(id == kInputGain);
      const bool constant = plain_                    ? of_input || random_.toss()
                            : normalised && !of_input ? random_.toss()
                                                      : random_.once_in(8);
      // Only general kernels compute a gradient of the mean.
      const unsigned times = id == kInputMean ? (settled_ ? 10 : 2) : !settled_ || id == kWidth || of_input ? 4 : 2;
      wanted_[id] = gradients_ && !constant && (id == kInputMean ? random_.once_in(times) : !random_.once_in(times));
      if (constant) continue;
      if (by_channel && of_input) {
        view.inner = run;
        view.count = channels;
      } else if ((case_.parameters == Parameters::kInFours || (normalised && of_input)) && neurons % 4 == 0) {
        view.inner = case_.shape.inner % 4 == 0 && random_.once_in(4) ? case_.shape.inner : random_.divisor(neurons, 4);
        view.count = random_.divisor(neurons / view.inner, 1);
      } else if (case_.parameters == Parameters::kByNeuron && !random_.once_in(3)) {
        view.inner = 1;
        view.count = random_.once_in(8)   ? random_.divisor(neurons, 1)
                     : random_.once_in(4) ? 4
                                          : 4 * random_.divisor(neurons / 4, 1);
      } else if (case_.parameters == Parameters::kAny) {
        view.inner = random_.toss() ? 1 : random_.toss() ? case_.shape.inner : random_.divisor(neurons, 1);
        view.count = random_.divisor(neurons / view.inner, 1);
      }
      if (view.count == 1) view.inner = neurons;
      const bool steps = per_step && random_.toss();
      const bool misaligned = case_.parameters == Parameters::kByNeuron && random_.once_in(16);
      data_[id] = Buffer<Real>((steps ? case_.shape.steps : 1) * view.count, misaligned);
      const bool learned = (id == kWidth || id == kDecay) && !steps && random_.once_in(3);
      if (learned && id == kWidth) {
        forward_.options.log_width = true;
        data_[id].fill(random_, std::log(low[id]), std::log(high[id]));
      } else if (learned) {
        forward_.options.logit_decay = true;
        data_[id].fill(random_, -1.4, 2.9);
      } else {
        data_[id].fill(random_, low[id], high[id]);
      }
      view.data = data_[id].data();
      view.step_stride = steps ? view.count : 0;
    }
    if (infinite_) make_last_reset_infinite();
  }

  // Without a gradient of the last potential no term comes from it, not even zero times infinity.
  void make_last_reset_infinite() {
    constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
    ParameterView<Real>& view = forward_.parameters[kReset];
    if (view.step_stride == 0 && case_.shape.steps > 1) return;
    view.constant = kInfinity;
    Buffer<Real>& values = data_[kReset];
    if (view.data != nullptr)
      std::fill(values.data() + values.size() - view.count, values.data() + values.size(), kInfinity);
  }

  // The expected assumption about the input.
  Input input(bool only_spikes) const {
    bool general = kByOptions || !only_spikes || forward_.options.scale_output || forward_.options.v_rest != 0,
         plain = true;
    for (const auto& view : forward_.parameters) general = general || view.step_stride != 0;
    for (const int id : {kInputGain, kInputBias, kInputMean}) {
      const ParameterView<Real>& view = forward_.parameters[id];
      plain = plain && view.data == nullptr && view.constant == Real(id == kInputGain);
    }
    if (residual_.data() != nullptr) return general ? Input::kGeneralResidual : Input::kNormalisedResidual;
    return general ? Input::kGeneral : plain ? Input::kPlain : Input::kNormalised;
  }

  // Whether neurons in fours share the parameter.
  static bool is_shared(const ParameterView<Real>& view) { return view.data == nullptr || view.inner % 4 == 0; }

  // The expected number of neurons a thread.
  template <class... Buffers>
  int lanes(Input input, const Buffers&... buffers) const {
    const int64 neurons = case_.shape.neurons(), resident = 2048 * case_.multiprocessors;
    bool four = sizeof(Scalar) <= 4 && case_.shape.inner % 4 == 0 && (buffers.is_aligned() && ...);
    const bool settled = input == Input::kPlain || input == Input::kNormalised;
    for (int id = 0; id < kNumParameters; ++id) {
      const auto& view = forward_.parameters[id];
      const bool adjacent = view.inner == 1 && view.count % 4 == 0 && data_[id].is_aligned();
      four = four && (is_shared(view) || (settled && adjacent));
    }
    const bool general = input == Input::kGeneral || input == Input::kGeneralResidual;
    const bool pays = general ? neurons >= resident : case_.shape.steps <= 16 || neurons > 3 * resident / 16;
    return four && pays ? 4 : 1;
  }

#if defined(ASGL_TEST_CPU)
  template <class Params>
  static cudaError_t launch(const Params& params) {
    return asgl_emulation::launch_on_cpu(params);
  }
  void check_launch(const char*, bool, Input, int, Coverage&, Texts&) {}
  void check_sum(const GradientSum<Real>&, Coverage&, Texts&) {}
  static bool is_taken(const BackwardParams<Scalar>&, Input) { return true; }
#else
  template <class Params>
  static cudaError_t launch(const Params& params) {
    const cuda::Start start = asgl_emulation::start_of(params);
    if constexpr (!kByOptions) {
      if (!start.launch.kernel.is_general()) return cuda::launch_settled<Scalar>(Model{}, start);
    }
    return cuda::launch_general<Scalar>(start);
  }
  static bool is_taken(const BackwardParams<Scalar>& params, Input input) { return cuda::input_of(params) == input; }

  template <int kLanes, Input kInput>
  const void* kernel(bool backward) const {
    const int64 steps = case_.shape.steps;
    const auto address = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
    if constexpr (kIsGeneral<kInput>) {
      if (backward) return address(&lif_backward_kernel<Scalar, kLanes, kInput>);
      return address(&lif_forward_kernel<Scalar, LIFByOptions<Real>, kLanes, kInput, 0>);
    } else {
      if constexpr (kLanes == 4) {
        if (backward && steps == 4) return address(&lif_backward_settled_kernel<Scalar, Model, 4, kInput, 4>);
        if (steps == 4) return address(&lif_forward_kernel<Scalar, Model, 4, kInput, 4>);
      }
      if (backward) return address(&lif_backward_settled_kernel<Scalar, Model, kLanes, kInput, 0>);
      return address(&lif_forward_kernel<Scalar, Model, kLanes, kInput, 0>);
    }
  }

  // The expected kernel.
  const void* kernel(bool backward, Input input, int lanes) const {
    const bool residual = residual_.data() != nullptr;
    if constexpr (!kByOptions) {
      if constexpr (!std::is_same_v<Scalar, double>) {
        const auto& views = forward_.parameters;
        if (lanes == 4 && !std::all_of(std::begin(views), std::end(views), is_shared)) {
          return kernel<4, Input::kApart>(backward);
        }
        if (lanes == 4 && input == Input::kPlain) return kernel<4, Input::kPlain>(backward);
        if (lanes == 4 && input == Input::kNormalised) return kernel<4, Input::kNormalised>(backward);
        if (lanes == 4 && input == Input::kNormalisedResidual) return kernel<4, Input::kNormalisedResidual>(backward);
      }
      if (!residual && input != Input::kGeneral) return kernel<1, Input::kNormalised>(backward);
    }
    if constexpr (!std::is_same_v<Scalar, double>) {
      if (lanes == 4 && residual) return kernel<4, Input::kGeneralResidual>(backward);
      if (lanes == 4) return kernel<4, Input::kGeneral>(backward);
    }
    return residual ? kernel<1, Input::kGeneralResidual>(backward) : kernel<1, Input::kGeneral>(backward);
  }

  void check_launch(const char* what, bool backward, Input input, int lanes, Coverage& coverage, Texts& differences) {
    const auto launches = asgl_emulation::recorded_launches();
    if (launches.empty()) return;
    coverage.kernels.insert(launches.back().kernel);
    if (launches.back().kernel != kernel(backward, input, lanes)) differences.push_back(text("%s: wrong kernel", what));
    const int64 blocks = launches.back().grid.x;
    const int64 should_be = cuda::blocks_for(case_.shape.neurons(), lanes * kBlockThreads);
    if (blocks != should_be) differences.push_back(text("%s: %lld blocks, expected %lld", what, blocks, should_be));
  }

  // With enough slots a run, a block sums one element, its runs in parallel, with at most a thread a slot; otherwise
  // several elements in parallel, up to 16 runs of each.
  void check_sum(const GradientSum<Real>& sum, Coverage& coverage, Texts& differences) {
    int64 blocks = 0;
    for (int id = 0; id < sum.count; ++id) {
      const GradientPart<Real>& part = sum.parts[id];
      const int64 inner = part.parameter.inner, runs = part.neurons / (inner * part.parameter.count);
      const int64 slots = (inner + sum.tile - 2) / sum.tile + 1, elements = part.elements(case_.shape);
      const int64 elements_each = part.elements_each, runs_each = part.runs_each;
      const auto is_largest_power = [](int64 power, int64 most) {
        return (power & (power - 1)) == 0 && power <= most && most < 2 * power;
      };
      const bool whole = slots >= 8;
      const bool good =
          whole ? elements_each == 1 && is_largest_power(kSumThreads / runs_each, std::min<int64>(slots, 512))
                : elements_each * runs_each == kSumThreads &&
                      is_largest_power(runs_each, std::min<int64>({runs, 16, (131072 - 1) / elements + 1}));
      if (!good || elements_each * runs_each * part.slots_each != kSumThreads)
        differences.push_back(text("threads for %lld elements, %lld runs", elements_each, runs_each));
      const int64 most = runs_each * (inner == 1 ? 128 : 16), number = (runs - 1) / most + 1;
      const int64 splits = number > 2 ? std::min<int64>(number, 2048) : 1;
      if (part.splits != splits) differences.push_back(text("%d splits, expected %lld", part.splits, splits));
      blocks += splits * ((elements - 1) / elements_each + 1);
      coverage.whole_block_sums += whole && runs > 1 && runs_each > 1 && elements > 1;
      coverage.sums_side_by_side += elements_each > 1 && elements > 1 && runs_each > 1 && runs > runs_each;
    }
    if (asgl_emulation::blocks_of_last_launch() != blocks) differences.push_back("wrong number of blocks");
  }
#endif

  const Case& case_;
  Random random_;
  int buffers_ = 0, misaligned_ = -1;
  bool plain_, settled_, infinite_, gradients_, wanted_[kNumParameters] = {};
  int64 rng_state_[2];
  ForwardParams<Scalar> forward_{};
  Buffer<Real> data_[kNumParameters];
  Buffer<Scalar> x_seq_, residual_, s_seq_, grad_s_seq_, grad_x_seq_, grad_residual_;
  Buffer<Real> v_init_, v_last_, v_seq_, h_seq_, checkpoints_, grad_v_last_, grad_v_seq_, grad_h_seq_, grad_v_init_;
};

const char* const kInstantiations[] = {"float rectangle hard", "float sigmoid soft", "bfloat16 rectangle hard",
                                       "bfloat16 sigmoid soft", "double sigmoid soft"};

// double has one lane only.
int instantiation(const Case& it) {
  const int turn = static_cast<int>(it.number % 9);
  return turn == 8 ? 4 : turn % 4;
}

Texts run(const Case& it, Coverage& coverage) {
  switch (instantiation(it)) {
    case 0:
      return Trial<float, Surrogate::kRectangle, true>(it).run(coverage);
    case 1:
      return Trial<float, Surrogate::kSigmoid, false>(it).run(coverage);
    case 2:
      return Trial<BFloat16, Surrogate::kRectangle, true>(it).run(coverage);
    case 3:
      return Trial<BFloat16, Surrogate::kSigmoid, false>(it).run(coverage);
    default:
      return Trial<double, Surrogate::kSigmoid, false>(it).run(coverage);
  }
}

Texts run_by_options(const Case& it, Coverage& coverage) {
  if (it.number % 3 == 0) return Trial<float, Surrogate::kSigmoid, false, true>(it).run(coverage);
  if (it.number % 9 == 4) return Trial<float, Surrogate::kInteger, false, true>(it).run(coverage);
  if (it.number % 9 == 1) return Trial<double, Surrogate::kRectangle, false, true>(it).run(coverage);
  if (it.number % 3 == 1) return Trial<BFloat16, Surrogate::kSigmoid, true, true>(it).run(coverage);
  return {};
}

// Cases with numbers of their own come first, so that the numbers of other cases stay.
constexpr unsigned kFirstByNeuron = 3000, kFirstByThreshold = 4000;
constexpr int64 kManyNeurons = 3700 * kBlockThreads - 1;

std::vector<SequenceShape> shapes(bool small) {
  std::vector<SequenceShape> all;
  if (kOnCpu) {  // several tiles of 1024 neurons, not aligned with rows, on two threads
    for (const int64 steps : {17, 4, 33}) {
      for (const auto& [outer, inner] : {std::pair{4, 700}, {1, 2800}, {7, 400}}) all.push_back({outer, steps, inner});
    }
  }
  if (small) {
    for (const int64 steps : {5, 17}) {
      for (const auto& [outer, inner] : {std::pair{1, 7}, {1, 257}, {1, 260}, {4, 128}, {2, 64}, {1, 516}, {3, 172}}) {
        all.push_back({outer, steps, inner});
      }
    }
    all.push_back({1, 2, 1027});
    return all;
  }
  for (const int64 steps : {17, 4, 1, 33, 8, 5, 2, 16, 9, 100, 27}) {  // first those that find most mistakes
    for (const int64 neurons : {1, 7, 31, 128, 257, 512, 700}) all.push_back({1, steps, neurons});
    for (const auto& [outer, inner] : {std::pair{3, 4}, {6, 10}, {5, 7}, {4, 128}, {28, 25}}) {
      all.push_back({outer, steps, inner});
    }
  }
  for (const int64 steps : {4, 17}) {
    all.push_back({1, steps, 4096});
    all.push_back({8, steps, 512});
  }
  all.push_back({1, 3, 897});  // eight tiles
  // A thread sums seven or eight slots, and eight or nine.
  if (!kOnCpu) all.push_back({1, 1, kManyNeurons}), all.push_back({1, 1, kManyNeurons + 500 * kBlockThreads});
  for (const int64 inner : {840, 903}) all.push_back({12, 3, inner});  // runs that overlap eight tiles, and nine
  return all;
}

#if !defined(ASGL_TEST_CPU)
// Indices of settled kernels have 31 bits.
bool many_neurons_are_general() {
  ForwardParams<float> params{};
  params.parameters[kInputGain].constant = 1;
  params.shape = {1, 1, (int64{1} << 31) - 1};
  const bool settled = cuda::input_of(params) == Input::kPlain;
  ++params.shape.inner;
  return settled && cuda::input_of(params) == Input::kGeneral;
}

// Sums of small integers by the launches of gradient sums alone, for more neurons than the trials have.
int wrong_sums(bool small) {
  struct Shape {
    int64 inner, count, runs, steps;
  };
  int wrong = 0;
  Random random(7);
  for (const auto& [inner, count, runs, steps] : {Shape{1, 100, 5000, 1},
                                                  {1, 64, 5000, 1},
                                                  {1, 7, 30000, 2},
                                                  {1, 3, 300001, 1},
                                                  {3, 5, 2000, 1},
                                                  {4, 1000, 50, 3},
                                                  {130, 2, 3000, 1},
                                                  {1, 140000, 3, 1},
                                                  {1, 524291, 2, 1},
                                                  {2000, 1, 600, 2}}) {
    for (const int64 tile : {int64{kBlockThreads}, int64{4 * kBlockThreads}}) {
      const SequenceShape shape{1, steps, inner * count * runs};
      const ParameterView<float> view{nullptr, 0, steps > 1 ? count : 0, inner, count};
      const int64 slots =
          GradientPartials<float>::slots_for(inner, shape.neurons(), cuda::blocks_for(shape.inner, tile));
      if (small && slots > 40000) continue;
      Buffer<float> partials(steps * slots, 0), sums(steps * count, 0);
      std::vector<double> expected(steps * count);
      for (int64 t = 0; t < steps; ++t) {
        const auto put = [&](int64 slot, int64 element) {
          const double value = random.one_of({0, 1, 2});
          partials.set(t * slots + slot, value);
          expected[t * count + element] += value;
        };
        if (view.repeats_in(tile)) {
          for (int64 slot = 0; slot < cuda::blocks_for(shape.inner, tile) * count; ++slot) put(slot, slot % count);
          continue;
        }
        for (int64 run = 0; run < count * runs; ++run) {
          for (int64 k = run * inner / tile; k <= ((run + 1) * inner - 1) / tile; ++k) {
            put(GradientPartials<float>::slot(inner, run, k), run % count);
          }
        }
      }
      Texts differences;
      GradientSum<float> sum{shape, tile, 1, {}};
      sum.parts[0] = {{partials.data(), slots}, view, Derivative::kNone, sums.data(), shape.neurons()};
      bool split = false;
      sum_gradients(sum, differences, [&](const auto& launched) { split = split || launched.num_totals() > 0; });
      if (inner == 130 && !split) differences.push_back("long runs are not split");
      for (int64 i = 0; i < steps * count; ++i) {
        if (!(sums.data()[i] == expected[i])) differences.push_back(text("element %lld", i));
      }
      if (sums.overrun()) differences.push_back("values beyond the last");
      wrong += !differences.empty();
      if (differences.empty()) continue;
      std::printf("sum of %lld runs of %lld values, %lld neurons each, %lld steps, in tiles of %lld: %s\n", runs, count,
                  inner, steps, tile, differences[0].c_str());
    }
  }
  return wrong;
}
#else
bool many_neurons_are_general() { return true; }
int wrong_sums(bool) { return 0; }
#endif

// analog_below from the state is clamped to [0, kAlwaysAnalog].
bool analog_below_in_state_is_resolved() {
  constexpr int64 kLimit = std::numeric_limits<int64>::max(), kAlways = kAlwaysAnalog;
  for (const int64 below : {-kLimit, int64{-1}, int64{0}, int64{1}, kAlways - 1, kAlways, kAlways + 1, kLimit}) {
    const int64 state[] = {7, 11, below};
    const NoiseParams resolved = NoiseParams{state, kAnalogBelowInState}.resolved();
    if (resolved.analog_below != std::clamp<int64>(below, 0, kAlways) || resolved.rng_state != state) return false;
  }
  for (const uint32 below : {uint32{0}, uint32{1}, kAlwaysAnalog - 1, kAlwaysAnalog}) {
    if (NoiseParams{nullptr, below}.resolved().analog_below != below) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  asgl_emulation::choose_mutant();
  const bool small = argc > 1 && std::string(argv[1]) == "small";
  Coverage coverage;
  unsigned cases = 0, number = 0;
  int failed = 0;
  if (!many_neurons_are_general()) {
    ++failed;
    std::printf("settled kernels for the wrong numbers of neurons\n");
  }
  failed += wrong_sums(small);
  if (!analog_below_in_state_is_resolved()) {
    ++failed;
    std::printf("a wrong share of analog elements from the state\n");
  }
  const auto try_all = [&](const SequenceShape& shape, Parameters parameters, unsigned& number) {
    // Any grid fills a device without multiprocessors, so that a thread gets four lanes wherever the layout allows it.
    const std::vector<int> fours = small ? std::vector{0, 132, 0} : std::vector{0, 132, 0, 1};
    for (const int multiprocessors : shape.inner % 4 == 0 ? fours : std::vector(small ? 1 : 2, 0)) {
      if (failed >= asgl_emulation::kManyFailures) break;
      if (shape.neurons() >= kManyNeurons && parameters > Parameters::kUniform) continue;
      const Case it{shape, parameters, multiprocessors, number++};
      ++cases;
      Texts differences = run(it, coverage);
      const bool by_options = differences.empty();
      if (by_options) differences = run_by_options(it, coverage);
      failed += !differences.empty();
      if (differences.empty()) continue;
      std::printf("case %u: %s%s, (%lld, %lld, %lld), %s parameters, %d multiprocessors:", it.number,
                  by_options ? "by options instead of " : "", kInstantiations[instantiation(it)], shape.outer,
                  shape.steps, shape.inner, kParametersNames[static_cast<int>(parameters)], multiprocessors);
      for (const std::string& difference : differences) std::printf(" %s;", difference.c_str());
      std::printf("\n");
    }
  };
  unsigned by_threshold = kFirstByThreshold, by_neuron = kFirstByNeuron;
  for (const SequenceShape& shape : {SequenceShape{1, 5, 257}, {1, 4, 260}, {3, 17, 172}}) {
    for (const Parameters parameters : {Parameters::kPlain, Parameters::kUniform}) {
      if (failed >= asgl_emulation::kManyFailures) break;
      const Case it{shape, parameters, 0, by_threshold++, true};
      ++cases;
      const Texts differences = Trial<float, Surrogate::kRectangle, true>(it).run(coverage);
      failed += !differences.empty();
      for (const std::string& difference : differences) {
        std::printf("case %u: by the threshold: %s\n", it.number, difference.c_str());
      }
    }
  }
  for (const SequenceShape& shape : shapes(small)) {
    if (shape.inner % 4 != 0) continue;
    const int times = shape.steps == 4 ? 4 : 1;  // for the kernels of this length
    for (int i = 0; i < times; ++i) try_all(shape, Parameters::kByNeuron, by_neuron);
  }
  for (const SequenceShape& shape : shapes(small)) {
    for (const Parameters parameters :
         {Parameters::kPlain, Parameters::kNormalised, Parameters::kUniform, Parameters::kInFours, Parameters::kAny}) {
      try_all(shape, parameters, number);
    }
  }
  std::printf("%d of %u cases failed; %zu kernels; sums of several runs: %d by whole blocks, %d side by side\n", failed,
              cases, coverage.kernels.size(), coverage.whole_block_sums, coverage.sums_side_by_side);
  const bool covered =
      small || (coverage.kernels.size() == kKernels && coverage.whole_block_sums > 0 && coverage.sums_side_by_side > 0);
  return failed == 0 && (covered || kOnCpu) ? 0 : 1;
}
