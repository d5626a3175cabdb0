// CUDA's language extensions and types for an ordinary C++ compiler: the keywords, error codes, vector types whose
// copies check their alignment, dim3, and the conversions of half-precision types for PTX.
#ifndef ASGL_CUDA_EMULATION_TYPES_H
#define ASGL_CUDA_EMULATION_TYPES_H

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#ifdef ASGL_EMULATE_THREADS
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

// The values are CUDA's own.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
};

namespace asgl_emulation {

void check_alignment(const void* address, std::size_t alignment, const char* access);

// Hides a pointer from the compiler, which may assume that typed pointers are aligned.
template <class T>
T* launder_address(T* address) {
  asm("" : "+r"(address));
  return address;
}

template <class Vector>
void copy_checked(Vector* to, const Vector* from) {
  void* target = launder_address(static_cast<void*>(to));
  const void* source = launder_address(static_cast<const void*>(from));
  check_alignment(source, alignof(Vector), "load");
  check_alignment(target, alignof(Vector), "store");
  std::memcpy(target, source, sizeof(Vector));
}

}  // namespace asgl_emulation

// no_sanitize: UndefinedBehaviorSanitizer would report the address again, here instead of at the access.
#define ASGL_CHECKED_COPY(Vector)                                                    \
  Vector() = default;                                                                \
  Vector(const Vector& other) { asgl_emulation::copy_checked(this, &other); }        \
  __attribute__((no_sanitize("alignment"))) Vector& operator=(const Vector& other) { \
    asgl_emulation::copy_checked(this, &other);                                      \
    return *this;                                                                    \
  }

struct alignas(8) uint2 {
  unsigned x, y;
  constexpr uint2(unsigned x_, unsigned y_) : x(x_), y(y_) {}
  ASGL_CHECKED_COPY(uint2)
};

struct alignas(16) float4 {
  float x, y, z, w;
  constexpr float4(float x_, float y_, float z_, float w_) : x(x_), y(y_), z(z_), w(w_) {}
  ASGL_CHECKED_COPY(float4)
};
#undef ASGL_CHECKED_COPY

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Launches are one-dimensional.
struct dim3 {
  unsigned x;

  explicit constexpr dim3(unsigned x_ = 1) : x(x_) {}
};

// Set by the scheduler before a CUDA thread runs on this OS thread.
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace asgl_emulation {

inline std::uint16_t half_bits(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  const std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= std::bit_cast<std::uint32_t>(65520.0f)) return std::uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    // Below 2^-14 half values are multiples of 2^-24, the spacing of floats at 0.5: the addition rounds.
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    return std::uint16_t(sign | (std::bit_cast<std::uint32_t>(aligned) - std::bit_cast<std::uint32_t>(0.5f)));
  }
  const std::uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return std::uint16_t(sign | (rounded - 0x38000000) >> 13);
}

inline float half_value(std::uint16_t bits) {
  const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16;
  const std::uint32_t magnitude = bits & 0x7fff;
  if (magnitude > 0x7c00) return std::bit_cast<float>(0x7fffffff);
  if (magnitude == 0x7c00) return std::bit_cast<float>(sign | 0x7f800000);
  if (magnitude < 0x0400) return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(float(magnitude) * 0x1p-24f));
  return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000));
}

inline std::uint16_t bfloat16_bits(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace asgl_emulation

#endif  // ASGL_CUDA_EMULATION_TYPES_H
