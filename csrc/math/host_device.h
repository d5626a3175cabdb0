// For headers that nvcc, NVRTC and host compilers all compile. Includes no standard header, because NVRTC has none.
#pragma once

#if defined(__CUDACC__)
#define ASGL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ASGL_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace asgl {

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

// std::bit_cast, without its header.
template <class To, class From>
ASGL_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
#if defined(__CUDACC__)
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
#else
  return __builtin_bit_cast(To, from);
#endif
}

}  // namespace asgl
