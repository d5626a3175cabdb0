// The CUDA kernels and their launchers, run by the emulation, against a plain loop over neurons and steps; with
// ASGL_TEST_CPU the CPU kernels. No torch, and few instantiations: it compiles in seconds, also for a sanitizer.
// `kernels_test small` runs fewer cases, for an emulation in which every CUDA thread is an OS thread.
#include <algorithm>
#include <limits>

#if defined(ASGL_TEST_CPU)
#include "cpu/neuron.cpp"
#else
#include "cuda/choose.cuh"
#endif
#include "trials.h"

namespace {

using namespace asgl;
using asgl_emulation::Buffer;
using asgl_emulation::check;
using asgl_emulation::kOnCpu;
using asgl_emulation::Random;
using asgl_emulation::same;
using asgl_emulation::text;
using asgl_emulation::Texts;

// ---- the results that the kernels must have ----

struct Sum {
  double total = 0, magnitude = 0;
  int64 terms = 0;

  void add(double term) { total += term, magnitude += std::fabs(term), ++terms; }
};

template <class Real>
struct Expected {
  std::vector<Real> s_seq, h_seq, v_seq, v_last, grad_x_seq, grad_v_init;
  std::vector<Sum> grad_parameters[kNumParameters];
};

bool is_analog(const NoiseParams& noise, int64 n, int64 t) {
  if (!noise.drawn()) return noise.analog_below > 0;
  const NoiseBlock block =
      noise_block(static_cast<uint64>(n / 4), static_cast<uint32>(t / 2), noise_key(noise.rng_state));
  return (block.draws[t % 2] >> (16 * (n % 4)) & 0xFFFFu) < noise.analog_below;
}

template <class Model, class Scalar>
Expected<Real_t<Scalar>> expect(const BackwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const SequenceShape& shape = params.shape;
  const NeuronOptions<Real>& options = params.options;
  Expected<Real> expected;
  for (auto* sequence : {&expected.s_seq, &expected.h_seq, &expected.v_seq, &expected.grad_x_seq}) {
    sequence->resize(shape.neurons() * shape.steps);
  }
  for (auto* state : {&expected.v_last, &expected.grad_v_init}) state->resize(shape.neurons());
  for (int id = 0; id < kNumParameters; ++id) {
    const ParameterView<Real>& parameter = params.parameters[id];
    expected.grad_parameters[id].resize((parameter.step_stride != 0 ? shape.steps : 1) * parameter.count);
  }

  std::vector<Neuron<Real>> neurons(shape.steps);
  std::vector<Real> spikes(shape.steps), v_before(shape.steps);
  for (int64 n = 0; n < shape.neurons(); ++n) {
    State<Real> state = params.at_rest();
    for_each_member([n](const Real* all, Real& own) { own = all != nullptr ? all[n] : own; }, params.init, state);
    for (int64 t = 0; t < shape.steps; ++t) {
      const int64 element = shape.element(n, t);
      neurons[t] =
          neuron_of<Real>([&](ParameterId id) { return value_of(id, params.parameters[id].at(n, t), options); });
      v_before[t] = state.v;
      const Real x = to_real(params.x_seq[element]);
      const Real h = Model::template charge<Input::kGeneral>(x, state, neurons[t], options);
      const Real s = Model::fire(h, is_analog(params.noise, n, t), neurons[t], Firing<Real>(options));
      Model::reset(h, s, neurons[t], state);
      spikes[t] = s;
      expected.h_seq[element] = h;
      expected.v_seq[element] = state.v;
      expected.s_seq[element] = options.scale_output ? s * neurons[t].v_threshold : s;
    }
    expected.v_last[n] = state.v;

    bool carried = exists(params.grad_last);
    State<Real> d_state{};
    if (carried) for_each_member([n](const Real* all, Real& own) { own = all[n]; }, params.grad_last, d_state);
    for (int64 t = shape.steps - 1; t >= 0; --t) {
      const int64 element = shape.element(n, t);
      const Neuron<Real>& neuron = neurons[t];
      const Real h = expected.h_seq[element], s = spikes[t];
      Real g = params.grad_s_seq != nullptr ? to_real(params.grad_s_seq[element]) : Real(0);
      const Real gh = params.grad_h_seq != nullptr ? params.grad_h_seq[element] : Real(0);
      if (params.grad_v_seq != nullptr) {
        d_state.v += params.grad_v_seq[element];
        carried = true;
      }
      const auto add = [&](ParameterId id, double term) {
        const ParameterView<Real>& parameter = params.parameters[id];
        const int64 row = parameter.step_stride != 0 ? t * parameter.count : 0;
        expected.grad_parameters[id][row + parameter.index(n)].add(term);
      };
      if (options.scale_output) {
        add(kThreshold, static_cast<double>(g) * s);
        g = g * neuron.v_threshold;
      }
      const Real dv = d_state.v;
      const Real ds = Model::spike_gradient(g, h, carried && !options.detach_reset, neuron, d_state.v);
      const StepGradient<Real> step = Model::step_adjoint(ds, gh, h, s, carried, neuron, options, d_state);
      const double dy = step.dy, dh = step.dh, dc = step.dc;
      const double width = value_of(kWidth, params.parameters[kWidth].at(n, t), options), decay = neuron.decay;
      add(kWidth, -dy * (h - neuron.v_threshold) / (options.log_width ? width : width * width));
      add(kDecay, dh * (v_before[t] - options.v_rest) * (options.logit_decay ? (1 - decay) * decay : 1));
      add(kThreshold, -dy / width);
      if (carried) add(kReset, Model::kResetsHard ? static_cast<double>(dv) * s : -static_cast<double>(dv) * s);
      add(kInputGain, dc * (static_cast<double>(to_real(params.x_seq[element])) - neuron.input_mean));
      add(kInputBias, dc);
      add(kInputMean, -dc * neuron.input_gain);
      expected.grad_x_seq[element] = neuron.input_gain * step.dc;
      carried = true;
    }
    expected.grad_v_init[n] = d_state.v;
  }
  return expected;
}

// ---- comparison ----

// They are equal, except for the sign of a zero: charge may give another where it takes something for granted.
template <class Element>
void compare(const char* name, const Buffer<Element>& found, const std::vector<Real_t<Element>>& expected,
             Texts& differences) {
  for (int64 i = 0; i < found.size(); ++i) {
    const double is = to_real(found.data()[i]), should_be = to_real(from_real<Element>(expected[i]));
    if (same(is, should_be)) continue;
    differences.push_back(text("%s[%lld] is %.9g, expected %.9g", name, i, is, should_be));
    return;
  }
}

// A kernel adds up a thread's terms, of at most four neurons, then the sums of 128 threads in five and three additions,
// all in Real, and on the CPU the terms of up to 16 neurons, then in double; a few more make the term. Each rounding is
// at most half an epsilon of the sum of all magnitudes, or half the least number of all: a width's is divided by its
// square, at least a quarter.
template <class Real>
void compare(const std::string& name, const Buffer<Real>& found, const std::vector<Sum>& expected, int64 steps,
             Texts& differences) {
  const double tolerance = static_cast<double>(std::numeric_limits<Real>::epsilon()) * ((kOnCpu ? 8 : 2) * steps + 8);
  for (int64 i = 0; i < found.size(); ++i) {
    const double is = found.data()[i], should_be = expected[i].total;
    const double least = 2.0 * std::numeric_limits<Real>::denorm_min() * expected[i].terms;
    if (std::fabs(is - should_be) <= tolerance * expected[i].magnitude + least) continue;
    differences.push_back(text("%s[%lld] is %.9g, expected %.9g", name.c_str(), i, is, should_be));
    return;
  }
}

// ---- a case ----

enum class Parameters { kPlain, kNormalised, kUniform, kInFours, kAny };
const char* const kParametersNames[] = {"plain", "normalised", "uniform", "shared in fours", "shared at random"};
const char* const kParameterNames[] = {"width",      "decay",      "v_threshold", "reset",
                                       "input_gain", "input_bias", "input_mean"};

// The number decides whatever the rest leaves open.
struct Case {
  SequenceShape shape;
  Parameters parameters;
  int multiprocessors;
  unsigned number;
};

struct Coverage {
  int one_lane = 0, four_lanes = 0, whole_block_sums = 0, normalised_forward = 0, normalised_backward = 0;
};

template <class Scalar, Surrogate kSurrogate, bool kHardReset>
class Trial {
  using Model = LIF<kSurrogate, kHardReset>;
  using Real = Real_t<Scalar>;

 public:
  explicit Trial(const Case& it) : case_(it), random_(it.number) {
    // Much less than elsewhere may be asked for where a kernel of its own is to run in most cases.
    const bool plain = it.parameters == Parameters::kPlain || it.parameters == Parameters::kNormalised;
    const int64 neurons = it.shape.neurons(), elements = neurons * it.shape.steps;
    if (random_.once_in(4)) misaligned_ = static_cast<int>(random_.between(0, 13));
    infinite_ = random_.once_in(it.shape.steps == 1 ? 2 : 8);
    gradients_ = !infinite_ && !random_.once_in(4);

    forward_.shape = it.shape;
    const bool strict = random_.toss(), scaled = random_.once_in(plain ? 4 : 2), detached = random_.toss();
    const bool rests_at_zero = plain ? !random_.once_in(8) : random_.toss();
    forward_.options = {Real(rests_at_zero ? 0.0 : random_.between(-0.2, 0.2)),
                        Real(random_.toss() ? 1.0 : 1.5),
                        kSurrogate,
                        kHardReset,
                        strict,
                        scaled,
                        detached && !infinite_};
    const uint32 analog_below[] = {0, 20000, 20000, 20000, 65535, 65536};
    rng_state_[0] = static_cast<int64>(random_.between(-1e18, 1e18));
    rng_state_[1] = static_cast<int64>(random_.between(-1e10, 1e10));
    forward_.noise = {rng_state_, analog_below[it.number % 6]};
    make_parameters();

    x_seq_ = input<Scalar>(true, elements, -1, 2);
    v_init_ = input<Real>(random_.toss(), neurons, -0.5, 1);
    s_seq_ = output<Scalar>(true, elements);
    v_last_ = output<Real>(random_.toss(), neurons);
    v_seq_ = output<Real>(random_.once_in(plain ? 8 : 2), elements);
    h_seq_ = output<Real>(random_.once_in(plain ? 8 : 2), elements);
    checkpoints_ = output<Real>(!random_.once_in(8), (it.shape.steps - 1) / kCheckpointSteps * neurons);
    grad_s_seq_ = input<Scalar>(!random_.once_in(8), elements, -1, 1);
    grad_v_last_ = input<Real>(random_.toss() && !infinite_, neurons, -1, 1);
    grad_v_seq_ = input<Real>(random_.once_in(plain ? 8 : 2) && !infinite_, elements, -1, 1);
    grad_h_seq_ = input<Real>(random_.once_in(plain ? 8 : 2), elements, -1, 1);
    grad_x_seq_ = output<Scalar>(!random_.once_in(8), elements);
    grad_v_init_ = output<Real>(random_.toss(), neurons);
  }

  Texts run(Coverage& coverage) {
    Texts differences;
    asgl_emulation::settings().multiprocessors = case_.multiprocessors;
    asgl_emulation::clear_recorded_launches();

    forward_.x_seq = x_seq_.data();
    forward_.init.v = v_init_.data();
    forward_.s_seq = s_seq_.data();
    forward_.last.v = v_last_.data();
    forward_.v_seq = v_seq_.data();
    forward_.h_seq = h_seq_.data();
    forward_.checkpoints.v = checkpoints_.data();
    const int forward_lanes = lanes(x_seq_, v_init_, s_seq_, v_last_, v_seq_, h_seq_, checkpoints_);
    ++(forward_lanes == 4 ? coverage.four_lanes : coverage.one_lane);
    check("cut", cuda::cut(forward_), differences);
    check("forward", cuda::launch(Model{}, forward_, nullptr), differences);
    coverage.normalised_forward += last_is_normalised();
    check_blocks("forward", forward_lanes, differences);

    BackwardParams<Scalar> backward{};
    static_cast<LIFParams<Scalar>&>(backward) = forward_;
    backward.grad_s_seq = grad_s_seq_.data();
    backward.grad_last.v = grad_v_last_.data();
    backward.grad_v_seq = grad_v_seq_.data();
    backward.grad_h_seq = grad_h_seq_.data();
    backward.checkpoints.v = checkpoints_.data();
    backward.grad_x_seq = grad_x_seq_.data();
    backward.grad_init.v = grad_v_init_.data();
    const Expected<Real> expected = expect<Model>(backward);
    compare("s_seq", s_seq_, expected.s_seq, differences);
    compare("v_last", v_last_, expected.v_last, differences);
    compare("v_seq", v_seq_, expected.v_seq, differences);
    compare("h_seq", h_seq_, expected.h_seq, differences);
    if (checkpoints_.data() == nullptr) return differences;

    check("cut", cuda::cut(backward), differences);
    Buffer<Real> partials[kNumParameters], sums[kNumParameters];
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wanted_[id]) continue;
      const int64 rows = forward_.parameters[id].step_stride != 0 ? case_.shape.steps : 1;
      const int64 slots = case_.shape.neurons() / forward_.parameters[id].inner + backward.tiles.count;
      partials[id] = Buffer<Real>(rows * slots, 0);
      sums[id] = Buffer<Real>(rows * forward_.parameters[id].count, 0);
      backward.partials[id] = {partials[id].data(), slots};
    }
    const int backward_lanes = lanes(x_seq_, v_init_, grad_s_seq_, grad_v_last_, grad_v_seq_, grad_h_seq_, checkpoints_,
                                     grad_x_seq_, grad_v_init_);
    check("backward", cuda::launch(Model{}, backward, nullptr), differences);
    coverage.normalised_backward += last_is_normalised();
    check_blocks("backward", backward_lanes, differences);
    compare("grad_x_seq", grad_x_seq_, expected.grad_x_seq, differences);
    compare("grad_v_init", grad_v_init_, expected.grad_v_init, differences);
    GradientSum<Real> sum{case_.shape, backward.tiles.tile, 0, {}};
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wanted_[id]) continue;
      const Derivative derivative = id == kWidth
                                        ? forward_.options.log_width ? Derivative::kOfLogWidth : Derivative::kOfWidth
                                    : id == kDecay && forward_.options.logit_decay ? Derivative::kOfLogitDecay
                                                                                   : Derivative::kNone;
      sum.parts[sum.count++] = {backward.partials[id], forward_.parameters[id], derivative, false, 0, sums[id].data()};
    }
    if (sum.count == 0) return differences;
    check("cut", cuda::cut(sum), differences);
    check("sum", cuda::launch(sum, nullptr), differences);
    int64 blocks = 0;
    for (int part = 0; part < sum.count; ++part) {
      blocks += sum.parts[part].blocks;
      coverage.whole_block_sums += sum.parts[part].block_each && sum.parts[part].blocks > 1;
    }
    if (!kOnCpu && asgl_emulation::blocks_of_last_launch() != blocks) differences.push_back("wrong number of blocks");
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wanted_[id]) continue;
      compare(std::string("grad_") + kParameterNames[id], sums[id], expected.grad_parameters[id], case_.shape.steps,
              differences);
    }
    return differences;
  }

 private:
  // The buffer whose turn it is lies one element beyond an aligned address.
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
    const bool plain = case_.parameters == Parameters::kPlain, normalised = case_.parameters == Parameters::kNormalised;
    const bool per_step = !plain && random_.once_in(normalised ? 8 : 3);
    // All parameters of the input have one value a channel, channels_last or not.
    const bool by_channel = kOnCpu && normalised && !random_.once_in(3);
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
      if (plain && of_input && id != other) view.constant = Real(id == kInputGain);
      const bool constant = plain                     ? of_input || random_.toss()
                            : normalised && !of_input ? random_.toss()
                                                      : random_.once_in(8);
      // Seldom others than a width's and, for normalised ones, an input gain's and bias', or few cases would be what
      // the kernels for these are for; those of a CPU are for decay, threshold and reset, too.
      const bool common = plain ? id == kWidth : !normalised || id == kWidth || id == kInputGain || id == kInputBias;
      wanted_[id] = gradients_ && !constant &&
                    (common ? !random_.once_in(4)
                            : random_.once_in(kOnCpu       ? 2
                                              : normalised ? 10
                                                           : 5));
      if (constant) continue;
      if (by_channel && of_input) {
        view.inner = run;
        view.count = channels;
      } else if ((case_.parameters == Parameters::kInFours || (normalised && of_input)) && neurons % 4 == 0) {
        view.inner = random_.divisor(neurons, 4);
        view.count = random_.divisor(neurons / view.inner, 1);
      } else if (case_.parameters == Parameters::kAny) {
        view.inner = random_.toss() ? 1 : random_.divisor(neurons, 1);
        view.count = random_.divisor(neurons / view.inner, 1);
      }
      if (view.count == 1) view.inner = neurons;
      const bool steps = per_step && (of_input || !normalised) && random_.toss();
      data_[id] = Buffer<Real>((steps ? case_.shape.steps : 1) * view.count, 0);
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

  // Where no gradient of the last potential is given, none comes from it, not even zero times infinity.
  void make_last_reset_infinite() {
    constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
    ParameterView<Real>& view = forward_.parameters[kReset];
    if (view.step_stride == 0 && case_.shape.steps > 1) return;
    view.constant = kInfinity;
    Buffer<Real>& values = data_[kReset];
    if (view.data != nullptr)
      std::fill(values.data() + values.size() - view.count, values.data() + values.size(), kInfinity);
  }

  // It says how many neurons a thread is to get.
  template <class... Buffers>
  int lanes(const Buffers&... buffers) const {
    bool four = case_.multiprocessors == 0 && sizeof(Scalar) <= 4 && case_.shape.inner % 4 == 0;
    for (const auto& view : forward_.parameters) four = four && view.inner % 4 == 0;
    return four && (buffers.is_aligned() && ...) ? 4 : 1;
  }

  // It says whether the last launch was of a kernel for normalised input.
  static bool last_is_normalised() {
#if !defined(ASGL_TEST_CPU)
    if constexpr (!std::is_same_v<Scalar, double>) {
      constexpr Input kInput = Input::kNormalised;
      const auto launches = asgl_emulation::recorded_launches();
      const auto is = [&](auto* kernel) { return launches.back().kernel == reinterpret_cast<const void*>(kernel); };
      return !launches.empty() && (is(&lif_forward_kernel<Scalar, Model, 4, kInput>) ||
                                   is(&lif_backward_uniform_kernel<Scalar, Model, 4, kInput>) ||
                                   is(&lif_backward_uniform_kernel<Scalar, Model, 8, kInput>) ||
                                   is(&lif_backward_uniform_kernel<Scalar, Model, 16, kInput>));
    }
#endif
    return false;
  }

  void check_blocks(const char* what, int64 lanes, Texts& differences) {
    if (kOnCpu) return;
    const int64 blocks = asgl_emulation::blocks_of_last_launch();
    const int64 should_be = cuda::blocks_for(case_.shape.neurons(), lanes * kBlockThreads);
    if (blocks != should_be) differences.push_back(text("%s: %lld blocks, expected %lld", what, blocks, should_be));
  }

  const Case& case_;
  Random random_;
  int buffers_ = 0, misaligned_ = -1;
  bool infinite_, gradients_, wanted_[kNumParameters] = {};
  int64 rng_state_[2];
  ForwardParams<Scalar> forward_{};
  Buffer<Real> data_[kNumParameters];
  Buffer<Scalar> x_seq_, s_seq_, grad_s_seq_, grad_x_seq_;
  Buffer<Real> v_init_, v_last_, v_seq_, h_seq_, checkpoints_, grad_v_last_, grad_v_seq_, grad_h_seq_, grad_v_init_;
};

const char* const kInstantiations[] = {"float rectangle hard", "float sigmoid soft", "bfloat16 rectangle hard",
                                       "bfloat16 sigmoid soft", "double sigmoid soft"};

// double has but one lane, and so less to go wrong.
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

std::vector<SequenceShape> shapes(bool small) {
  std::vector<SequenceShape> all;
  if (kOnCpu) {  // several tiles, of 1024 neurons, that no row or channel here fills, on two threads
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
    return all;
  }
  for (const int64 steps : {17, 4, 1, 33, 8, 5, 2, 16, 100}) {  // first those that find most mistakes
    for (const int64 neurons : {1, 7, 31, 128, 257, 512, 700}) all.push_back({1, steps, neurons});
    for (const auto& [outer, inner] : {std::pair{3, 4}, {6, 10}, {5, 7}, {4, 128}, {28, 25}}) {
      all.push_back({outer, steps, inner});
    }
  }
  for (const int64 steps : {4, 17}) {
    all.push_back({1, steps, 4096});
    all.push_back({8, steps, 512});
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kManyFailures = 3;
  asgl_emulation::choose_mutant();
  const bool small = argc > 1 && std::string(argv[1]) == "small";
  Coverage coverage;
  unsigned cases = 0;
  int failed = 0;
  for (const SequenceShape& shape : shapes(small)) {
    for (const Parameters parameters :
         {Parameters::kPlain, Parameters::kNormalised, Parameters::kUniform, Parameters::kInFours, Parameters::kAny}) {
      // Any grid fills a device without multiprocessors, so that a thread gets four lanes wherever the layout allows
      // it.
      for (const int multiprocessors : shape.inner % 4 == 0 ? std::vector{0, 132, 0} : std::vector{0}) {
        if (failed == kManyFailures) break;
        const Case it{shape, parameters, multiprocessors, cases++};
        const Texts differences = run(it, coverage);
        failed += !differences.empty();
        if (differences.empty()) continue;
        std::printf("case %u: %s, (%lld, %lld, %lld), %s parameters, %d multiprocessors:", it.number,
                    kInstantiations[instantiation(it)], shape.outer, shape.steps, shape.inner,
                    kParametersNames[static_cast<int>(parameters)], multiprocessors);
        for (const std::string& difference : differences) std::printf(" %s;", difference.c_str());
        std::printf("\n");
      }
    }
  }
  std::printf(
      "%d of %u cases failed; %d ran with four lanes, %d with one; %d sums by whole blocks; normalised: %d "
      "forward, %d backward\n",
      failed, cases, coverage.four_lanes, coverage.one_lane, coverage.whole_block_sums, coverage.normalised_forward,
      coverage.normalised_backward);
  const bool covered = coverage.four_lanes > 0 && coverage.one_lane > 0 && coverage.whole_block_sums > 0 &&
                       coverage.normalised_forward > 0 && coverage.normalised_backward > 0;
  return failed == 0 && (covered || kOnCpu) ? 0 : 1;
}
