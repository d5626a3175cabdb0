// The CPU kernels of recurrent neurons against a plain loop over the batch, neurons and steps. Without FMA (a build for
// the baseline instruction set) bits are equal: every sum has one order.
#include "cpu/recurrent.cpp"

#include "expected.h"
#include "trials.h"

namespace {

using namespace asgl;
using asgl_emulation::Buffer;
using asgl_emulation::compare;
using asgl_emulation::Random;
using asgl_emulation::Sum;
using asgl_emulation::text;
using asgl_emulation::Texts;

struct Shape {
  int64 steps, batch, neurons;
};

// The number seeds all other choices.
template <class Scalar>
class Trial {
  using Real = Real_t<Scalar>;

 public:
  Trial(const Shape& shape, unsigned number) : shape_(shape), random_(number), batch_first_(random_.toss()) {
    const int64 count = shape.neurons, states = shape.batch * count, elements = shape.steps * states;
    fill(params_);
    x_seq_ = input<Scalar>(true, elements, -0.5, 1.5);
    weight_ = input<Real>(true, params_.elementwise ? count : count * count, -1, 1);
    if (random_.once_in(8)) weight_.set(weight_.size() / 2, NAN);
    parameters_ = input<Real>(true, kRecurrentParameters * count, 0.3, 1);
    v_init_ = input<Real>(random_.toss(), states, -1, 1);
    s_init_ = input<Real>(random_.toss(), states, 0, 1);
    i_init_ = input<Real>(params_.has_synapse && random_.toss(), states, -1, 1);
    state_ = {static_cast<int64>(number), -1 - static_cast<int64>(number)};
  }

  Texts run() {
    const int64 states = shape_.batch * shape_.neurons, elements = shape_.steps * states;
    params_.weight = weight_.data();
    params_.parameters = parameters_.data();
    params_.v_init = v_init_.data();
    params_.s_init = s_init_.data();
    params_.i_init = i_init_.data();
    params_.noise.rng_state = state_.data();
    RecurrentForwardParams<Scalar> forward{};
    static_cast<RecurrentParams<Scalar>&>(forward) = params_;
    Buffer<Scalar> s_seq(elements, 0);
    Buffer<Real> emitted(elements, 0), h_seq(elements, 0), i_seq(elements, 0);
    Buffer<Real> v_seq = output(elements), v_last = output(states), s_last = output(states), i_last = output(states);
    forward.x_seq = x_seq_.data();
    forward.s_seq = s_seq.data();
    forward.emitted = emitted.data();
    forward.h_seq = h_seq.data();
    forward.i_seq = i_seq.data();
    forward.v_seq = v_seq.data();
    forward.v_last = v_last.data();
    forward.s_last = s_last.data();
    forward.i_last = i_last.data();
    cpu::recurrent_forward(forward);
    with_model([&](auto model) { expect_forward<decltype(model)>(); });
    compare("s_seq", s_seq, s_seq_, differences_);
    compare("emitted", emitted, emitted_, differences_);
    compare("h_seq", h_seq, h_, differences_);
    compare("i_seq", i_seq, i_, differences_);
    compare("v_seq", v_seq, v_, differences_);
    compare("v_last", v_last, v_last_, differences_);
    compare("s_last", s_last, s_last_, differences_);
    if (params_.has_synapse) compare("i_last", i_last, i_last_, differences_);

    RecurrentBackwardParams<Scalar> backward{};
    static_cast<RecurrentParams<Scalar>&>(backward) = params_;
    g_ = input<Scalar>(!random_.once_in(8), elements, -1, 1);
    if (g_.data() != nullptr && random_.once_in(8)) g_.set(elements / 2, NAN);
    gv_ = input<Real>(random_.toss(), elements, -1, 1);
    gh_ = input<Real>(random_.toss(), elements, -1, 1);
    for (Buffer<Real>* each : {&gv_last_, &gs_last_, &gi_last_}) *each = input<Real>(random_.toss(), states, -1, 1);
    if (!params_.has_synapse) gi_last_ = {};
    const int64 chunks = recurrent_chunks(params_.batch);
    Buffer<double> sums(random_.once_in(3) ? 0 : chunks * kRecurrentSums * shape_.neurons, 0);
    for (int64 i = 0; i < sums.size(); ++i) sums.set(i, 0);
    Buffer<Real> dj(elements, 0), d_weight(params_.elementwise || random_.once_in(3) ? 0 : weight_.size(), 0);
    Buffer<Real> dv_init = output(states), ds_init = output(states), di_init = output(states);
    backward.detach_recurrent = detach_recurrent_ = random_.once_in(4);
    backward.h_seq = h_seq.data();
    backward.emitted = emitted.data();
    backward.i_seq = params_.has_synapse ? i_seq.data() : nullptr;
    backward.grad_s_seq = g_.data();
    backward.grad_v_seq = gv_.data();
    backward.grad_h_seq = gh_.data();
    backward.grad_v_last = gv_last_.data();
    backward.grad_s_last = gs_last_.data();
    backward.grad_i_last = gi_last_.data();
    backward.grad_j_seq = dj.data();
    backward.grad_weight = d_weight.size() > 0 ? d_weight.data() : nullptr;
    backward.grad_v_init = dv_init.data();
    backward.grad_s_init = ds_init.data();
    backward.grad_i_init = di_init.data();
    backward.grad_parameters = sums.size() > 0 ? sums.data() : nullptr;
    cpu::recurrent_backward(backward);
    with_model([&](auto model) { expect_backward<decltype(model)>(); });
    compare("grad_j_seq", dj, dj_, differences_);
    compare("grad_v_init", dv_init, dv_init_, differences_);
    compare("grad_s_init", ds_init, ds_init_, differences_);
    if (params_.has_synapse) compare("grad_i_init", di_init, di_init_, differences_);
    if (d_weight.size() > 0) compare("grad_weight", d_weight, d_weight_, differences_);
    for (int64 i = 0; i < kRecurrentSums * shape_.neurons && sums.size() > 0; ++i) compare_sum(sums, i, chunks);
    for (const Buffer<Real>* each : {&emitted, &h_seq, &i_seq, &v_seq, &v_last, &s_last, &i_last, &dj, &d_weight}) {
      if (each->data() != nullptr && each->overrun()) differences_.push_back("an element beyond the last");
    }
    return differences_;
  }

 private:
  template <class Element>
  Buffer<Element> input(bool wanted, int64 size, double low, double high) {
    Buffer<Element> buffer = wanted ? Buffer<Element>(size, 0) : Buffer<Element>();
    buffer.fill(random_, low, high);
    return buffer;
  }
  Buffer<Real> output(int64 size) { return random_.toss() ? Buffer<Real>(size, 0) : Buffer<Real>(); }

  void fill(RecurrentParams<Scalar>& params) {
    params.steps = shape_.steps;
    params.batch = shape_.batch;
    params.neurons = shape_.neurons;
    params.batch_first = batch_first_;
    params.options.v_rest = Real(random_.toss() ? 0 : -0.1);
    params.options.surrogate_gain = 1;
    params.options.surrogate = random_.toss() ? Surrogate::kRectangle : Surrogate::kSigmoid;
    params.options.hard_reset = random_.toss();
    params.options.strict_threshold = random_.once_in(4);
    params.options.scale_output = random_.once_in(3);
    params.options.detach_reset = random_.once_in(3);
    params.input_gain = Real(random_.toss() ? 1 : 0.5);
    params.noise.analog_below = static_cast<uint32>(random_.one_of({0, 0, 13107, kAlwaysAnalog}));
    params.elementwise = random_.once_in(4);
    params.has_synapse = random_.toss();
  }

  template <class F>
  void with_model(F&& f) {
    asgl::with_model(static_cast<const NeuronOptions<Real>&>(params_.options), f, std::integer_sequence<int, 0, 2>{});
  }

  int64 element(int64 b, int64 n, int64 t) const {
    return (batch_first_ ? b * shape_.steps + t : t * shape_.batch + b) * shape_.neurons + n;
  }
  Real parameter(int id, int64 n) const { return parameters_.data()[id * shape_.neurons + n]; }
  Neuron<Real> neuron(int64 n) const {
    return {parameter(kRecurrentDecay, n),
            parameter(kRecurrentThreshold, n),
            parameter(kRecurrentReset, n),
            Real(1) / parameter(kRecurrentWidth, n),
            params_.input_gain,
            0,
            0};
  }
  static Real at(const Buffer<Real>& buffer, int64 i, Real otherwise = 0) {
    return buffer.data() != nullptr ? buffer.data()[i] : otherwise;
  }
  Real s_before(int64 b, int64 n, int64 t) const {
    return t > 0 ? emitted_[element(b, n, t - 1)] : at(s_init_, b * shape_.neurons + n);
  }
  bool is_analog(int64 b, int64 n, int64 t) const {
    const int64 state[2] = {state_[0], state_[1] + t};
    return asgl_emulation::is_analog({state, params_.noise.analog_below}, b * shape_.neurons + n, 0);
  }

  template <class Model>
  void expect_forward() {
    const auto& [steps, batch, count] = shape_;
    for (auto* each : {&emitted_, &h_, &i_, &v_, &s_seq_}) each->resize(steps * batch * count);
    for (auto* each : {&v_last_, &s_last_, &i_last_}) each->resize(batch * count);
    const Firing<Real> firing(params_.options);
    for (int64 b = 0; b < batch; ++b) {
      for (int64 t = 0; t < steps; ++t) {
        for (int64 n = 0; n < count; ++n) {
          Real product = params_.elementwise ? s_before(b, n, t) * weight_.data()[n] : Real(0);
          for (int64 k = 0; k < count && !params_.elementwise; ++k) {
            product = s_before(b, k, t) * weight_.data()[n * count + k] + product;
          }
          const int64 state = b * count + n, now = element(b, n, t), before = t > 0 ? element(b, n, t - 1) : 0;
          Real i = to_real(x_seq_.data()[now]) + (product + parameter(kRecurrentBias, n));
          const Real i_before = t > 0 ? i_[before] : at(i_init_, state);
          if (params_.has_synapse) i = parameter(kRecurrentSynDecay, n) * i_before + i;
          const Real v = t > 0 ? v_[before] : at(v_init_, state, params_.options.v_rest);
          const Real c = input_current<Input::kGeneral>(i, neuron(n));
          const Real h = Model::template charge<Input::kGeneral>(c, v, neuron(n), params_.options);
          const Real s = Model::fire(h, is_analog(b, n, t), neuron(n), firing);
          emitted_[now] = s;
          h_[now] = h;
          i_[now] = i;
          v_[now] = Model::reset(h, s, neuron(n));
          const Real out = params_.options.scale_output ? s * parameter(kRecurrentThreshold, n) : s;
          s_seq_[now] = to_real(from_real<Scalar>(out));
          v_last_[state] = v_[now], s_last_[state] = s, i_last_[state] = i;
        }
      }
    }
  }

  template <class Model>
  void expect_backward() {
    const auto& [steps, batch, count] = shape_;
    dj_.resize(steps * batch * count);
    d_weight_.assign(count * count, Real(0));
    sums_.resize(kRecurrentSums * count);
    for (auto* each : {&dv_init_, &ds_init_, &di_init_}) each->resize(batch * count);
    for (int64 b = 0; b < batch; ++b) {
      std::vector<Real> dv(count), di(count), feedback(count);
      bool carried = gv_last_.data() != nullptr, fed = gs_last_.data() != nullptr;
      for (int64 n = 0; n < count; ++n) {
        const int64 state = b * count + n;
        dv[n] = at(gv_last_, state), di[n] = at(gi_last_, state), feedback[n] = at(gs_last_, state);
      }
      for (int64 t = steps - 1; t >= 0; --t) {
        for (int64 n = 0; n < count; ++n) {
          const int64 now = element(b, n, t), state = b * count + n;
          const Real h = h_[now], s = emitted_[now];
          Real g = g_.data() != nullptr ? to_real(g_.data()[now]) : Real(0);
          if (params_.options.scale_output) {
            add(kRecurrentThreshold, n, static_cast<double>(g) * s);
            g = g * parameter(kRecurrentThreshold, n);
          }
          if (fed) g = g + feedback[n];
          dv[n] += at(gv_, now);
          const bool has_dv = carried || gv_.data() != nullptr;
          if (has_dv) add(kRecurrentReset, n, params_.options.hard_reset ? dv[n] * s : -(dv[n] * s));
          const Real ds = Model::spike_gradient(g, h, has_dv && !params_.options.detach_reset, neuron(n), dv[n]);
          const StepGradient<Real> step =
              Model::step_adjoint(ds, at(gh_, now), h, s, has_dv, neuron(n), params_.options, dv[n]);
          Real dj = params_.input_gain * step.dc;
          if (params_.has_synapse) {
            dj = dj + di[n];
            di[n] = parameter(kRecurrentSynDecay, n) * dj;
          }
          dj_[now] = dj;
          const double width = parameter(kRecurrentWidth, n), dy = step.dy;
          const double v = t > 0 ? v_[element(b, n, t - 1)] : at(v_init_, state, params_.options.v_rest);
          const double i = t > 0 ? i_[element(b, n, t - 1)] : at(i_init_, state);
          add(kRecurrentWidth, n, -dy * Model::distance(h, neuron(n)) / (width * width));
          add(kRecurrentThreshold, n, -dy / width);
          add(kRecurrentDecay, n, step.dh * (v - params_.options.v_rest));
          add(kRecurrentBias, n, dj);
          if (params_.has_synapse) add(kRecurrentSynDecay, n, dj * i);
          if (params_.elementwise) add(kRecurrentWeight, n, static_cast<double>(dj) * s_before(b, n, t));
        }
        carried = true;
        fed = !detach_recurrent_;
        for (int64 k = 0; k < count; ++k) {
          feedback[k] = params_.elementwise ? dj_[element(b, k, t)] * weight_.data()[k] : Real(0);
          for (int64 n = 0; n < count && !params_.elementwise; ++n) {
            feedback[k] = dj_[element(b, n, t)] * weight_.data()[n * count + k] + feedback[k];
          }
        }
      }
      for (int64 n = 0; n < count; ++n) {
        dv_init_[b * count + n] = dv[n], di_init_[b * count + n] = di[n];
        ds_init_[b * count + n] = fed ? feedback[n] : Real(0);
      }
    }
    for (int64 row = 0; row < steps * batch && !params_.elementwise; ++row) {  // in memory order
      const int64 b = batch_first_ ? row / steps : row % batch, t = batch_first_ ? row % steps : row / batch;
      for (int64 n = 0; n < count; ++n) {
        for (int64 k = 0; k < count; ++k) {
          d_weight_[n * count + k] = s_before(b, k, t) * dj_[element(b, n, t)] + d_weight_[n * count + k];
        }
      }
    }
  }

  void add(int id, int64 n, double term) { sums_[id * shape_.neurons + n].add(term); }

  // Sums in the type of the arithmetic, of as many terms as rows times steps.
  void compare_sum(const Buffer<double>& sums, int64 i, int64 chunks) {
    double total = 0;
    for (int64 chunk = 0; chunk < chunks; ++chunk) total += sums.data()[chunk * kRecurrentSums * shape_.neurons + i];
    const double allowed = (sizeof(Real) == 4 ? 1e-5 : 1e-13) * sums_[i].magnitude;
    if (std::isnan(sums_[i].total) ? std::isnan(total) : std::fabs(total - sums_[i].total) <= allowed) return;
    differences_.push_back(
        text("gradient of parameter %lld: %g, expected %g", i / shape_.neurons, total, sums_[i].total));
  }

  const Shape shape_;
  Random random_;
  const bool batch_first_;
  bool detach_recurrent_ = false;
  Texts differences_;
  std::array<int64, 2> state_{};
  RecurrentParams<Scalar> params_{};
  Buffer<Scalar> x_seq_, g_;
  Buffer<Real> weight_, parameters_, v_init_, s_init_, i_init_, gv_, gh_, gv_last_, gs_last_, gi_last_;
  std::vector<Real> s_seq_, emitted_, h_, i_, v_, v_last_, s_last_, i_last_;
  std::vector<Real> dj_, d_weight_, dv_init_, ds_init_, di_init_;
  std::vector<Sum> sums_;
};

Texts run(const Shape& shape, unsigned number) {
  if (number % 4 == 3) return Trial<double>(shape, number).run();
  return number % 2 == 0 ? Trial<float>(shape, number).run() : Trial<BFloat16>(shape, number).run();
}

}  // namespace

int main() {
  asgl_emulation::choose_mutant();
  unsigned cases = 0;
  int failed = 0;
  for (const Shape& shape :
       {Shape{1, 1, 1}, {3, 2, 5}, {2, 17, 9}, {6, 16, 4}, {4, 33, 31}, {2, 3, 66}, {9, 40, 33}, {2, 2, 1040}}) {
    for (int turn = 0; turn < (shape.neurons > 1000 ? 4 : 24) && failed < asgl_emulation::kManyFailures; ++turn) {
      const Texts differences = run(shape, cases++);
      failed += !differences.empty();
      if (differences.empty()) continue;
      std::printf("case %u: (%lld, %lld, %lld):", cases - 1, shape.steps, shape.batch, shape.neurons);
      for (const std::string& difference : differences) std::printf(" %s;", difference.c_str());
      std::printf("\n");
    }
  }
  std::printf("%d of %u cases failed\n", failed, cases);
  return failed == 0 ? 0 : 1;
}
