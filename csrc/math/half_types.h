// 16-bit floating types, which only store bits, and their conversion to and from the arithmetic type.
#pragma once

#include "math/host_device.h"

namespace asgl {

struct Half {
  uint16 bits;
};

struct BFloat16 {
  uint16 bits;
};

// The type of state, arithmetic and parameters for elements of type Scalar.
template <class Scalar>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class Scalar>
using Real_t = typename RealOf<Scalar>::type;

// Converts a stored value to the arithmetic type.
ASGL_HOST_DEVICE float to_real(float value) { return value; }
ASGL_HOST_DEVICE double to_real(double value) { return value; }

ASGL_HOST_DEVICE float to_real(BFloat16 value) { return bit_cast<float>(static_cast<uint32>(value.bits) << 16); }

ASGL_HOST_DEVICE float to_real(Half value) {
#if defined(__CUDA_ARCH__)
  float real;
  asm("cvt.f32.f16 %0, %1;" : "=f"(real) : "h"(value.bits));
  return real;
#else
  const uint32 magnitude = value.bits & 0x7FFFu;
  const uint32 sign = static_cast<uint32>(value.bits & 0x8000u) << 16;
  const uint32 normal = (magnitude << 13) + (112u << 23);
  const uint32 infinite_or_nan = (magnitude << 13) + (224u << 23);
  const uint32 subnormal = bit_cast<uint32>(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f);
  const uint32 bits = magnitude < 0x0400u ? subnormal : magnitude < 0x7C00u ? normal : infinite_or_nan;
  return bit_cast<float>(sign | bits);
#endif
}

// Converts to the stored type: rounds to nearest, ties to even. NaN stays NaN.
template <class Scalar>
ASGL_HOST_DEVICE Scalar from_real(Real_t<Scalar> value) {
  return value;
}

template <>
ASGL_HOST_DEVICE BFloat16 from_real<BFloat16>(float value) {
  const uint32 bits = bit_cast<uint32>(value);
  const uint32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}

template <>
ASGL_HOST_DEVICE Half from_real<Half>(float value) {
#if defined(__CUDA_ARCH__)
  Half half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#else
  const uint32 bits = bit_cast<uint32>(value);
  const uint32 magnitude = bits & 0x7FFFFFFFu;
  const uint32 sign = (bits >> 16) & 0x8000u;
  const uint32 normal = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adds 1/2: floats in [1/2, 1) have the spacing of float16's subnormals, so that the addition rounds.
  const uint32 subnormal = bit_cast<uint32>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32>(0.5f);
  const uint32 finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32 half = magnitude < 0x47800000u ? finite : magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return {static_cast<uint16>(sign | half)};
#endif
}

// Reads two adjacent elements from one word, the first from the low half.
template <class Scalar>
ASGL_HOST_DEVICE void unpack(uint32 word, float& first, float& second) {
  first = to_real(Scalar{static_cast<uint16>(word)});
  second = to_real(Scalar{static_cast<uint16>(word >> 16)});
}

// Packs two elements into one word, the first into the low half.
template <class Scalar>
ASGL_HOST_DEVICE uint32 pack(float first, float second) {
  return from_real<Scalar>(first).bits | static_cast<uint32>(from_real<Scalar>(second).bits) << 16;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
ASGL_HOST_DEVICE uint32 pack<BFloat16>(float first, float second) {
  uint32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <>
ASGL_HOST_DEVICE uint32 pack<Half>(float first, float second) {
  uint32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
#endif

}  // namespace asgl
