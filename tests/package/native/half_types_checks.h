// Checks of float16 and bfloat16, and functions shared by the checks of headers_test.cpp.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>

#include "math/half_types.h"
#include "math/surrogates.h"

namespace {

using asgl::BFloat16;
using asgl::bit_cast;
using asgl::Half;
using asgl::int64;
using asgl::Surrogate;
using asgl::SurrogateMath;
using asgl::uint16;
using asgl::uint32;
using asgl::uint64;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int failures = 0;

__attribute__((format(printf, 2, 3))) void expect(bool holds, const char* format, ...) {
  if (holds || ++failures > 10) return;
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

// A 16-bit type by its definition: sign, exponent, mantissa.
struct Format {
  int mantissa_bits, exponent_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }
  bool is_nan(uint32_t bits) const { return (bits & 0x7FFFu) > infinity(); }

  // Infinity counts as the next power of two: rounding to nearest then decides on overflow.
  double value_or_next_power(uint32_t magnitude) const {
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const int mantissa = static_cast<int>(magnitude & ((1u << mantissa_bits) - 1));
    return exponent == 0 ? std::ldexp(mantissa, 1 - bias() - mantissa_bits)
                         : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias() - mantissa_bits);
  }

  double value(uint32_t bits) const {
    const uint32_t magnitude = bits & 0x7FFFu;
    const double positive = magnitude == infinity() ? HUGE_VAL : value_or_next_power(magnitude);
    return bits & 0x8000u ? -positive : positive;
  }

  // The nearest value, ties to even: found by bisection, not from the bits of the float.
  uint32_t nearest(float number) const {
    const uint32_t sign = std::signbit(number) ? 0x8000u : 0;
    const double magnitude = std::fabs(static_cast<double>(number));
    if (magnitude >= value_or_next_power(infinity())) return sign | infinity();
    uint32_t below = 0, above = infinity();
    while (above - below > 1) {
      const uint32_t middle = (below + above) / 2;
      (value_or_next_power(middle) <= magnitude ? below : above) = middle;
    }
    // Exact: all three have far fewer bits than a double.
    const double to_below = magnitude - value_or_next_power(below);
    const double to_above = value_or_next_power(above) - magnitude;
    const bool up = to_above < to_below || (to_above == to_below && above % 2 == 0);
    return sign | (up ? above : below);
  }
};

constexpr Format kHalf = {10, 5};
constexpr Format kBFloat16 = {7, 8};

template <class Scalar>
void widening(Format format) {
  for (uint32_t bits = 0; bits <= 0xFFFFu; ++bits) {
    const float real = asgl::to_real(Scalar{static_cast<uint16>(bits)});
    if (format.is_nan(bits)) {
      expect(std::isnan(real), "%04x: %g, expected NaN", bits, real);
      continue;
    }
    const double expected = format.value(bits);
    expect(real == expected && std::signbit(real) == std::signbit(expected), "%04x: %a, expected %a", bits, real,
           expected);
  }
}

void half_widening() { widening<Half>(kHalf); }
void bfloat16_widening() { widening<BFloat16>(kBFloat16); }

template <class Scalar>
void expect_nearest(Format format, float number) {
  const uint32_t rounded = asgl::from_real<Scalar>(number).bits;
  const uint32_t expected = format.nearest(number);
  expect(rounded == expected, "%a: %04x, expected %04x", number, rounded, expected);
}

template <class Scalar>
void rounding_of_ties(Format format) {
  for (uint32_t bits = 0; bits < format.infinity(); ++bits) {
    const double number = format.value_or_next_power(bits);
    const double next = format.value_or_next_power(bits + 1);
    const auto tie = static_cast<float>((number + next) / 2);
    expect(tie == (number + next) / 2, "the tie above %04x is no float", bits);
    for (const float sign : {1.0f, -1.0f}) {
      expect_nearest<Scalar>(format, sign * tie);
      expect_nearest<Scalar>(format, sign * std::nextafter(tie, 0.0f));
      expect_nearest<Scalar>(format, sign * std::nextafter(tie, kInfinity));
      expect_nearest<Scalar>(format, sign * static_cast<float>(number));
    }
  }
}

void half_rounding_of_ties() { rounding_of_ties<Half>(kHalf); }
void bfloat16_rounding_of_ties() { rounding_of_ties<BFloat16>(kBFloat16); }

template <class Scalar>
void rounding_of_random_floats(Format format) {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> exponent(-27.0f, 17.0f);  // from below half's subnormals to beyond its maximum
  for (int i = 0; i < 200'000; ++i) {
    const auto number = bit_cast<float>(static_cast<uint32>(random()));
    if (!std::isnan(number)) expect_nearest<Scalar>(format, number);
    expect_nearest<Scalar>(format, std::copysign(std::exp2(exponent(random)), number));
  }
}

void half_rounding_of_random_floats() { rounding_of_random_floats<Half>(kHalf); }
void bfloat16_rounding_of_random_floats() { rounding_of_random_floats<BFloat16>(kBFloat16); }

template <class Scalar>
void rounding_of_extremes(Format format) {
  for (const float number :
       {0.0f, FLT_TRUE_MIN, FLT_MIN, FLT_MAX, kInfinity, 65504.0f, 65519.996f, 65520.0f, 65536.0f}) {
    expect_nearest<Scalar>(format, number);
    expect_nearest<Scalar>(format, -number);
  }
  // Quiet and signalling NaN of both signs, with payloads in the bits that are kept and in those that are dropped.
  for (const uint32 bits : {0x7FC00000u, 0x7F800001u, 0x7FFFFFFFu, 0x7FBFFFFFu, 0x7F801000u}) {
    for (const uint32 sign : {0u, 0x80000000u}) {
      const uint16 rounded = asgl::from_real<Scalar>(bit_cast<float>(bits | sign)).bits;
      expect(format.is_nan(rounded), "NaN %08x: %04x", bits | sign, rounded);
    }
  }
  for (uint32_t bits = 0; bits <= 0xFFFFu; ++bits) {
    const uint16 returned = asgl::from_real<Scalar>(asgl::to_real(Scalar{static_cast<uint16>(bits)})).bits;
    expect(format.is_nan(bits) ? format.is_nan(returned) : returned == bits, "%04x comes back as %04x", bits, returned);
  }
}

void half_rounding_of_extremes() { rounding_of_extremes<Half>(kHalf); }
void bfloat16_rounding_of_extremes() { rounding_of_extremes<BFloat16>(kBFloat16); }

}  // namespace
