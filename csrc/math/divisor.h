// Division by an invariant divisor: a multiplication and a shift (Granlund and Montgomery, PLDI 1994).
#pragma once

#include "math/host_device.h"

namespace asgl {

constexpr int64 kDividendLimit = 1LL << 31;  // dividends and divisors are smaller

// Computes number / by and number % by, for 0 <= number < kDividendLimit = 2^31.
//
// Let 2^(s - 1) < by <= 2^s and factor = floor(2^(31 + s) / by) + 1. Then factor * by - 2^(31 + s) is at most 2^s.
// So number * factor / 2^(31 + s) is too large by less than 1 / by, and its integer part is the quotient.
struct Divisor {
  uint32 by, factor;
  int shift;  // 31 + s

  // Precomputes factor and shift, for 1 <= by < kDividendLimit.
  static ASGL_HOST_DEVICE Divisor make(int64 by) {
    int shift = 31;
    while (int64{1} << (shift - 31) < by) ++shift;
    const uint64 factor = (uint64{1} << shift) / static_cast<uint64>(by) + 1;
    return {static_cast<uint32>(by), static_cast<uint32>(factor), shift};
  }

  ASGL_HOST_DEVICE uint32 quotient(uint32 number) const {
    return static_cast<uint32>(static_cast<uint64>(number) * factor >> shift);
  }
  ASGL_HOST_DEVICE uint32 remainder(uint32 number) const { return number - quotient(number) * by; }
};

}  // namespace asgl
