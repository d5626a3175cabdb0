// The CUDA kernels of batch normalisation and their launchers, run by the emulation, against plain loops in long
// double; with ASGL_TEST_CPU the CPU kernels. `batch_norm_test small` runs fewer cases, for an emulation in which every
// CUDA thread is an OS thread.
#include <algorithm>
#include <limits>

#if defined(ASGL_TEST_CPU)
#include "cpu/normalisation.cpp"
#else
#include "cuda/launch_normalisation.cuh"
#endif
#include "trials.h"

namespace {

using namespace asgl;
using asgl_emulation::Buffer;
using asgl_emulation::check;
using asgl_emulation::kOnCpu;
using asgl_emulation::plan;
using asgl_emulation::Random;
using asgl_emulation::same;
using asgl_emulation::text;
using asgl_emulation::Texts;

using Wide = long double;

constexpr double kDouble = std::numeric_limits<double>::epsilon();
template <class Real>
constexpr double kEpsilon = std::numeric_limits<Real>::epsilon();

#if defined(ASGL_TEST_CPU)
template <class Params>
cudaError_t launch(const Params& params) {
  return asgl_emulation::launch_on_cpu(params);
}
#else
template <template <class> class Params, class Type>
cudaError_t launch(const Params<Type>& params) {
  const cuda::Start start = asgl_emulation::start_of(params);
  if constexpr (std::is_same_v<Params<Type>, MomentsParams<Type> >) {
    return cuda::launch_moments<Type>(start);
  } else if constexpr (std::is_same_v<Params<Type>, InputGradientParams<Type> >) {
    return cuda::launch_input_gradient<Type>(start);
  } else {
    return cuda::launch_channels<Type>(start);
  }
}
#endif

// Equal up to `error`.
void compare(const std::string& name, Wide is, Wide should_be, Wide error, Texts& differences) {
  if (std::fabs(is - should_be) <= error) return;
  differences.push_back(text("%s is %.17Lg, expected %.17Lg within %.3Lg", name.c_str(), is, should_be, error));
}

std::string at(const char* name, int64 i) { return text("%s[%lld]", name, i); }

// ---- the values of each task ----

struct Cut {
  ChannelShape shape;
  int64 lanes, most_units, rows_each;
};

// Each value belongs to one task, and so does each slot of a channel.
Texts check_cut(const Cut& cut) {
  const ChannelTiles tiles = ChannelTiles::plan(cut.shape, cut.lanes, cut.most_units, cut.rows_each);
  const ChannelShape& shape = cut.shape;
  Texts differences;
  if (tiles.width * tiles.ways > cut.most_units) differences.push_back("a tile has more threads than a block");
  if (tiles.splits > 2048) differences.push_back(text("%lld splits", tiles.splits));
  std::vector<int> visits(shape.rows * shape.columns()), slots(tiles.slots() * shape.channels);
  for (int64 number = 0; number < tiles.tasks(); ++number) {
    const ChannelTask task(tiles, number);
    if (task.units > tiles.width || task.row >= task.end_row) differences.push_back(at("wrong size of task", number));
    for (int64 unit = 0; unit < task.units; ++unit) {
      const int64 channel = task.first_channel + (task.first_unit + unit) / tiles.units_per_channel;
      const int64 position = (task.first_unit + unit) % tiles.units_per_channel;
      const bool first = tiles.tiles_per_channel > 1 ? unit == 0 : position == 0;
      if (first && channel < shape.channels) ++slots[task.slot * shape.channels + channel];
      for (int64 row = task.row; row < task.end_row; ++row) {
        for (int64 j = 0; j < cut.lanes; ++j) {
          const int64 element = row * shape.columns() + channel * shape.inner + position * cut.lanes + j;
          if (element < static_cast<int64>(visits.size())) ++visits[element];
        }
      }
    }
  }
  const auto is_one = [](int number) { return number == 1; };
  if (!std::all_of(visits.begin(), visits.end(), is_one)) differences.push_back("not each value belongs to one task");
  if (!std::all_of(slots.begin(), slots.end(), is_one)) differences.push_back("not each slot belongs to one task");
  return differences;
}

// ---- a sequence ----

// The number seeds all other choices.
struct Case {
  ChannelShape shape;
  unsigned number;
};

struct Coverage {
  int one_lane = 0, four_lanes = 0, ways = 0, splits = 0, tiles = 0, groups = 0;

  bool complete() const { return one_lane > 0 && four_lanes > 0 && ways > 0 && splits > 0 && tiles > 0 && groups > 0; }
};

// The moments of a channel, in two passes.
struct Found {
  Wide mean, variance, range;
};

template <class Scalar>
class Trial {
  using Real = Real_t<Scalar>;

 public:
  Trial(const Case& it, Coverage& coverage) : shape_(it.shape), random_(it.number), coverage_(coverage) {
    options_ = {random_.toss() ? 1e-5 : 1e-3, random_.toss() ? 1.0 : random_.between(0.5, 2)};
    const int64 elements = shape_.rows * shape_.columns(), channels = shape_.channels;
    x_seq_ = Buffer<Scalar>(elements, random_.once_in(4));
    grad_x_seq_ = Buffer<Scalar>(elements, random_.once_in(4));
    make_values();
    weight_ = number_for_each_channel(random_.toss(), 0.5, 1.5);
    bias_ = number_for_each_channel(random_.toss(), -1, 1);
    for (auto* sum : {&grad_gain_, &grad_bias_, &total_grad_gain_, &total_grad_bias_}) {
      *sum = number_for_each_channel(true, -2, 2);
    }
    coefficients_ = Buffer<Real>(kNumCoefficients * channels, 0);
    total_ = Buffer<double>(3 * channels, 0);
  }

  Texts run() {
    find_moments();
    if (differences_.empty()) find_coefficients();
    if (differences_.empty()) find_running();
    if (differences_.empty()) find_adjoint();
    if (differences_.empty()) find_input_gradient(false);
    if (differences_.empty()) find_input_gradient(true);
    return differences_;
  }

 private:
  Buffer<Real> number_for_each_channel(bool wanted, double low, double high) {
    Buffer<Real> buffer = wanted ? Buffer<Real>(shape_.channels, 0) : Buffer<Real>();
    buffer.fill(random_, low, high);
    return buffer;
  }

  int64 channel_of(int64 element) const { return element % shape_.columns() / shape_.inner; }

  // Sums of whole numbers are exact in float: they show a value left out or counted twice.
  void make_values() {
    whole_ = random_.toss();
    const double far = sizeof(Scalar) > 2 ? 10000 : std::is_same_v<Scalar, Half> ? 1000 : 100;
    const double mean = random_.toss() ? far : 0;
    const bool first_far = !whole_ && random_.toss();
    for (int64 i = 0; i < x_seq_.size(); ++i) {
      const int64 channel = channel_of(i);
      const double value = whole_ ? std::floor(random_.between(-8, 9)) : (1 + channel % 5) * random_.between(-1.7, 1.7);
      // The shift of the sums is a channel's first value.
      const double outlier = first_far && i == channel * shape_.inner ? 2048 : 0;
      x_seq_.set(i, mean + channel % 7 + value + outlier);
    }
    grad_x_seq_.fill(random_, -1, 1);
  }

  Found found(int64 channel) const {
    Wide sum = 0, squares = 0, least = std::numeric_limits<Wide>::infinity(), most = -least;
    const auto for_each = [&](auto&& use) {
      for (int64 row = 0; row < shape_.rows; ++row) {
        for (int64 i = 0; i < shape_.inner; ++i) {
          use(static_cast<Wide>(to_real(x_seq_.data()[row * shape_.columns() + channel * shape_.inner + i])));
        }
      }
    };
    for_each([&](Wide x) { sum += x, least = std::min(least, x), most = std::max(most, x); });
    const Wide count = shape_.rows * shape_.inner, mean = sum / count;
    for_each([&](Wide x) { squares += (x - mean) * (x - mean); });
    return {mean, squares / count, most - least};
  }

  void check_tiles(const char* what, const ChannelTiles& tiles, bool aligned) {
    const int64 lanes = !kOnCpu && sizeof(Scalar) <= 4 && shape_.inner % 4 == 0 && aligned ? 4 : 1;
    if (tiles.lanes != lanes) differences_.push_back(text("%s: %lld lanes", what, tiles.lanes));
    ++(lanes == 4 ? coverage_.four_lanes : coverage_.one_lane);
    coverage_.ways += tiles.ways > 1;
    coverage_.splits += tiles.splits > 1;
    coverage_.tiles += tiles.tiles_per_channel > 1;
    coverage_.groups += tiles.channels_per_tile > 1 && tiles.groups() > 1;
  }

  void check_blocks(const char* what, int64 should_be) {
    if (kOnCpu) return;
    const int64 blocks = asgl_emulation::blocks_of_last_launch();
    if (blocks != should_be) differences_.push_back(text("%s: %lld blocks, expected %lld", what, blocks, should_be));
  }

  // A thread sums up to 32 distances from about their mean, each rounded once, and their squares, in Real, four in
  // sequence; the rest has 46 bits or more. Each rounding is at most half an epsilon.
  void check_moments(const Moments& is, int64 channel) {
    const Found should_be = found(channel);
    const Wide range = should_be.range, eps = whole_ ? 0 : kEpsilon<Real>;
    const Wide rounding = 64 * kDouble * (std::fabs(should_be.mean) + range);
    compare(at("count", channel), is.count, shape_.rows * shape_.inner, 0, differences_);
    compare(at("mean", channel), is.mean, should_be.mean, 4 * eps * range + rounding, differences_);
    compare(at("variance", channel), is.variance, should_be.variance, 16 * eps * should_be.variance + rounding * range,
            differences_);
  }

  void find_moments() {
    MomentsParams<Scalar> params{};
    params.tiles.shape = shape_;
    params.x_seq = x_seq_.data();
    plan(params);
    check_tiles("moments", params.tiles, x_seq_.is_aligned());
    // As for a sequence that needs too many splits: a thread reads more values than kChannelRowsEach.
    if (random_.once_in(3)) params.tiles = ChannelTiles::plan(shape_, params.tiles.lanes, kBlockThreads, 150);
    slots_ = params.tiles.slots();
    moments_ = Buffer<double>(3 * slots_ * shape_.channels, 0);
    params.moments = reinterpret_cast<Moments*>(moments_.data());
    check("moments", launch(params), differences_);
    check_blocks("moments", params.tiles.tasks());
  }

  void find_coefficients() {
    CoefficientsParams<Real> params{};
    params.moments = reinterpret_cast<const Moments*>(moments_.data());
    params.slots = slots_;
    params.channels = shape_.channels;
    params.weight = weight_.data();
    params.bias = bias_.data();
    params.options = options_;
    params.coefficients = coefficients_.data();
    params.total = reinterpret_cast<Moments*>(total_.data());
    check("coefficients", launch(params), differences_);
    check_blocks("coefficients", shape_.channels);
    for (int64 channel = 0; channel < shape_.channels; ++channel) check_moments(params.total[channel], channel);
  }

  void find_running() {
    Random random(static_cast<unsigned>(shape_.channels + shape_.rows));
    const int64 channels = shape_.channels;
    const double momentum = random.once_in(4) ? 1 : random.between(0, 1);
    Buffer<Real> running[2], before[2];
    for (int i = 0; i < 2; ++i) {
      running[i] = Buffer<Real>(channels, 0);
      before[i] = Buffer<Real>(channels, 0);
      before[i].fill(random, -3, 3);
      std::copy(before[i].data(), before[i].data() + channels, running[i].data());
    }
    Buffer<int64> count(random.once_in(4) ? 0 : 1, 0);
    if (count.size() > 0) *count.data() = 41;
    RunningParams<Real> params{};
    params.coefficients = coefficients_.data();
    params.channels = channels;
    params.momentum = static_cast<Real>(momentum);
    params.running_mean = running[0].data();
    params.running_var = running[1].data();
    params.num_batches_tracked = count.size() > 0 ? count.data() : nullptr;
    check("running", launch(params), differences_);
    check_blocks("running", cuda::blocks_for(channels, kBlockThreads));
    for (int i = 0; i < 2; ++i) {
      const Real* values = coefficients_.data() + (i == 0 ? kCoefficientMean : kCoefficientVariance) * channels;
      for (int64 channel = 0; channel < channels; ++channel) {
        const Wide is = running[i].data()[channel], value = values[channel], was = before[i].data()[channel];
        if (std::isnan(values[channel]) && std::isnan(is)) continue;  // variance of a single value
        // A difference, a product and a sum are rounded, each to half an epsilon.
        const Wide error = momentum == 1 ? 0 : 2 * kEpsilon<Real> * (std::fabs(value) + std::fabs(was));
        compare(at(i == 0 ? "running mean" : "running variance", channel), is,
                was + static_cast<Wide>(params.momentum) * (value - was), error, differences_);
      }
      if (running[i].overrun()) differences_.push_back("running statistics were written beyond their end");
    }
    if (count.size() > 0 && *count.data() != 42) differences_.push_back("a batch is not counted once");
  }

  // The sums of gradients are random; expected results follow from these and the moments.
  void find_adjoint() {
    const int64 channels = shape_.channels;
    grad_weight_ = Buffer<Real>(channels, 0);
    grad_shift_ = Buffer<Real>(channels, 0);
    adjoint_ = Buffer<Real>(2 * channels, 0);
    AdjointParams<Real> params{};
    params.moments = reinterpret_cast<const Moments*>(total_.data());
    params.coefficients = coefficients_.data();
    params.channels = channels;
    params.grad_gain = grad_gain_.data();
    params.grad_bias = grad_bias_.data();
    params.total_grad_gain = total_grad_gain_.data();
    params.total_grad_bias = total_grad_bias_.data();
    params.options = options_;
    params.grad_weight = grad_weight_.data();
    params.grad_shift = grad_shift_.data();
    params.adjoint = adjoint_.data();
    check("adjoint", launch(params), differences_);
    check_blocks("adjoint", cuda::blocks_for(channels, kBlockThreads));
    for (int64 channel = 0; channel < channels; ++channel) {
      const Moments& moments = params.moments[channel];
      const Wide mean = coefficients_.data()[channel], gain = coefficients_.data()[channels + channel];
      const Wide inverse = 1 / std::sqrt(static_cast<Wide>(moments.variance) + options_.eps);
      const Wide beyond = moments.mean - mean, scale = options_.input_scale;
      const auto of_normalised = [&](const Buffer<Real>& grad_gain, const Buffer<Real>& grad_bias) {
        return inverse * (grad_gain.data()[channel] - beyond * grad_bias.data()[channel]);
      };
      const Wide slope = -gain * inverse * of_normalised(total_grad_gain_, total_grad_bias_) / moments.count;
      const Wide offset = -gain * total_grad_bias_.data()[channel] / moments.count - slope * beyond;
      // Computed in double, with a few roundings, then rounded.
      const auto expect = [&](const char* name, Real is, Wide should_be) {
        const Wide error = (kEpsilon<Real> + 4 * kDouble) * std::fabs(should_be) + 1e-13L;
        compare(at(name, channel), is, should_be, error, differences_);
      };
      expect("grad_weight", grad_weight_.data()[channel], scale * of_normalised(grad_gain_, grad_bias_));
      expect("grad_shift", grad_shift_.data()[channel], scale * grad_bias_.data()[channel]);
      expect("slope", adjoint_.data()[channel], slope);
      expect("offset", adjoint_.data()[channels + channel], offset);
    }
  }

  void find_input_gradient(bool has_residual) {
    std::vector<Real> expected(x_seq_.size());
    Buffer<Scalar> residual;
    if (has_residual) {
      residual = Buffer<Scalar>(x_seq_.size(), shape_.rows % 5 == 0);
      residual.fill(random_, -1, 1);
    }
    for (int64 i = 0; i < x_seq_.size(); ++i) {
      const int64 channel = channel_of(i);
      const Real slope = adjoint_.data()[channel], offset = adjoint_.data()[shape_.channels + channel];
      const Real distance = to_real(x_seq_.data()[i]) - coefficients_.data()[channel];
      Real gain_dh = to_real(grad_x_seq_.data()[i]);
      if (has_residual) {
        const Real dh = to_real(residual.data()[i]);
        gain_dh = coefficients_.data()[kCoefficientGain * shape_.channels + channel] * dh;
      }
      expected[i] = gain_dh + (slope * distance + offset);
    }
    InputGradientParams<Scalar> params{};
    params.tiles.shape = shape_;
    params.x_seq = x_seq_.data();
    params.grad_x_seq = grad_x_seq_.data();
    params.grad_residual = residual.data();
    params.gain = coefficients_.data() + kCoefficientGain * shape_.channels;
    plan(params);
    check_tiles("input gradient", params.tiles,
                x_seq_.is_aligned() && grad_x_seq_.is_aligned() && residual.is_aligned());
    if (random_.once_in(3)) params.tiles = ChannelTiles::plan(shape_, params.tiles.lanes, kBlockThreads, 150);
    params.mean = coefficients_.data();
    params.adjoint = adjoint_.data();
    check("input gradient", launch(params), differences_);
    check_blocks("input gradient", params.tiles.tasks());
    for (int64 i = 0; i < x_seq_.size() && differences_.empty(); ++i) {
      const double is = to_real(grad_x_seq_.data()[i]), should_be = to_real(from_real<Scalar>(expected[i]));
      if (!same(is, should_be)) compare(at("dx", i), is, should_be, 0, differences_);
    }
    if (grad_x_seq_.overrun()) differences_.push_back("dx was written beyond its end");
  }

  const ChannelShape shape_;
  Random random_;
  Coverage& coverage_;
  Texts differences_;
  bool whole_ = false;
  Normalisation options_{};
  int64 slots_ = 0;
  Buffer<Scalar> x_seq_, grad_x_seq_;
  Buffer<double> moments_, total_;
  Buffer<Real> weight_, bias_, grad_gain_, grad_bias_, total_grad_gain_, total_grad_bias_;
  Buffer<Real> coefficients_, grad_weight_, grad_shift_, adjoint_;
};

const char* const kTypes[] = {"float", "bfloat16", "float16", "double"};

Texts run(const Case& it, Coverage& coverage) {
  switch (it.number % 4) {
    case 0:
      return Trial<float>(it, coverage).run();
    case 1:
      return Trial<BFloat16>(it, coverage).run();
    case 2:
      return Trial<Half>(it, coverage).run();
    default:
      return Trial<double>(it, coverage).run();
  }
}

// ---- coefficients ----

// From random moments, some of no values, or from a mean and a variance.
struct CoefficientsCase {
  int64 slots, channels;  // no slots: mean and variance
};

template <class Real>
Texts check_coefficients(const CoefficientsCase& it, unsigned number) {
  Random random(number);
  Texts differences;
  const int64 channels = it.channels;
  const auto numbers = [&](bool wanted, double low, double high) {
    Buffer<Real> buffer = wanted ? Buffer<Real>(channels, 0) : Buffer<Real>();
    buffer.fill(random, low, high);
    return buffer;
  };
  const bool given = it.slots == 0;
  const double far = random.toss() ? 1e4 : 0;
  const Buffer<Real> mean = numbers(given, far - 1, far + 1), variance = numbers(given, 0, 2);
  const Buffer<Real> weight = numbers(random.toss(), -1.5, 1.5), bias = numbers(random.toss(), -1, 1);
  Buffer<Real> coefficients(kNumCoefficients * channels, 0);
  Buffer<double> moments = given ? Buffer<double>() : Buffer<double>(3 * it.slots * channels, 0);
  Buffer<double> total(3 * channels, 0);
  for (int64 i = 0; i < moments.size(); i += 3) {
    const bool empty = random.once_in(5) && i >= 3 * channels;
    const double values[] = {empty ? 0 : std::floor(random.between(1, 1000)), random.between(far - 1, far + 1),
                             random.between(0, 2)};
    std::copy(values, values + 3, moments.data() + i);
  }
  CoefficientsParams<Real> params{};
  params.moments = reinterpret_cast<const Moments*>(moments.data());
  params.slots = it.slots;
  params.channels = channels;
  params.mean = mean.data();
  params.variance = variance.data();
  params.weight = weight.data();
  params.bias = bias.data();
  params.options = {random.toss() ? 1e-5 : 0.1, random.toss() ? 1.0 : 0.7};
  params.coefficients = coefficients.data();
  params.total = reinterpret_cast<Moments*>(total.data());
  check("coefficients", launch(params), differences);

  for (int64 channel = 0; channel < channels; ++channel) {
    Wide count = 1, sum = 0, squares = 0;
    if (given) {
      sum = mean.data()[channel], squares = variance.data()[channel];
    } else {
      count = 0;
      for (int64 slot = 0; slot < it.slots; ++slot) {
        const Moments& part = params.moments[slot * channels + channel];
        count += part.count;
        sum += static_cast<Wide>(part.count) * part.mean;
      }
      for (int64 slot = 0; slot < it.slots; ++slot) {
        const Moments& part = params.moments[slot * channels + channel];
        const Wide distance = part.mean - sum / count;
        squares += part.count * (part.variance + distance * distance);
      }
    }
    const Wide exact_mean = sum / count, exact_variance = squares / count;
    const Moments& is = params.total[channel];
    // Slots are joined one by one in a thread, then by halves: 8 a thread, 7 times, each with few roundings.
    const Wide rounding = given ? 0 : 64 * kDouble * (1 + far);
    compare(at("count", channel), is.count, count, 0, differences);
    compare(at("mean", channel), is.mean, exact_mean, rounding, differences);
    compare(at("variance", channel), is.variance, exact_variance, rounding, differences);

    // The rest follows from the computed total, in double, then rounded.
    const Real* row = coefficients.data() + channel;
    const Wide scale = params.options.input_scale;
    const Wide gain = scale * (weight.data() == nullptr ? Wide(1) : weight.data()[channel]) /
                      std::sqrt(static_cast<Wide>(is.variance) + params.options.eps);
    const Wide shift = scale * (bias.data() == nullptr ? Wide(0) : bias.data()[channel]);
    const Wide rounded_mean = static_cast<Real>(is.mean);
    const auto expect = [&](const char* name, Coefficient which, Wide should_be) {
      const Wide error = (kEpsilon<Real> + 4 * kDouble) * std::fabs(should_be) + 1e-14L;
      compare(at(name, channel), row[which * channels], should_be, error, differences);
    };
    compare(at("rounded mean", channel), row[kCoefficientMean * channels], rounded_mean, 0, differences);
    expect("gain", kCoefficientGain, gain);
    expect("bias", kCoefficientBias, shift - gain * (is.mean - rounded_mean));
    if (count > 1) expect("unbiased variance", kCoefficientVariance, is.variance * (count / (count - 1)));
  }
  return differences;
}

// ---- errors ----

#if !defined(ASGL_TEST_CPU)
// A launch reports its own error alone, and leaves none behind; an error of others stays for them.
Texts check_errors() {
  Texts differences;
  const auto expect = [&](const char* what, cudaError_t is, cudaError_t should_be) {
    if (is != should_be) differences.push_back(text("%s: %s", what, cudaGetErrorName(is)));
  };
  Buffer<float> values(4, 0);
  RunningParams<float> params{};
  params.running_mean = params.running_var = values.data();
  params.coefficients = values.data();
  const auto launch_for = [&](int64 channels) {
    params.channels = channels;
    return launch(params);
  };
  expect("a launch of nothing", launch_for(0), cudaErrorInvalidConfiguration);
  expect("the last error after it", cudaGetLastError(), cudaSuccess);
  int value = 0;
  expect("a call of others", cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, -1), cudaErrorInvalidValue);
  expect("a launch after it", launch_for(1), cudaSuccess);
  expect("the last error of others", cudaGetLastError(), cudaErrorInvalidValue);
  return differences;
}
#endif

// ---- all of them ----

class Outcomes {
 public:
  bool goes_on() const { return failed_ < asgl_emulation::kManyFailures; }
  unsigned cases() const { return cases_; }
  int failed() const { return failed_; }

  void add(const std::string& name, const Texts& differences) {
    ++cases_;
    failed_ += !differences.empty();
    if (differences.empty()) return;
    std::printf("case %u: %s:", cases_ - 1, name.c_str());
    for (size_t i = 0; i < differences.size() && i < 4; ++i) std::printf(" %s;", differences[i].c_str());
    std::printf("\n");
  }

 private:
  unsigned cases_ = 0;
  int failed_ = 0;
};

std::string name_of(const ChannelShape& shape) {
  return text("%lld rows of %lld channels of %lld", shape.rows, shape.channels, shape.inner);
}

std::vector<ChannelShape> shapes(bool small) {
  if (small) return {{5, 3, 1}, {130, 3, 4}, {5, 200, 3}, {5, 1, 600}, {70, 100, 1}};
  std::vector<ChannelShape> all;
  constexpr int64 kMost = 60000;  // elements, for a short run
  for (const int64 inner : {7, 128, 600, 4, 1, 10, 1024, 3, 49}) {
    for (const int64 channels : {3, 200, 1, 64}) {
      for (const int64 rows : {130, 5, 4099, 1}) {
        if (rows * channels * inner <= kMost) all.push_back({rows, channels, inner});
      }
    }
  }
  return all;
}

void run_all(bool small, Outcomes& outcomes, Coverage& coverage) {
  for (const ChannelShape& shape : {ChannelShape{5, 3, 1}, {11, 9, 12}, {3, 2, 100}, {7, 5, 36}, {5000, 3, 4}}) {
    for (const int64 lanes : {1, 4}) {
      for (const int64 rows_each : {1, 3}) {
        if (shape.inner % lanes != 0 || !outcomes.goes_on()) continue;
        outcomes.add("tasks of " + name_of(shape), check_cut({shape, lanes, 8, rows_each}));
      }
    }
  }
#if !defined(ASGL_TEST_CPU)
  outcomes.add("errors", check_errors());
#endif
  for (const int64 slots : small ? std::vector<int64>{0, 129} : std::vector<int64>{0, 1, 2, 127, 128, 129, 1000}) {
    for (const int64 channels : {1, 5}) {
      for (int turn = 0; turn < 4; ++turn) {
        if (!outcomes.goes_on()) continue;
        const CoefficientsCase it{slots, channels};
        const unsigned number = outcomes.cases();
        outcomes.add(text("coefficients of %lld channels from %lld slots", channels, slots),
                     turn % 2 == 0 ? check_coefficients<float>(it, number) : check_coefficients<double>(it, number));
      }
    }
  }
  // Five turns: the four types, and one of them, another for each shape, again.
  for (const ChannelShape& shape : shapes(small)) {
    for (int turn = 0; turn < 5 && outcomes.goes_on(); ++turn) {
      const Case it{shape, outcomes.cases()};
      outcomes.add(text("%s, %s", kTypes[it.number % 4], name_of(shape).c_str()), run(it, coverage));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  asgl_emulation::choose_mutant();
  Outcomes outcomes;
  Coverage coverage;
  run_all(argc > 1 && std::string(argv[1]) == "small", outcomes, coverage);
  std::printf(
      "%d of %u cases failed; with four lanes %d, with one %d; with several ways %d, splits %d, tiles %d, groups "
      "of channels %d\n",
      outcomes.failed(), outcomes.cases(), coverage.four_lanes, coverage.one_lane, coverage.ways, coverage.splits,
      coverage.tiles, coverage.groups);
  return outcomes.failed() == 0 && (coverage.complete() || kOnCpu) ? 0 : 1;
}
