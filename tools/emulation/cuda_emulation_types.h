// CUDA's language extensions and types for an ordinary C++ compiler: the keywords, error codes, vector types whose
// copies check their alignment, dim3, and the conversions of half-precision types for PTX.
#ifndef ASGL_CUDA_EMULATION_TYPES_H
#define ASGL_CUDA_EMULATION_TYPES_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#define ASGL_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#ifdef ASGL_EMULATE_THREADS
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

// The values are CUDA's own.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
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

constexpr std::size_t vector_alignment(std::size_t bytes) { return bytes < 16 ? bytes : 16; }

// no_sanitize: UndefinedBehaviorSanitizer would report the address again, here instead of at the access.
#define ASGL_CHECKED_COPY(Vector)                                                    \
  Vector() = default;                                                                \
  Vector(const Vector& other) { copy_checked(this, &other); }                        \
  __attribute__((no_sanitize("alignment"))) Vector& operator=(const Vector& other) { \
    copy_checked(this, &other);                                                      \
    return *this;                                                                    \
  }

template <class T>
struct alignas(vector_alignment(2 * sizeof(T))) Vector2 {
  T x, y;
  constexpr Vector2(T x_, T y_) : x(x_), y(y_) {}
  ASGL_CHECKED_COPY(Vector2)
};

template <class T>
struct Vector3 {
  T x, y, z;
};

template <class T>
struct alignas(vector_alignment(4 * sizeof(T))) Vector4 {
  T x, y, z, w;
  constexpr Vector4(T x_, T y_, T z_, T w_) : x(x_), y(y_), z(z_), w(w_) {}
  ASGL_CHECKED_COPY(Vector4)
};
#undef ASGL_CHECKED_COPY

}  // namespace asgl_emulation

#define ASGL_VECTOR_TYPES(name, T)                                   \
  using name##2 = asgl_emulation::Vector2<T>;                        \
  using name##3 = asgl_emulation::Vector3<T>;                        \
  using name##4 = asgl_emulation::Vector4<T>;                        \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
ASGL_VECTOR_TYPES(char, signed char)
ASGL_VECTOR_TYPES(uchar, unsigned char)
ASGL_VECTOR_TYPES(short, short)
ASGL_VECTOR_TYPES(ushort, unsigned short)
ASGL_VECTOR_TYPES(int, int)
ASGL_VECTOR_TYPES(uint, unsigned)
ASGL_VECTOR_TYPES(longlong, long long)
ASGL_VECTOR_TYPES(ulonglong, unsigned long long)
ASGL_VECTOR_TYPES(float, float)
ASGL_VECTOR_TYPES(double, double)
#undef ASGL_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;

  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Set by the scheduler before a CUDA thread runs on this OS thread.
inline thread_local uint3 threadIdx;
inline thread_local uint3 blockIdx;
inline thread_local dim3 blockDim;
inline thread_local dim3 gridDim;
inline constexpr int warpSize = 32;

namespace asgl_emulation {

inline std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint16_t half_bits(float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  const std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= float_bits(65520.0f)) return std::uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    // Below 2^-14 half values are multiples of 2^-24, the spacing of floats at 0.5: the addition rounds.
    const float aligned = float_from_bits(magnitude) + 0.5f;
    return std::uint16_t(sign | (float_bits(aligned) - float_bits(0.5f)));
  }
  const std::uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return std::uint16_t(sign | (rounded - 0x38000000) >> 13);
}

inline float half_value(std::uint16_t bits) {
  const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16;
  const std::uint32_t magnitude = bits & 0x7fff;
  if (magnitude > 0x7c00) return float_from_bits(0x7fffffff);
  if (magnitude == 0x7c00) return float_from_bits(sign | 0x7f800000);
  if (magnitude < 0x0400) return float_from_bits(sign | float_bits(float(magnitude) * 0x1p-24f));
  return float_from_bits(sign | ((magnitude << 13) + 0x38000000));
}

inline std::uint16_t bfloat16_bits(float value) {
  const std::uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace asgl_emulation

#endif  // ASGL_CUDA_EMULATION_TYPES_H
