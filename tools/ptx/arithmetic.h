// The arithmetic instructions of PTX: `add.rn.f32` is add_rn<f32>, `cvt.rn.f16.f32` cvt_rn<f16, f32>. The translator
// refuses others. Integers wrap (-fwrapv), nothing is contracted (-ffp-contract=off).
#pragma once

// Kernels take longer to compile than to run; points-to analysis is a sixth of the compile time.
#pragma GCC optimize("no-tree-pta")

#include "cuda_emulation_types.h"
#include "machine.h"

namespace ptx {

// ---- integers and bits ----

template <class T>
T mov(T a) {
  return a;
}
template <class T>
T cvta_to_global(T a) {
  return a;
}
template <class T>
T selp(T a, T b, bool condition) {
  return condition ? a : b;
}

template <class T>
concept Whole = std::is_integral_v<T> && !std::is_same_v<T, bool>;

template <Whole T>
T add(T a, T b) {
  return a + b;
}
template <Whole T>
T sub(T a, T b) {
  return a - b;
}
template <Whole T>
T mul_lo(T a, T b) {
  return static_cast<T>(u64(a) * u64(b));
}
template <Whole T>
T mad_lo(T a, T b, T c) {
  return static_cast<T>(u64(a) * u64(b) + u64(c));
}
template <Whole T>
T mul_hi(T a, T b) {
  static_assert(sizeof(T) == 4);
  using Wide = std::conditional_t<std::is_signed_v<T>, s64, u64>;
  return static_cast<T>(Wide(a) * Wide(b) >> 32);
}
template <Whole T>
auto mul_wide(T a, T b) {
  static_assert(sizeof(T) < 8);
  using Wide = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, s32, u32>,
                                  std::conditional_t<std::is_signed_v<T>, s64, u64>>;
  return static_cast<Wide>(Wide(a) * Wide(b));
}
// The result of a division by zero is unspecified in PTX; all ones here.
template <Whole T>
T div(T a, T b) {
  return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(0 - a) : T(a / b);
}
template <Whole T>
T rem(T a, T b) {
  return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}
template <Whole T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <Whole T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <class T>
T and_(T a, T b) {
  return a & b;
}
template <class T>
T or_(T a, T b) {
  return a | b;
}
template <class T>
T xor_(T a, T b) {
  return a ^ b;
}
template <class T>
T not_(T a) {
  if constexpr (std::is_same_v<T, bool>) {
    return !a;
  } else {
    return static_cast<T>(~a);
  }
}
template <Whole T>
T shl(T a, u32 by) {
  return by < 8 * sizeof(T) ? static_cast<T>(a << by) : T(0);
}
template <Whole T>
T shr(T a, u32 by) {
  if (by < 8 * sizeof(T)) return static_cast<T>(a >> by);
  return a < 0 ? T(-1) : T(0);
}
// Inserts the low `length` bits of a into b at bit `first`.
template <Whole T>
T bfi(T a, T b, u32 first, u32 length) {
  const T field = shl(shl(T(1), length & 0xFF) - T(1), first & 0xFF);
  return (b & ~field) | (shl(a, first & 0xFF) & field);
}
// `length` bits of a from bit `first` on; a signed type would extend the sign.
template <Whole T>
T bfe(T a, u32 first, u32 length) {
  static_assert(std::is_unsigned_v<T>);
  return shr(a, first & 0xFF) & (shl(T(1), length & 0xFF) - T(1));
}

// ---- comparisons ----

// False with a NaN operand; the unordered comparisons, suffix u, are true.
template <class T>
bool setp_eq(T a, T b) {
  return a == b;
}
template <class T>
bool setp_ne(T a, T b) {
  return a < b || a > b;
}
template <class T>
bool setp_lt(T a, T b) {
  return a < b;
}
template <class T>
bool setp_le(T a, T b) {
  return a <= b;
}
template <class T>
bool setp_gt(T a, T b) {
  return a > b;
}
template <class T>
bool setp_ge(T a, T b) {
  return a >= b;
}
template <class T>
bool setp_equ(T a, T b) {
  return !setp_ne(a, b);
}
template <class T>
bool setp_neu(T a, T b) {
  return !setp_eq(a, b);
}
template <class T>
bool setp_ltu(T a, T b) {
  return !setp_ge(a, b);
}
template <class T>
bool setp_leu(T a, T b) {
  return !setp_gt(a, b);
}
template <class T>
bool setp_gtu(T a, T b) {
  return !setp_le(a, b);
}
template <class T>
bool setp_geu(T a, T b) {
  return !setp_lt(a, b);
}
template <class T>
bool setp_num(T a, T b) {
  return a == a && b == b;
}
template <class T>
bool setp_nan(T a, T b) {
  return !setp_num(a, b);
}

// ---- floating point ----

template <class T>
concept Floating = std::is_floating_point_v<T>;

// A device's float32 NaN results are the canonical NaN.
inline f32 canonical(f32 a) { return a == a ? a : __builtin_bit_cast(f32, 0x7FFFFFFFu); }
inline f64 canonical(f64 a) { return a; }

template <Floating T>
T add_rn(T a, T b) {
  return canonical(a + b);
}
template <Floating T>
T sub_rn(T a, T b) {
  return canonical(a - b);
}
template <Floating T>
T mul_rn(T a, T b) {
  return canonical(a * b);
}
template <Floating T>
T div_rn(T a, T b) {
  return canonical(a / b);
}
template <Floating T>
T rcp_rn(T a) {
  return canonical(T(1) / a);
}
inline f32 fused(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
inline f64 fused(f64 a, f64 b, f64 c) { return __builtin_fma(a, b, c); }
template <Floating T>
T fma_rn(T a, T b, T c) {
  return canonical(fused(a, b, c));
}
// Rounds down: in float64 the product is exact, and so is `lost`, the sum's rounding error. Cancellation gives -0.
template <class T>
T fma_rm(T a, T b, T c) {
  static_assert(std::is_same_v<T, f32>);
  const f32 nearest = fused(a, b, c);
  const f64 product = f64(a) * f64(b), sum = product + f64(c);
  const f64 rounded_c = sum - product, lost = (product - (sum - rounded_c)) + (f64(c) - rounded_c);
  const bool above = nearest > sum || (nearest == sum && lost < 0);
  if (sum == 0 && lost == 0) return __builtin_signbit(product) == __builtin_signbit(c) ? c : -0.0f;
  return canonical(above ? __builtin_nextafterf(nearest, -__builtin_inff()) : nearest);
}
template <class T>
T sqrt_rn(T a) {
  static_assert(std::is_same_v<T, f64>);
  return __builtin_sqrt(a);
}
template <class T>
T neg(T a) {
  return -a;
}
template <Floating T>
T abs(T a) {
  return __builtin_signbit(a) ? -a : a;
}
template <Floating T>
T copysign(T sign, T magnitude) {
  return __builtin_signbit(sign) == __builtin_signbit(magnitude) ? magnitude : -magnitude;
}
template <class T>
T max_NaN(T a, T b) {
  static_assert(std::is_same_v<T, f32>);
  if (a != a || b != b) return canonical(__builtin_nanf(""));
  return a == b ? (__builtin_signbit(a) ? b : a) : a < b ? b : a;
}
template <class T>
T min_NaN(T a, T b) {
  return canonical(-max_NaN<T>(-a, -b));
}

// ---- conversions ----

// Integer conversions, and exact ones from float16 or float32 to a wider type.
template <class To, class From>
To cvt(From a) {
  static_assert((Whole<To> && Whole<From>) || (std::is_same_v<To, f64> && std::is_same_v<From, f32>));
  return static_cast<To>(a);
}

struct f16 {
  u16 bits;
};
template <>
inline f32 cvt<f32, f16>(f16 a) {
  return canonical(asgl_emulation::half_value(a.bits));
}

// Rounds to nearest, ties to even.
template <class To, class From>
To cvt_rn(From a) {
  static_assert(std::is_floating_point_v<To>);
  return canonical(static_cast<To>(a));
}
template <>
inline f16 cvt_rn<f16, f32>(f32 a) {
  return {asgl_emulation::half_bits(a)};
}

struct f16x2 {
  u16 low, high;
};
struct bf16x2 {
  u16 low, high;
};
template <class To, class From>
To cvt_rn(From high, From low) {
  constexpr auto bits = std::is_same_v<To, f16x2> ? &asgl_emulation::half_bits : &asgl_emulation::bfloat16_bits;
  return {bits(low), bits(high)};
}

template <class To, class From>
To cvt_rni(From a) {
  static_assert(std::is_same_v<To, f32> && std::is_same_v<From, f32>);
  return canonical(__builtin_nearbyintf(a));
}
template <class To, class From>
To cvt_rzi(From a) {
  static_assert(std::is_same_v<To, From> && std::is_floating_point_v<To>);
  return canonical(static_cast<To>(__builtin_trunc(a)));
}
template <class To, class From>
To cvt_sat(From a) {
  static_assert(std::is_same_v<To, f32> && std::is_same_v<From, f32>);
  return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f;
}

// ---- approximations ----

inline f32 flushed(f32 a) { return __builtin_fabsf(a) < 0x1p-126f ? __builtin_copysignf(0.0f, a) : a; }
inline f64 flushed(f64 a) { return __builtin_fabs(a) < 0x1p-1022 ? __builtin_copysign(0.0, a) : a; }

// The correctly rounded value plus `units` ulp, the error of a device's approximation.
inline f32 off_by(int units, f64 exact) {
  const f32 nearest = flushed(static_cast<f32>(exact));
  if (nearest == 0 || __builtin_isinf(nearest)) return nearest;
  return canonical(flushed(__builtin_bit_cast(f32, __builtin_bit_cast(u32, nearest) + static_cast<u32>(units))));
}
template <class T>
T ex2_approx_ftz(const Machine& m, T a) {
  static_assert(std::is_same_v<T, f32>);
  return off_by(m.ex2_units, __builtin_exp2(f64(flushed(a))));
}
inline f64 upper_half(f64 a) { return __builtin_bit_cast(f64, __builtin_bit_cast(u64, a) & ~u64(0xFFFFFFFF)); }
// In float64 the device reads and writes the upper 32 bits only; the compiled code refines the result.
template <Floating T>
T rcp_approx_ftz(const Machine& m, T a) {
  if constexpr (std::is_same_v<T, f32>) return off_by(m.rcp_units, 1 / f64(flushed(a)));
  return upper_half(flushed(1 / upper_half(flushed(a))));
}

}  // namespace ptx
