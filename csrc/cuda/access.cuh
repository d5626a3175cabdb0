// A thread computes one neuron, or four adjacent ones, for the whole sequence. This file has the indices of a thread's
// neurons and their memory accesses. plan.h decides how many neurons a thread computes. In float32, one access of 16
// bytes reads or writes four neurons. Packed keeps elements as loaded, and Access converts them when it loads or stores
// them. load_once of both and store_once of Access are for data that a kernel touches only once.
#pragma once

#include "params/neuron.h"

namespace asgl {

constexpr int kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;  // the mask of a shuffle among all lanes

// Accesses whose cache lines are evicted first, so that data that are read again stay in the cache longer.
template <class Word>
__device__ __forceinline__ Word load_streaming(const Word* from) {
  return __ldcs(from);
}
template <class Word>
__device__ __forceinline__ void store_streaming(Word* to, const Word& word) {
  __stcs(to, word);
}
__device__ __forceinline__ Half load_streaming(const Half* from) { return {__ldcs(&from->bits)}; }
__device__ __forceinline__ BFloat16 load_streaming(const BFloat16* from) { return {__ldcs(&from->bits)}; }
__device__ __forceinline__ void store_streaming(Half* to, const Half& from) { __stcs(&to->bits, from.bits); }
__device__ __forceinline__ void store_streaming(BFloat16* to, const BFloat16& from) { __stcs(&to->bits, from.bits); }

// The elements of a thread's neurons as loaded. Unpacking waits for the load, so elements that are loaded ahead stay
// packed until they are used.
template <int kLanes, class Element>
struct Packed;

template <class Element>
struct Packed<1, Element> {
  Element element;

  __device__ __forceinline__ void load(const Element* from) { element = *from; }
  __device__ __forceinline__ void load_once(const Element* from) { element = load_streaming(from); }
  __device__ __forceinline__ void unpack(Real_t<Element> (&to)[1]) const { to[0] = to_real(element); }
};

template <>
struct Packed<4, float> {
  float4 values;

  __device__ __forceinline__ void load(const float* from) { values = *reinterpret_cast<const float4*>(from); }
  __device__ __forceinline__ void load_once(const float* from) {
    values = load_streaming(reinterpret_cast<const float4*>(from));
  }
  __device__ __forceinline__ void unpack(float (&to)[4]) const {
    to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
  }
};

template <class Element>  // Half or BFloat16
struct Packed<4, Element> {
  uint2 pairs;

  __device__ __forceinline__ void load(const Element* from) { pairs = *reinterpret_cast<const uint2*>(from); }
  __device__ __forceinline__ void load_once(const Element* from) {
    pairs = load_streaming(reinterpret_cast<const uint2*>(from));
  }
  __device__ __forceinline__ void unpack(float (&to)[4]) const {
    asgl::unpack<Element>(pairs.x, to[0], to[1]);
    asgl::unpack<Element>(pairs.y, to[2], to[3]);
  }
};

// Accesses to the elements of a thread's neurons, with conversion to and from the arithmetic type.
template <int kLanes>
struct Access;

template <>
struct Access<1> {
  template <class Element>
  static __device__ __forceinline__ void load(const Element* from, Real_t<Element> (&to)[1]) {
    to[0] = to_real(*from);
  }
  template <class Element>
  static __device__ __forceinline__ void store(const Real_t<Element> (&from)[1], Element* to) {
    *to = from_real<Element>(from[0]);
  }
  template <class Element>
  static __device__ __forceinline__ void load_once(const Element* from, Real_t<Element> (&to)[1]) {
    to[0] = to_real(load_streaming(from));
  }
  template <class Element>
  static __device__ __forceinline__ void store_once(const Real_t<Element> (&from)[1], Element* to) {
    store_streaming(to, from_real<Element>(from[0]));
  }
};

template <>
struct Access<4> {
  template <class Element>
  static __device__ __forceinline__ void load(const Element* from, float (&to)[4]) {
    Packed<4, Element> packed;
    packed.load(from);
    packed.unpack(to);
  }
  static __device__ __forceinline__ void store(const float (&from)[4], float* to) {
#if defined(__CUDA_ARCH__)  // the compiler splits some of these stores
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]),
                 "f"(from[3])
                 : "memory");
#else
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
#endif
  }
  template <class Element>  // Half or BFloat16
  static __device__ __forceinline__ void store(const float (&from)[4], Element* to) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack<Element>(from[0], from[1]), pack<Element>(from[2], from[3]));
  }
  template <class Element>
  static __device__ __forceinline__ void load_once(const Element* from, float (&to)[4]) {
    Packed<4, Element> packed;
    packed.load_once(from);
    packed.unpack(to);
  }
  static __device__ __forceinline__ void store_once(const float (&from)[4], float* to) {
    store_streaming(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
  }
  template <class Element>  // Half or BFloat16
  static __device__ __forceinline__ void store_once(const float (&from)[4], Element* to) {
    store_streaming(reinterpret_cast<uint2*>(to),
                    make_uint2(pack<Element>(from[0], from[1]), pack<Element>(from[2], from[3])));
  }
};

// Sets the values of a thread's neurons to one value.
template <int kLanes, class Real>
__device__ __forceinline__ void fill(Real (&values)[kLanes], Real value) {
#pragma unroll
  for (int j = 0; j < kLanes; ++j) values[j] = value;
}
// Copies the values of a thread's neurons.
template <int kLanes, class Real>
__device__ __forceinline__ void copy(const Real (&from)[kLanes], Real (&to)[kLanes]) {
#pragma unroll
  for (int j = 0; j < kLanes; ++j) to[j] = from[j];
}

// Makes the compiler treat a value as unknown. Otherwise the compiler might compute expressions of the value ahead,
// which would occupy registers, or compute the value again where it is used. Emits no instruction.
__device__ __forceinline__ void hide_from_compiler(int64& element) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(element));
#endif
}
__device__ __forceinline__ void hide_from_compiler(uint32& bits) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(bits));
#endif
}
template <class Element>
__device__ __forceinline__ void hide_from_compiler(Element*& pointer) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(pointer));
#endif
}

// Returns the pointer, and tells the compiler that it points to global memory. After hide_from_compiler, the compiler
// no longer knows this.
template <class Element>
__device__ __forceinline__ Element* assume_global(Element* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Moves an index or pointer by `stride` elements, to another step, and hides the result from the compiler if kHide is
// true. In a loop, the compiler would otherwise compute the addresses of all steps beforehand, which takes too many
// registers, or compute each address by a multiplication.
template <bool kHide = true, class ElementOrPointer>
__device__ __forceinline__ void advance(ElementOrPointer& at, int64 stride) {
  at += stride;
  if (kHide) hide_from_compiler(at);
}

// The neurons n, n + 1, ... of a thread. A thread beyond the last neuron is not live. It returns at once, unless other
// threads need it in shuffles or barriers. It then computes neuron 0, and discards the result.
template <int kLanes>
struct ThreadIndex {
  int64 n;
  bool live;
  int64 read_n;   // n, or 0 beyond the last neuron
  int64 element;  // at step 0; the next step is `inner` elements further

  __device__ __forceinline__ explicit ThreadIndex(const SequenceShape& shape)
      : n((static_cast<int64>(blockIdx.x) * kBlockThreads + threadIdx.x) * kLanes),
        live(n < shape.neurons()),
        read_n(live ? n : 0),
        element(shape.outer == 1 ? read_n : shape.offset(read_n, 0)) {}
};

// Loads the potentials before the first step.
template <int kLanes, class Scalar>
__device__ __forceinline__ void load_v_init(const LIFParams<Scalar>& params, const ThreadIndex<kLanes>& index,
                                            Real_t<Scalar> (&v)[kLanes]) {
  if (params.v_init != nullptr) {
    Access<kLanes>::load(params.v_init + index.read_n, v);
  } else {
    fill(v, params.options.v_rest);
  }
}

// Loads the potentials before step `start`, the first of a segment, from the checkpoints or v_init.
template <int kLanes, class Scalar>
__device__ __forceinline__ void load_v_before(const BackwardParams<Scalar>& params, int64 start,
                                              const ThreadIndex<kLanes>& index, Real_t<Scalar> (&v)[kLanes]) {
  if (start > 0) {
    const int64 at = (start / kCheckpointSteps - 1) * params.shape.neurons() + index.read_n;
    Access<kLanes>::load(params.checkpoints + at, v);
  } else {
    load_v_init(params, index, v);
  }
}

}  // namespace asgl
