// The machine of a translated kernel: one thread, its registers and its memory. tools/ptx/to_cpp.py emits calls of
// these functions; run.cpp supplies the threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ptx {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f32 = float;
using f64 = double;
using pred = bool;

struct Range {
  u64 begin, end;

  bool holds(u64 address, u64 bytes) const { return begin <= address && address <= end && bytes <= end - address; }
};

// Shared addresses begin here, so that null is none of them.
constexpr u64 kSharedBegin = 1024;

enum class Shuffle { down, idx };

// `where` is the line and text of an instruction, unique to it.
class Machine {
 public:
  u32 tid_x, ctaid_x, ntid_x, nctaid_x;
  Range params;  // their addresses are the host's, as in global memory
  Range shared;  // a window of its own, as on a device
  char* shared_memory;
  const Range* buffers;  // all of global memory
  std::size_t buffer_count;
  int rcp_units, ex2_units;  // error of the approximations, in ulp
  bool traced;

  virtual void barrier(const char* where) const = 0;
  virtual u32 exchange(const char* where, Shuffle mode, u32 mask, u32 value, u32 source_lane) const = 0;
  virtual void trace(const char* where, bool stores, u64 address, u32 bytes) const = 0;
  [[noreturn]] virtual void fail(const char* where, const char* problem, u64 value) const = 0;

 protected:
  ~Machine() = default;
};

// ---- registers ----

// The pattern of uninitialised registers: NaN in every floating-point type, and an integer that is no valid size or
// address.
template <class T>
constexpr T kPoison = [] {
  struct {
    u8 bytes[sizeof(T)];
  } pattern{};
  for (std::size_t i = 0; i < sizeof(T); ++i) pattern.bytes[i] = i % 2 == 0 ? 0xFA : 0xFF;
  return __builtin_bit_cast(T, pattern);
}();

struct Predicate {
  u8 state = 2;  // not written
};

// A register as an operand: all bits, or the low ones, reinterpreted in the instruction's type.
template <class Register>
struct Bits {
  Register value;

  template <class T>
  operator T() const {
    static_assert(!std::is_same_v<T, bool>, "a predicate is wanted, and this is a number");
    if constexpr (sizeof(T) == sizeof(Register)) {
      return __builtin_bit_cast(T, value);
    } else {
      static_assert(sizeof(T) < sizeof(Register) && std::is_integral_v<T> && std::is_integral_v<Register>);
      return static_cast<T>(value);
    }
  }
};

// A literal, converted to a type that holds it, signed or unsigned.
template <long long kValue>
struct Integer {
  template <class T>
  operator T() const {
    constexpr int kBits = 8 * sizeof(T);
    static_assert(std::is_integral_v<T>, "a floating-point number is wanted");
    static_assert(kBits == 64 || kValue >> kBits % 64 == 0 || kValue >> (kBits - 1) == -1, "the integer is too large");
    return static_cast<T>(kValue);
  }
};

struct Condition {
  const Machine& m;
  const char* where;
  Predicate predicate;

  template <class T>
    requires std::is_same_v<T, bool>
  operator T() const {
    if (predicate.state > 1) m.fail(where, "reads a predicate that nobody wrote", predicate.state);
    return predicate.state == 1;
  }
};

// Extends to a wider register, with the sign of a signed type, else with zeros.
template <class Register, class T>
void write(Register& to, T value) {
  static_assert(!std::is_same_v<T, bool> && sizeof(T) <= sizeof(Register));
  if constexpr (sizeof(T) == sizeof(Register)) {
    to = __builtin_bit_cast(Register, value);
  } else {
    static_assert(std::is_integral_v<T> && std::is_integral_v<Register>);
    to = static_cast<Register>(value);
  }
}
inline void write(Predicate& to, bool value) { to.state = value; }

template <class Whole, class Part, class... Registers>
void unpack(Whole whole, Registers&... to) {
  static_assert(sizeof(Whole) == sizeof(Part) * sizeof...(to));
  unsigned i = 0;
  (write(to, static_cast<Part>(whole >> 8 * sizeof(Part) * i++)), ...);
}

template <class Whole, class Part, class... Operands>
Whole pack(Operands... parts) {
  static_assert(sizeof(Whole) == sizeof(Part) * sizeof...(parts));
  Whole whole = 0;
  unsigned i = 0;
  ((whole |= Whole(static_cast<Part>(parts)) << 8 * sizeof(Part) * i++), ...);
  return whole;
}

// ---- memory ----

enum class Space { param, shared, global, generic };

// Not inlined: every load and store calls this function.
template <Space kSpace>
[[gnu::noinline]] inline char* reach(const Machine& m, const char* where, bool stores, u64 address, u32 bytes) {
  if (address % bytes != 0) m.fail(where, "is misaligned", address);
  if constexpr (kSpace == Space::shared) {
    if (!m.shared.holds(address, bytes)) m.fail(where, "is out of shared memory", address);
    return m.shared_memory + (address - m.shared.begin);
  } else if constexpr (kSpace == Space::param) {
    if (!m.params.holds(address, bytes) || stores) m.fail(where, "is out of the parameters", address);
  } else {
    bool found = kSpace == Space::generic && !stores && m.params.holds(address, bytes);
    for (std::size_t i = 0; i < m.buffer_count && !found; ++i) found = m.buffers[i].holds(address, bytes);
    if (!found) m.fail(where, "is in none of the buffers", address);
    if (m.traced) m.trace(where, stores, address, bytes);
  }
  return reinterpret_cast<char*>(address);
}

template <Space kSpace, class T, class... Registers>
void load(const Machine& m, const char* where, u64 address, Registers&... to) {
  T values[sizeof...(to)];
  std::memcpy(values, reach<kSpace>(m, where, false, address, sizeof(values)), sizeof(values));
  const T* value = values;
  (write(to, *value++), ...);
}

template <Space kSpace, class T, class... Operands>
void store(const Machine& m, const char* where, u64 address, Operands... operands) {
  const T values[] = {static_cast<T>(operands)...};
  std::memcpy(reach<kSpace>(m, where, true, address, sizeof(values)), values, sizeof(values));
}

// ---- the threads of a warp ----

struct Shuffled {
  u32 value;
  bool found;  // the source is in the lane's segment
};

// `clamp_and_segments`, PTX's operand c: the clamp value in bits 0 to 4, the segment mask in bits 8 to 12.
template <Shuffle kMode>
Shuffled shuffle(const Machine& m, const char* where, u32 value, u32 distance_or_lane, u32 clamp_and_segments,
                 u32 mask) {
  const u32 lane = m.tid_x % 32, by = distance_or_lane & 31;
  const u32 clamp = clamp_and_segments & 31, segments = clamp_and_segments >> 8 & 31;
  const u32 last = (lane & segments) | (clamp & ~segments);
  const u32 source = kMode == Shuffle::down ? lane + by : (lane & segments) | (by & ~segments);
  const bool found = source <= last;
  return {m.exchange(where, kMode, mask, value, found ? source : lane), found};
}

}  // namespace ptx
