// exp, erf and atan in float32, for CPU kernels and for math/learned.h. They have no branches and tables, so that loops
// vectorise, and no FMA, so that all processors compute the same bits. Errors were measured over all 2^32 floats. NaN
// stays NaN, because values are clamped by comparisons instead of min and max.
#pragma once

#include "math/host_device.h"

namespace asgl::float_math {

// e^x = 2^n e^r with x = n ln2 + r, |r| <= ln2 / 2 and e^r = 1 + (r + r^2 q(r)). Adding 1.5 * 2^23 rounds x / ln2 to n,
// and n ln2 is subtracted in two parts. e^r is multiplied by two factors of 2^n, because 2^n itself may overflow or be
// subnormal. The error is at most 0.97 ulp, and e^0 is exactly 1.
ASGL_HOST_DEVICE float exp(float x) {
  x = x > 89.0f ? 89.0f : x;      // already infinite
  x = x < -104.0f ? -104.0f : x;  // already 0
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-06f;
  float q = 0x1.6ab88cp-10f;
  q = q * r + 0x1.12346p-7f;
  q = q * r + 0x1.5556ecp-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0.5f;
  const float p = 1.0f + (r + (r * r) * q);
  const int exponent = static_cast<int>(bit_cast<uint32>(shifted) - 0x4B400000u);
  const int half = exponent >> 1;
  const float scale = bit_cast<float>(static_cast<uint32>(half + 127) << 23);
  const float other_scale = bit_cast<float>(static_cast<uint32>(exponent - half + 127) << 23);
  return (p * scale) * other_scale;
}

// e^x for x <= 0, with two thirds of the operations of exp. x log2(e) = n + r with |r| <= 1/2, and 2^r is a polynomial
// whose parts are computed independently. One factor 2^n suffices, because nothing overflows and results below 2^-126.5
// are 0. The absolute error is at most 1.6e-7. The relative error of normal results is at most 4e-6, and 2.2e-7 for
// x > -0.5. e^0 is exactly 1.
ASGL_HOST_DEVICE float exp_of_nonpositive(float x) {
  x = x < -88.0f ? -88.0f : x;  // already 0
  const float scaled = x * 1.44269504f;
  const float shifted = scaled + 12582912.0f;
  const float r = scaled - (shifted - 12582912.0f), square = r * r;
  const float middle = 0x1.ebf9bcp-3f + 0x1.c6b752p-5f * r, high = 0x1.3cea88p-7f + 0x1.5bba14p-10f * r;
  const float power = (1.0f + 0x1.62e42ap-1f * r) + square * (middle + square * high);
  return power * bit_cast<float>((bit_cast<uint32>(shifted) << 23) + 0x3F800000u);
}

// erf(|x|) = a + a q(a^2) for a = |x| below 293/256, else 1 - p(a - 293/256)^8, where p approximates erfc^(1/8). The
// error is at most 1.61 ulp.
ASGL_HOST_DEVICE float erf(float x) {
  const uint32 sign = bit_cast<uint32>(x) & 0x80000000u;
  float a = bit_cast<float>(bit_cast<uint32>(x) & 0x7FFFFFFFu);
  a = a > 4.0f ? 4.0f : a;  // already 1
  const float square = a * a;
  float q = 0x1.232b36p-14f;
  q = q * square - 0x1.94f0d2p-11f;
  q = q * square + 0x1.51d35cp-8f;
  q = q * square - 0x1.b7aeb6p-6f;
  q = q * square + 0x1.ce28dep-4f;
  q = q * square - 0x1.812732p-2f;
  q = q * square + 0x1.06eba6p-3f;
  const float y = a - 1.14453125f;
  float p = 0x1.58ad2ap-13f;
  p = p * y - 0x1.88b9ep-10f;
  p = p * y + 0x1.dc3bdcp-10f;
  p = p * y + 0x1.45fc84p-6f;
  p = p * y - 0x1.06833ap-5f;
  p = p * y - 0x1.16cea4p-2f;
  p = p * y + 0x1.8289c6p-1f;
  p = p * p;
  p = p * p;
  p = p * p;
  const float value = a < 1.14453125f ? a + a * q : 1.0f - p;
  return bit_cast<float>(bit_cast<uint32>(value) | sign);
}

// atan(|x|) = z + z^3 q(z^2) with z = |x| for |x| <= 1, else pi / 2 minus this with z = 1 / |x|. The error is at most
// 1.40 ulp.
ASGL_HOST_DEVICE float atan(float x) {
  const uint32 sign = bit_cast<uint32>(x) & 0x80000000u;
  const float a = bit_cast<float>(bit_cast<uint32>(x) & 0x7FFFFFFFu);
  const float inverse = 1.0f / a;
  const float z = a > 1.0f ? inverse : a;
  const float square = z * z;
  float q = 0x1.7ea7aap-9f;
  q = q * square - 0x1.0c17d6p-6f;
  q = q * square + 0x1.61eebcp-5f;
  q = q * square - 0x1.3550d8p-4f;
  q = q * square + 0x1.b4de8cp-4f;
  q = q * square - 0x1.230a92p-3f;
  q = q * square + 0x1.9978f8p-3f;
  q = q * square - 0x1.5554dep-2f;
  const float tail = (z * square) * q;
  const float value = a > 1.0f ? (1.57079637f - z) - (tail + 4.37113883e-08f) : z + tail;
  return bit_cast<float>(bit_cast<uint32>(value) | sign);
}

}  // namespace asgl::float_math
