// Checks of the headers in csrc without torch: `headers_test` lists them, `headers_test NAME` runs one.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>

#include "cpu/philox_simd.h"
#include "math/float_math.h"
#include "math/normalisation.h"
#include "math/philox.h"
#include "params/neuron.h"

namespace {

using asgl::bit_cast;
using asgl::int64;
using asgl::uint32;

int failures = 0;

__attribute__((format(printf, 2, 3))) void expect(bool holds, const char* format, ...) {
  if (holds || ++failures > 10) return;
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

// Philox4x32-10 as published: words of 32 bits, each round a permuted pair of products.
struct Words {
  uint32_t w[4];
};

Words published_philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.w[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.w[2];
    const auto high0 = static_cast<uint32_t>(product0 >> 32), low0 = static_cast<uint32_t>(product0);
    const auto high1 = static_cast<uint32_t>(product1 >> 32), low1 = static_cast<uint32_t>(product1);
    counter = {{high1 ^ counter.w[1] ^ key0, low1, high0 ^ counter.w[3] ^ key1, low0}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The draw of neuron n at step t, by definition.
uint32_t defined_draw(uint64_t n, uint32_t t, uint64_t seed, uint64_t offset) {
  const uint64_t group = n / 4;
  const Words counter = {
      {static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), t / 2, static_cast<uint32_t>(offset)}};
  const Words words = published_philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint64_t lane = 4 * (t % 2) + n % 4;
  const uint32_t word = words.w[lane / 2];
  return lane % 2 == 0 ? word & 0xFFFFu : word >> 16;
}

void expect_draws(uint64_t n, uint32_t t, int64 seed, int64 offset) {
  const int64 rng_state[] = {seed, offset};
  const asgl::NoiseBlock block = asgl::noise_block(n / 4, t / 2, asgl::noise_key(rng_state));
  const uint64_t draw = block.draws[t % 2] >> (16 * (n % 4)) & 0xFFFFu;
  const uint32_t expected = defined_draw(n, t, static_cast<uint64_t>(seed), static_cast<uint64_t>(offset));
  expect(draw == expected, "neuron %llu, step %u, seed %lld, offset %lld: %llu, expected %u",
         static_cast<unsigned long long>(n), t, seed, offset, static_cast<unsigned long long>(draw), expected);
}

void noise_of_groups_beyond_32_bits() {
  const uint64_t first_groups[] = {(uint64_t{1} << 32) - 2, (uint64_t{1} << 33) + 5, (uint64_t{1} << 60) - 3};
  for (const uint64_t group : first_groups) {
    for (uint64_t n = 4 * group; n < 4 * group + 20; ++n) {
      for (const uint32_t t : {0u, 1u, 6u, 0xFFFFFFFFu}) expect_draws(n, t, 1234567890123, 42);
    }
  }
}

// The rows of a tile in each clone that this processor runs, and nothing beyond whole vectors.
void noise_rows_of_clones() {
  using asgl::cpu::InstructionSet, asgl::cpu::NoiseLoop, asgl::cpu::kNoiseGroups;
  constexpr int64 kMostGroups = 3 * kNoiseGroups;
  const int64 rng_state[] = {0x123456789ABCDEF, -5};
  for (const auto set : {InstructionSet::kBaseline, InstructionSet::kAvx2, InstructionSet::kAvx512}) {
    if (set > asgl::cpu::best_instruction_set()) continue;
    for (const uint64_t first : {uint64_t{0}, uint64_t{96}, uint64_t{1} << 32, (uint64_t{1} << 61) - 32}) {
      for (const int64 groups : {1, 15, 16, 17, 31, 32, 33, 95, 96}) {
        asgl::uint64 rows[2][kMostGroups + 1] = {};
        asgl::cpu::clone_for<NoiseLoop>(set)({asgl::noise_key(rng_state), first, groups, 3, rows[0], rows[1]});
        for (int64 i = 0; i < 2 * 4 * groups; ++i) {
          const int64 step = i % 2, lane = i / 2;
          const auto draw = static_cast<uint32_t>(rows[step][lane / 4] >> (16 * (lane % 4)) & 0xFFFFu);
          const uint32_t expected = defined_draw(4 * first + lane, 6 + step, 0x123456789ABCDEF, uint64_t(-5));
          expect(draw == expected, "set %d, group %lld of %llu: %u, expected %u", static_cast<int>(set), lane / 4,
                 static_cast<unsigned long long>(first), draw, expected);
        }
        expect(rows[0][kMostGroups] == 0 && rows[1][kMostGroups] == 0, "stored beyond the rows");
      }
    }
  }
}

void element_beyond_32_bits() {
  const asgl::SequenceShape shapes[] = {
      {1, 3, (int64{1} << 31) - 1}, {1, 3, int64{1} << 31},       {1, 5, (int64{1} << 32) + 3},
      {3, 7, (int64{1} << 31) + 1}, {(int64{1} << 31) + 9, 4, 3}, {(int64{1} << 33) + 1, 3, 1},
      {70'001, 70'003, 70'009},     {2, (int64{1} << 32) + 1, 5}, {5, 4, 3},
  };
  for (const asgl::SequenceShape& shape : shapes) {
    expect(shape.neurons() == static_cast<__int128>(shape.outer) * shape.inner, "neurons of %lld x %lld: %lld",
           shape.outer, shape.inner, shape.neurons());
    for (const int64 o : {int64{0}, int64{1} % shape.outer, shape.outer / 2, shape.outer - 1}) {
      for (const int64 t : {int64{0}, int64{1}, shape.steps / 2, shape.steps - 1}) {
        for (const int64 i : {int64{0}, shape.inner / 2, shape.inner - 1}) {
          const __int128 expected = (static_cast<__int128>(o) * shape.steps + t) * shape.inner + i;
          const int64 element = shape.offset(o * shape.inner + i, t);
          expect(element == expected, "(%lld, %lld, %lld) of (%lld, %lld, %lld): %lld", o, t, i, shape.outer,
                 shape.steps, shape.inner, element);
        }
      }
    }
  }
}

// Reads `view` with its data pointer set so that only the expected element is `cell`: a wrong index gives another value
// or a fault.
template <class Real>
void expect_parameter_index(int64 step_stride, int64 inner, int64 count, int64 n, int64 t) {
  const Real cells[] = {-1, 17, -1};
  const __int128 index = static_cast<__int128>(t) * step_stride + static_cast<__int128>(n) / inner % count;
  const auto address = reinterpret_cast<std::uintptr_t>(&cells[1]) - static_cast<std::uintptr_t>(index) * sizeof(Real);
  const asgl::ParameterView<Real> view = {reinterpret_cast<const Real*>(address), -2, step_stride, inner, count};
  expect(view.at(n, t) == 17, "neuron %lld, step %lld of stride %lld, inner %lld, count %lld", n, t, step_stride, inner,
         count);
}

template <class Real>
void parameter_indices() {
  constexpr int64 k31 = int64{1} << 31, k32 = int64{1} << 32;
  expect_parameter_index<Real>(0, 1, k31 + 5, k31 + 2, 3);
  expect_parameter_index<Real>(0, 1, k32 + 5, k32 + 2, 3);
  expect_parameter_index<Real>(0, 1, k32 + 5, 3 * k32 + 11, 3);
  expect_parameter_index<Real>(0, k32 + 1, 7, 5 * k32 + 9, 0);
  expect_parameter_index<Real>(0, 3, k32 + 1, 9 * k32, 0);
  expect_parameter_index<Real>(k31 + 1, 1, k31 + 1, k31, 3);
  expect_parameter_index<Real>(k32 + 1, 1, k32 + 1, k32, 3);
  expect_parameter_index<Real>(70'001, 1, 70'001, 123, 70'003);
  expect_parameter_index<Real>(1, 1, 1, k32 + 9, k32 + 7);
  expect_parameter_index<Real>(0, 4, 3, 29, 5);
  const asgl::ParameterView<Real> constant = {nullptr, 3, k32, 1, k32};
  expect(constant.at(k32 + 1, k32 + 2) == 3, "a constant is not itself");
}

void parameter_beyond_32_bits() {
  parameter_indices<float>();
  parameter_indices<double>();
}

// The distance in ulp of the expected value. Infinity counts as 2^128, which follows the largest float.
double ulps(float value, double expected) {
  const double limit = std::ldexp(1.0, 128);
  const double clamped = std::fmin(std::fmax(expected, -limit), limit);
  const double actual = std::isinf(value) ? std::copysign(limit, value) : value;
  int exponent = 0;
  std::frexp(clamped, &exponent);
  return std::fabs(actual - clamped) / std::ldexp(1.0, std::max(std::min(exponent, 128) - 24, -149));
}

// float_math.h claims at most 1.61, measured over all floats.
constexpr double kAllowedUlps = 2.0;

void expect_close(float (*function)(float), double (*exact)(double)) {
  const auto check = [&](float x) {
    const float value = function(x);
    const double distance = ulps(value, exact(x));
    expect(distance <= kAllowedUlps, "%a: %a is %.2f ulp off", x, value, distance);
  };
  // Bit patterns at a stride coprime to 2^32, which covers all exponents and all low bits.
  for (uint64_t bits = 0; bits <= 0xFFFFFFFFu; bits += 509) {
    const auto x = bit_cast<float>(static_cast<uint32>(bits));
    if (!std::isnan(x)) check(x);
  }
  // Densely in the range of neurons, with the bounds of exp and the junctions of erf and atan; and at the ends.
  for (int i = -1'000'000; i <= 1'000'000; ++i) check(static_cast<float>(i) * 1.1e-4f);
  for (const float sign : {1.0f, -1.0f}) check(sign * HUGE_VALF);
}

void exp_is_close() { expect_close(&asgl::float_math::exp, &std::exp); }

// float_math.h claims 1.6e-7, and relative to the result 4e-6; results under 2^-126 are 0.
void exp_of_nonpositive_is_close() {
  for (uint64_t bits = 0x80000000u; bits <= 0xFF800000u; bits += 127) {
    const auto x = bit_cast<float>(static_cast<uint32>(bits));
    const double value = asgl::float_math::exp_of_nonpositive(x), expected = std::exp(static_cast<double>(x));
    const double allowed = std::fmin(1.6e-7, 4e-6 * expected);
    expect(std::fabs(value - expected) <= std::fmax(allowed, 0x1p-126), "%a: %a is not %a", x, value, expected);
  }
  expect(asgl::float_math::exp_of_nonpositive(0.0f) == 1, "e^0 is not 1");
  expect(asgl::float_math::exp_of_nonpositive(-HUGE_VALF) == 0, "e^-inf is not 0");
  // All bits of a NaN, since the scale is made of bits.
  for (uint32 bits = 0x7F800001u; bits < 0x7F800001u + 1024; ++bits) {
    const float nan = bit_cast<float>(bits | 0x80000000u);
    expect(std::isnan(asgl::float_math::exp_of_nonpositive(nan)), "NaN %08x is lost", bits);
  }
}

void erf_is_close() { expect_close(&asgl::float_math::erf, &std::erf); }
void atan_is_close() { expect_close(&asgl::float_math::atan, &std::atan); }

// For equal values, rounding alone would make some variances negative.
void moments_of_equal_values() {
  for (const double value : {0.1, 0.3, 0.7}) {
    double sum = 0, squares = 0;
    for (int count = 1; count <= 16; ++count) {
      sum += value, squares += value * value;
      const asgl::Moments found = asgl::moments_from_shifted_sums(count, 1, sum, squares);
      expect(found.variance >= 0 && found.variance < 1e-15, "variance of %d: %g", count, found.variance);
      expect(std::fabs(found.mean - (1 + value)) < 1e-15, "mean of %d: %.17g", count, found.mean);
    }
  }
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  expect(std::isnan(asgl::moments_from_shifted_sums(2, 0, nan, nan).variance), "NaN");
  expect(
      asgl::moments_from_shifted_sums(0, 1, 0, 0).count == 0 && asgl::moments_from_shifted_sums(0, 1, 0, 0).mean == 0,
      "no values");
}

struct Check {
  const char* name;
  void (*run)();
};

#define CHECK(name) {#name, &name}
const Check checks[] = {
    CHECK(noise_of_groups_beyond_32_bits),
    CHECK(noise_rows_of_clones),
    CHECK(element_beyond_32_bits),
    CHECK(parameter_beyond_32_bits),
    CHECK(exp_is_close),
    CHECK(exp_of_nonpositive_is_close),
    CHECK(erf_is_close),
    CHECK(atan_is_close),
    CHECK(moments_of_equal_values),
};
#undef CHECK

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    for (const Check& check : checks) std::printf("%s\n", check.name);
    return 0;
  }
  for (const Check& check : checks) {
    if (std::strcmp(check.name, argv[1]) == 0) {
      check.run();
      std::printf("%d failures\n", failures);
      return failures > 0 ? 1 : 0;
    }
  }
  std::printf("no check is called %s\n", argv[1]);
  return 2;
}
