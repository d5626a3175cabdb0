// The CUDA kernels of adaptive neurons, run by the emulation, against a plain loop over neurons and steps; with
// ASGL_TEST_CPU the CPU kernels. `adaptive_test small` runs fewer cases, for an emulation in which every CUDA thread is
// an OS thread.
#include <limits>
#include <set>

#if defined(ASGL_TEST_CPU)
#include "cpu/neuron.cpp"
#include "cpu/neuron_adaptive.cpp"
namespace asgl::cpu {  // run by kernels_test
template <class Params>
void run_settled(const Params&) {
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
using asgl_emulation::kOnCpu;
using asgl_emulation::plan;
using asgl_emulation::Random;
using asgl_emulation::Sum;
using asgl_emulation::text;
using asgl_emulation::Texts;

const char* const kNames[] = {"grad_width",       "grad_decay",           "grad_v_threshold", "grad_reset",
                              "grad_adapt_decay", "grad_adapt_potential", "grad_adapt_spike"};

// The number seeds all other choices. States and their checkpoints are those of v, then those of w.
template <class Scalar>
class Trial {
  using Real = Real_t<Scalar>;

 public:
  Trial(const SequenceShape& shape, unsigned number) : shape_(shape), random_(number) {
    const int64 neurons = shape.neurons(), elements = neurons * shape.steps;
    asgl_emulation::settings().multiprocessors = 0;  // other neurons would be four a thread
    params_.shape = shape;
    auto& options = params_.options;
    const uint8 places_of_w[] = {kInCurrent, kInThreshold, kInThreshold | kInReset, kInReset};
    options.adaptation = places_of_w[number / 2 % 4];  // number % 2 chooses the type
    in_current_ = (options.adaptation & kInCurrent) != 0;
    in_threshold_ = (options.adaptation & kInThreshold) != 0;
    in_reset_ = (options.adaptation & kInReset) != 0;
    options.hard_reset = !in_reset_ && random_.toss();
    options.surrogate = random_.toss() ? Surrogate::kRectangle : Surrogate::kSigmoid;
    options.v_rest = Real(random_.once_in(3) ? 0.0 : random_.between(-0.2, 0.2));
    options.surrogate_gain = Real(random_.toss() ? 1.0 : 1.5);
    options.strict_threshold = random_.toss();
    options.detach_reset = random_.once_in(3);
    infinite_ = random_.once_in(shape.steps == 1 ? 2 : 6);
    const uint32 analog_below[] = {0, 20000, 20000, 65536};
    rng_state_[0] = static_cast<int64>(random_.between(-1e18, 1e18));
    rng_state_[1] = static_cast<int64>(random_.between(-1e10, 1e10));
    params_.noise = {rng_state_, analog_below[random_.one_of({0, 1, 2, 3})]};
    for (int id = 0; id < kNumParameters; ++id) make_parameter(id);
    if (infinite_) make_last_reset_infinite();
    x_seq_ = filled<Scalar>(true, elements, -1, 2);
    init_ = filled<Real>(random_.toss(), 2 * neurons, -0.5, 1);
    s_seq_ = Buffer<Scalar>(elements, 0);
    last_ = buffer<Real>(random_.toss(), 2 * neurons);
    v_seq_ = buffer<Real>(random_.once_in(3), elements);
    h_seq_ = buffer<Real>(random_.once_in(3), elements);
    checkpoints_ = Buffer<Real>(2 * ((shape.steps - 1) / kCheckpointSteps) * neurons, 0);
    g_ = filled<Scalar>(!random_.once_in(6), elements, -1, 1);
    grad_last_ = filled<Real>(random_.toss() && !infinite_, 2 * neurons, -1, 1);
    grad_v_seq_ = filled<Real>(random_.once_in(3) && !infinite_, elements, -1, 1);
    grad_h_seq_ = filled<Real>(random_.once_in(3), elements, -1, 1);
    grad_x_seq_ = buffer<Scalar>(!random_.once_in(8), elements);
    grad_init_ = buffer<Real>(random_.toss(), 2 * neurons);
  }

  Texts run(std::set<const void*>& kernels) {
    expect();
    ForwardParams<Scalar> forward{params_};
    forward.x_seq = x_seq_.data();
    forward.v_init = init_.data();
    forward.s_seq = s_seq_.data();
    forward.v_last = last_.data();
    forward.v_seq = v_seq_.data();
    forward.h_seq = h_seq_.data();
    forward.checkpoints = checkpoints_.data();
    launch("forward", forward, kernels);
    compare("s_seq", s_seq_, s_, differences_);
    compare("last", last_, state_, differences_);
    compare("v_seq", v_seq_, v_, differences_);
    compare("h_seq", h_seq_, h_, differences_);

    BackwardParams<Scalar> backward{params_};
    backward.x_seq = x_seq_.data();
    backward.v_init = init_.data();
    backward.checkpoints = checkpoints_.data();
    backward.grad_s_seq = g_.data();
    backward.grad_v_last = grad_last_.data();
    backward.grad_v_seq = grad_v_seq_.data();
    backward.grad_h_seq = grad_h_seq_.data();
    backward.grad_x_seq = grad_x_seq_.data();
    backward.grad_v_init = grad_init_.data();
    const int64 tiles = cuda::blocks_for(shape_.neurons(), kBlockThreads);  // no device has more
    Buffer<Real> partials[kNumParameters], sums[kNumParameters];
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wanted_[id]) continue;
      const ParameterView<Real>& view = params_.parameters[id];
      const int64 slots = GradientPartials<Real>::slots_for(view.inner, shape_.neurons(), tiles);
      partials[id] = Buffer<Real>((view.step_stride != 0 ? shape_.steps : 1) * slots, 0);
      sums[id] = Buffer<Real>(data_[id].size(), 0);
      backward.partials[id] = {partials[id].data(), slots};
    }
    launch("backward", backward, kernels);
    compare("grad_x_seq", grad_x_seq_, dx_, differences_);
    compare("grad_init", grad_init_, d_init_, differences_);
    GradientSum<Real> sum{shape_, backward.tiles.tile, 0, {}};
    for (int id = 0; id < kNumParameters; ++id) {
      if (!wanted_[id]) continue;
      if (partials[id].overrun()) differences_.push_back("a slot beyond the last");
      sum.parts[sum.count++] = {backward.partials[id], params_.parameters[id],
                                id == kWidth ? Derivative::kOfWidth : Derivative::kNone, sums[id].data(),
                                shape_.neurons()};
    }
    if (sum.count == 0 || !differences_.empty()) return differences_;
    asgl_emulation::sum_gradients(sum, differences_, [](const auto&) {});
    for (int id = 0; id < kNumParameters; ++id) {
      if (wanted_[id]) compare(kNames[id], sums[id], sums_[id], shape_.steps, differences_);
    }
    return differences_;
  }

 private:
  template <class Element>
  static Buffer<Element> buffer(bool wanted, int64 size) {
    return wanted ? Buffer<Element>(size, 0) : Buffer<Element>();
  }
  template <class Element>
  Buffer<Element> filled(bool wanted, int64 size, double low, double high) {
    Buffer<Element> made = buffer<Element>(wanted, size);
    made.fill(random_, low, high);
    return made;
  }

  void make_parameter(int id) {
    const bool hard = params_.options.hard_reset;
    const double low[] = {0.5, 0.2, 0.6, hard ? -0.2 : 0.5, 0.5, -0.2, 0.0};
    const double high[] = {1.5, 0.95, 1.2, hard ? 0.2 : 1.0, 0.95, 0.4, 0.5};
    ParameterView<Real>& view = params_.parameters[id];
    const int64 neurons = shape_.neurons();
    view = {nullptr, Real(random_.between(low[id], high[id])), 0, neurons, 1};
    if (random_.once_in(3)) return;
    wanted_[id] = !random_.once_in(4);
    if (random_.toss()) view.inner = random_.divisor(neurons, 1);
    view.count = random_.divisor(neurons / view.inner, 1);
    if (view.count == 1) view.inner = neurons;
    view.step_stride = random_.once_in(3) ? view.count : 0;
    data_[id] = filled<Real>(true, (view.step_stride != 0 ? shape_.steps : 1) * view.count, low[id], high[id]);
    view.data = data_[id].data();
  }

  // Without a gradient of the last state no term comes from it, not even zero times infinity.
  void make_last_reset_infinite() {
    constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
    ParameterView<Real>& view = params_.parameters[kReset];
    if (view.step_stride == 0 && shape_.steps > 1) return;
    view.constant = kInfinity;
    for (int64 i = 1; i <= view.count && view.data != nullptr; ++i)
      data_[kReset].set(data_[kReset].size() - i, kInfinity);
  }

  template <class Params>
  void launch(const char* what, Params& params, std::set<const void*>& kernels) {
    plan(params);
#if defined(ASGL_TEST_CPU)
    check(what, asgl_emulation::launch_on_cpu(params), differences_);
#else
    check(what, cuda::launch_adaptive<Scalar>(asgl_emulation::start_of(params)), differences_);
    kernels.insert(asgl_emulation::recorded_launches().back().kernel);
#endif
  }

  // F(y), and the gradient of y from the gradient of F(y).
  Real smooth(Real y) const {
    return params_.options.surrogate == Surrogate::kRectangle ? SurrogateMath<Surrogate::kRectangle>::value(y)
                                                              : SurrogateMath<Surrogate::kSigmoid>::value(y);
  }
  Real adjoint(Real y, Real da) const {
    return params_.options.surrogate == Surrogate::kRectangle ? SurrogateMath<Surrogate::kRectangle>::adjoint(y, da)
                                                              : SurrogateMath<Surrogate::kSigmoid>::adjoint(y, da);
  }

  void expect() {
    const int64 neurons = shape_.neurons();
    for (auto* sequence : {&s_, &v_, &h_, &dx_}) sequence->resize(neurons * shape_.steps);
    for (auto* states : {&state_, &d_init_}) states->resize(2 * neurons);
    for (int id = 0; id < kNumParameters; ++id) sums_[id].resize(data_[id].size());
    for (int64 n = 0; n < neurons; ++n) expect(n);
  }

  void expect(int64 n) {
    const int64 neurons = shape_.neurons(), steps = shape_.steps;
    const auto& options = params_.options;
    const bool hard = options.hard_reset;
    const Real rest = options.v_rest;
    const auto given = [](const auto& from, int64 i) {
      return from.data() == nullptr ? Real(0) : Real(to_real(from.data()[i]));
    };
    struct Step {
      Real v, w, h, s, amount, parameters[kNumParameters];  // v and w before the step, h after charging
    };
    std::vector<Step> all(steps);
    Real v = init_.data() != nullptr ? init_.data()[n] : rest, w = given(init_, neurons + n);
    for (int64 t = 0; t < steps; ++t) {
      Step& now = all[t];
      const int64 element = shape_.element(n, t);
      for (int id = 0; id < kNumParameters; ++id) now.parameters[id] = params_.parameters[id].at(n, t);
      const Real* p = now.parameters;
      now.v = v, now.w = w;
      const Real x = to_real(x_seq_.data()[element]);
      now.h = (rest + p[kDecay] * (v - rest)) + (in_current_ ? x - w : x);
      h_[element] = in_threshold_ ? now.h - w : now.h;
      const Real u = h_[element] - p[kThreshold];
      const bool fires = options.strict_threshold ? u > 0 : u >= 0;
      now.s = asgl_emulation::is_analog(params_.noise, n, t) ? smooth(u * (1 / p[kWidth])) : Real(fires);
      now.amount = in_reset_ ? p[kReset] + w : p[kReset];
      v = hard ? now.h * (1 - now.s) + now.amount * now.s : now.h - now.amount * now.s;
      w = p[kAdaptDecay] * w + (p[kAdaptPotential] * (v - rest) + p[kAdaptSpike] * now.s);
      s_[element] = now.s;
      v_[element] = v;
    }
    state_[n] = v, state_[neurons + n] = w;

    bool carried = grad_last_.data() != nullptr;
    Real dv = given(grad_last_, n), dw = given(grad_last_, neurons + n);
    for (int64 t = steps - 1; t >= 0; --t) {
      const Step& now = all[t];
      const Real *p = now.parameters, s = now.s;
      const int64 element = shape_.element(n, t);
      const auto add = [&](ParameterId id, double term) {
        const ParameterView<Real>& view = params_.parameters[id];
        if (view.data != nullptr) sums_[id][t * view.step_stride + view.index(n)].add(term);
      };
      Real ds = given(g_, element), from_v = 0, d_amount = 0;
      const Real gh = given(grad_h_seq_, element);
      dv += given(grad_v_seq_, element);
      carried = carried || grad_v_seq_.data() != nullptr;
      if (carried) {
        add(kAdaptDecay, static_cast<double>(dw) * now.w);
        add(kAdaptPotential, static_cast<double>(dw) * (v_[element] - rest));
        add(kAdaptSpike, static_cast<double>(dw) * s);
        dv += p[kAdaptPotential] * dw;
        ds += p[kAdaptSpike] * dw;
        d_amount = hard ? dv * s : -dv * s;
        from_v = hard ? dv * (1 - s) : dv;
        if (!options.detach_reset && hard) ds += dv * now.amount;
        if (!options.detach_reset) ds -= dv * (hard ? now.h : now.amount);
        add(kReset, d_amount);
      }
      const Real inverse_width = 1 / p[kWidth], distance = h_[element] - p[kThreshold];
      const Real dy = adjoint(distance * inverse_width, ds * options.surrogate_gain);
      const Real dh = (gh + from_v) + dy * inverse_width;
      add(kWidth, -static_cast<double>(dy) * distance / (static_cast<double>(p[kWidth]) * p[kWidth]));
      add(kThreshold, -static_cast<double>(dy) / p[kWidth]);
      add(kDecay, static_cast<double>(dh) * (now.v - rest));
      dw = p[kAdaptDecay] * dw + (in_reset_ ? d_amount : Real(0));
      if (in_current_) dw -= dh;
      if (in_threshold_) dw -= gh + dy * inverse_width;
      dv = p[kDecay] * dh;
      dx_[element] = dh;
      carried = true;
    }
    d_init_[n] = dv, d_init_[neurons + n] = dw;
  }

  const SequenceShape shape_;
  Random random_;
  Texts differences_;
  bool in_current_, in_threshold_, in_reset_, infinite_, wanted_[kNumParameters] = {};
  int64 rng_state_[2];
  LIFParams<Scalar> params_{};
  Buffer<Real> data_[kNumParameters], init_, last_, v_seq_, h_seq_, checkpoints_;
  Buffer<Real> grad_last_, grad_v_seq_, grad_h_seq_, grad_init_;
  Buffer<Scalar> x_seq_, s_seq_, g_, grad_x_seq_;
  std::vector<Real> s_, v_, h_, dx_, state_, d_init_;
  std::vector<Sum> sums_[kNumParameters];
};

constexpr std::size_t kKernels = 2 * 3;  // forward and backward of three types

Texts run(const SequenceShape& shape, unsigned number, std::set<const void*>& kernels) {
  if (number % 5 == 4) return Trial<double>(shape, number).run(kernels);
  return number % 2 == 0 ? Trial<float>(shape, number).run(kernels) : Trial<BFloat16>(shape, number).run(kernels);
}

}  // namespace

int main(int argc, char** argv) {
  asgl_emulation::choose_mutant();
  const bool small = argc > 1 && std::string(argv[1]) == "small";
  std::set<const void*> kernels;
  unsigned cases = 0;
  int failed = 0;
  for (const int64 steps : small ? std::vector<int64>{17, 2} : std::vector<int64>{17, 4, 1, 33, 5, 8, 40, 2}) {
    for (const auto& [outer, inner] :
         {std::pair<int64, int64>{1, 7}, {3, 172}, {1, 257}, {4, 128}, {6, 10}, {4, kOnCpu ? 700 : 25}, {1, 1}}) {
      for (int turn = 0; turn < (small ? 3 : 8) && failed < asgl_emulation::kManyFailures; ++turn) {
        const Texts differences = run({outer, steps, inner}, cases++, kernels);
        failed += !differences.empty();
        if (differences.empty()) continue;
        std::printf("case %u: (%lld, %lld, %lld):", cases - 1, outer, steps, inner);
        for (const std::string& difference : differences) std::printf(" %s;", difference.c_str());
        std::printf("\n");
      }
    }
  }
  std::printf("%d of %u cases failed; %zu kernels\n", failed, cases, kernels.size());
  return failed == 0 && (kOnCpu || kernels.size() == kKernels) ? 0 : 1;
}
