// The CUDA kernels of the leaky integrator and their launchers, run by the emulation, against a plain loop over neurons
// and steps; with ASGL_TEST_CPU the CPU kernels. `integrator_test small` runs fewer cases, for an emulation in which
// every CUDA thread is an OS thread.
#include <set>

#if defined(ASGL_TEST_CPU)
#include "cpu/integrator.cpp"
#include "cpu/neuron.cpp"
namespace asgl::cpu {  // run by other tests
template <class Params>
void run_adaptive(const Params&) {
  std::abort();
}
template <class Params>
void run_settled(const Params&) {
  std::abort();
}
}  // namespace asgl::cpu
#else
#include "cuda/launch_integrator.cu"
#include "cuda/launch_neuron.cuh"
#endif
#include "expected.h"
#include "trials.h"

namespace {

using namespace asgl;
using asgl_emulation::Buffer;
using asgl_emulation::check;
using asgl_emulation::compare;
using asgl_emulation::kOnCpu;
using asgl_emulation::plan;
using asgl_emulation::Random;
using asgl_emulation::Sum;
using asgl_emulation::text;
using asgl_emulation::Texts;

constexpr ParameterId kIds[] = {kDecay, kInputGain};
const char* const kNames[] = {"grad_decay", "grad_input_gain"};

// The number seeds all other choices.
template <class Scalar>
class Trial {
  using Real = Real_t<Scalar>;

 public:
  Trial(const SequenceShape& shape, int multiprocessors, unsigned number)
      : shape_(shape), multiprocessors_(multiprocessors), random_(number) {
    const int64 neurons = shape.neurons(), elements = neurons * shape.steps;
    if (random_.once_in(4)) misaligned_ = static_cast<int>(random_.between(0, 9));
    params_.shape = shape;
    params_.delay = random_.toss();
    params_.options.v_rest = Real(random_.toss() ? 0.0 : random_.between(-0.5, 0.5));
    for (ParameterView<Real>& view : params_.parameters) view = {nullptr, Real(1), 0, neurons, 1};
    for (int i = 0; i < 2; ++i) make_parameter(i);
    x_seq_ = input<Scalar>(true, elements);
    init_ = input<Real>(random_.toss(), neurons);
    v_seq_ = output<Scalar>(true, elements);
    last_ = output<Real>(random_.toss(), neurons);
    g_ = input<Scalar>(true, elements);
    grad_last_ = input<Real>(random_.toss(), neurons);
    grad_x_seq_ = output<Scalar>(!random_.once_in(8), elements);
    grad_init_ = output<Real>(random_.toss(), neurons);
  }

  Texts run(std::set<const void*>& kernels) {
    asgl_emulation::settings().multiprocessors = multiprocessors_;
    params_.x_seq = x_seq_.data();
    params_.v_init = init_.data();
    params_.v_seq = v_seq_.data();
    params_.v_last = last_.data();
    plan(params_);
    launch("forward", lanes(x_seq_, init_, v_seq_, last_), kernels);
    expect();
    compare("v_seq", v_seq_, v_, differences_);
    compare("v_last", last_, v_last_, differences_);

    params_.v_last = nullptr;
    if (!wanted_[0]) params_.v_seq = nullptr;
    if (!wanted_[1]) params_.x_seq = nullptr;
    params_.grad_v_seq = g_.data();
    params_.grad_v_last = grad_last_.data();
    params_.grad_x_seq = grad_x_seq_.data();
    params_.grad_v_init = grad_init_.data();
    Real later;  // any non-null pointer: plan_tiles() needs to know which sums are wanted
    for (int i = 0; i < 2; ++i) {
      if (wanted_[i]) params_.partials[kIds[i]].data = &later;
    }
    plan(params_);
    Buffer<Real> partials[2], sums[2];
    GradientSum<Real> sum{shape_, params_.tiles.tile, 0, {}};
    for (int i = 0; i < 2; ++i) {
      if (!wanted_[i]) continue;
      const ParameterView<Real>& view = params_.parameters[kIds[i]];
      const int64 rows = view.step_stride != 0 ? shape_.steps : 1;
      const int64 slots = GradientPartials<Real>::slots_for(view.inner, shape_.neurons(), params_.tiles.count);
      partials[i] = Buffer<Real>(rows * slots, 0);
      sums[i] = Buffer<Real>(rows * view.count, 0);
      params_.partials[kIds[i]] = {partials[i].data(), slots};
      const auto derivative = i == 0 && params_.options.logit_decay ? Derivative::kOfLogitDecay : Derivative::kNone;
      sum.parts[sum.count++] = {params_.partials[kIds[i]], view, derivative, sums[i].data(), shape_.neurons()};
    }
    const Buffer<Scalar> none;
    launch(
        "backward",
        lanes(wanted_[1] ? x_seq_ : none, init_, wanted_[0] ? v_seq_ : none, g_, grad_last_, grad_x_seq_, grad_init_),
        kernels);
    compare("grad_x_seq", grad_x_seq_, dx_, differences_);
    compare("grad_init", grad_init_, d_init_, differences_);
    if (sum.count == 0) return differences_;
    asgl_emulation::sum_gradients(sum, differences_, [](const auto&) {});
    for (int i = 0; i < 2; ++i) {
      if (!wanted_[i]) continue;
      if (partials[i].overrun()) differences_.push_back("a slot beyond the last");
      compare(kNames[i], sums[i], sums_[i], shape_.steps, differences_);
    }
    return differences_;
  }

 private:
  // The buffer numbered misaligned_ begins one element after an aligned address.
  template <class Element>
  Buffer<Element> output(bool wanted, int64 size) {
    const bool misaligned = buffers_++ == misaligned_;
    return wanted ? Buffer<Element>(size, misaligned) : Buffer<Element>();
  }
  template <class Element>
  Buffer<Element> input(bool wanted, int64 size) {
    Buffer<Element> buffer = output<Element>(wanted, size);
    buffer.fill(random_, -1, 1);
    return buffer;
  }

  void make_parameter(int i) {
    ParameterView<Real>& view = params_.parameters[kIds[i]];
    const double low = i == 0 ? 0.3 : -1.5, high = i == 0 ? 0.95 : 1.5;
    view.constant = Real(random_.between(low, high));
    if (random_.once_in(3)) return;
    const int64 neurons = shape_.neurons(), unit = neurons % 4 == 0 && random_.toss() ? 4 : 1;
    wanted_[i] = !random_.once_in(4);
    view.inner = random_.toss() ? neurons : random_.divisor(neurons, unit);
    view.count = view.inner == neurons ? 1 : random_.divisor(neurons / view.inner, 1);
    if (view.count == 1) view.inner = neurons;
    view.step_stride = random_.once_in(3) ? view.count : 0;
    data_[i] = Buffer<Real>((view.step_stride != 0 ? shape_.steps : 1) * view.count, 0);
    params_.options.logit_decay = params_.options.logit_decay || (i == 0 && view.step_stride == 0 && random_.toss());
    params_.options.logit_decay&& i == 0 ? data_[i].fill(random_, -1.4, 2.9) : data_[i].fill(random_, low, high);
    view.data = data_[i].data();
  }

  void expect() {
    const int64 steps = shape_.steps;
    const Real v_rest = params_.options.v_rest;
    for (auto* sequence : {&v_, &dx_}) sequence->resize(shape_.neurons() * steps);
    for (auto* state : {&v_last_, &d_init_}) state->resize(shape_.neurons());
    for (int i = 0; i < 2; ++i) sums_[i].resize(data_[i].size());
    for (int64 n = 0; n < shape_.neurons(); ++n) {
      const auto at = [&](ParameterId id, int64 t) {
        return value_of(id, params_.parameters[id].at(n, t), params_.options);
      };
      const Real init = init_.data() != nullptr ? init_.data()[n] : v_rest;
      std::vector<Real> v(steps), dv(steps), g(steps);
      for (int64 t = 0; t < steps; ++t) {
        const Real before = t > 0 ? v[t - 1] : init, x = to_real(x_seq_.data()[shape_.element(n, t)]);
        v[t] = (v_rest + at(kDecay, t) * (before - v_rest)) + at(kInputGain, t) * x;
        v_[shape_.element(n, t)] = params_.delay ? before : v[t];
        g[t] = to_real(g_.data()[shape_.element(n, t)]);
      }
      v_last_[n] = v[steps - 1];
      for (int64 t = steps - 1; t >= 0; --t) {
        const Real from_last = grad_last_.data() != nullptr ? grad_last_.data()[n] : Real(0);
        const Real from_later = t + 1 < steps ? at(kDecay, t + 1) * dv[t + 1] : from_last;
        const Real from_output = !params_.delay ? g[t] : t + 1 < steps ? g[t + 1] : Real(0);
        dv[t] = from_output + from_later;
        dx_[shape_.element(n, t)] = at(kInputGain, t) * dv[t];
        const double before = t > 0 ? to_real(from_real<Scalar>(v[t - 1])) : init, decay = at(kDecay, t);
        add(0, n, t, dv[t] * (before - v_rest) * (params_.options.logit_decay ? (1 - decay) * decay : 1));
        add(1, n, t, static_cast<double>(dv[t]) * to_real(x_seq_.data()[shape_.element(n, t)]));
      }
      d_init_[n] = at(kDecay, 0) * dv[0];
      if (params_.delay) d_init_[n] = g[0] + d_init_[n];
    }
  }

  void add(int i, int64 n, int64 t, double term) {
    const ParameterView<Real>& view = params_.parameters[kIds[i]];
    if (view.data != nullptr) sums_[i][t * view.step_stride + view.index(n)].add(term);
  }

  // The expected number of neurons a thread.
  template <class... Buffers>
  int lanes(const Buffers&... buffers) const {
    const int64 neurons = shape_.neurons(), resident = 2048 * multiprocessors_;
    bool four = sizeof(Scalar) <= 4 && shape_.inner % 4 == 0 && (buffers.is_aligned() && ...);
    bool general = params_.options.v_rest != 0;
    for (const auto& view : params_.parameters) {
      four = four && (view.data == nullptr || view.inner % 4 == 0);
      general = general || view.step_stride != 0;
    }
    return four && (general ? neurons >= resident : shape_.steps <= 16 || neurons > 3 * resident / 16) ? 4 : 1;
  }

  void launch(const char* what, int lanes, std::set<const void*>& kernels) {
    asgl_emulation::clear_recorded_launches();
#if defined(ASGL_TEST_CPU)
    check(what, asgl_emulation::launch_on_cpu(params_), differences_);
#else
    check(what, cuda::launch_integrator<Scalar>(asgl_emulation::start_of(params_)), differences_);
#endif
    const auto launches = asgl_emulation::recorded_launches();
    if (kOnCpu || launches.empty()) return;
    kernels.insert(launches.back().kernel);
    const int64 blocks = launches.back().grid.x, each = lanes * kBlockThreads;
    const int64 should_be = (shape_.neurons() + each - 1) / each;
    if (blocks != should_be) differences_.push_back(text("%s: %lld blocks, expected %lld", what, blocks, should_be));
  }

  const SequenceShape shape_;
  const int multiprocessors_;
  Random random_;
  Texts differences_;
  int buffers_ = 0, misaligned_ = -1;
  bool wanted_[2] = {};
  IntegratorParams<Scalar> params_{};
  Buffer<Real> data_[2], init_, last_, grad_last_, grad_init_;
  Buffer<Scalar> x_seq_, v_seq_, g_, grad_x_seq_;
  std::vector<Real> v_, v_last_, dx_, d_init_;
  std::vector<Sum> sums_[2];
};

constexpr std::size_t kKernels =
    2 * 6 + 3;  // of float and bfloat16 for one neuron a thread and four, of double for one

Texts run(const SequenceShape& shape, int multiprocessors, unsigned number, std::set<const void*>& kernels) {
  if (number % 5 == 4) return Trial<double>(shape, multiprocessors, number).run(kernels);
  return number % 2 == 0 ? Trial<float>(shape, multiprocessors, number).run(kernels)
                         : Trial<BFloat16>(shape, multiprocessors, number).run(kernels);
}

}  // namespace

int main(int argc, char** argv) {
  asgl_emulation::choose_mutant();
  const bool small = argc > 1 && std::string(argv[1]) == "small";
  std::set<const void*> kernels;
  unsigned cases = 0;
  int failed = 0;
  for (const int64 steps : small ? std::vector<int64>{5, 2} : std::vector<int64>{17, 4, 1, 5, 8, 2, 33}) {
    for (const auto& [outer, inner] :
         {std::pair<int64, int64>{1, 7}, {3, 172}, {1, 257}, {4, 128}, {6, 10}, {1, 1028}, {4, 700}, {1, 1}}) {
      for (int turn = 0; turn < (small ? 3 : 16) && failed < asgl_emulation::kManyFailures; ++turn) {
        const Texts differences = run({outer, steps, inner}, turn % 3 == 0 ? 132 : 0, cases++, kernels);
        failed += !differences.empty();
        if (differences.empty()) continue;
        std::printf("case %u: (%lld, %lld, %lld):", cases - 1, outer, steps, inner);
        for (const std::string& difference : differences) std::printf(" %s;", difference.c_str());
        std::printf("\n");
      }
    }
  }
  std::printf("%d of %u cases failed; %zu kernels\n", failed, cases, kernels.size());
  return failed == 0 && (small || kOnCpu || kernels.size() == kKernels) ? 0 : 1;
}
