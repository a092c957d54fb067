// The narrow element types, as storage, and their conversions one at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "flashmla/interface.h"

namespace flashmla::FLASHMLA_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct i8 {
  int8_t value;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(i8 x) { return x.value; }
inline float to_float(bf16 x) { return float_of(uint32_t{x.bits} << 16); }
inline float to_float(f16 x) {
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13, sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0xffu << 23 : 0;
  return float_of(bits_of(float_of(magnitude) * 0x1p112f) | special | sign);
}

inline f16 to_f16(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Below the smallest normal: adding 0.5 leaves the subnormal's bits, rounded to even, at the end of the mantissa.
    return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)))};
  }
  const uint32_t rebased = magnitude - (112u << 23);
  return {uint16_t(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13))};
}

inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, f16& y) { y = to_f16(x); }
inline void from_float(float x, bf16& y) {
  const uint32_t bits = bits_of(x);
  y.bits = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t((bits >> 16) | 0x40u);
}

// Calls f with an object of the element type; what it holds is not used.
template <class F>
inline auto with_element(FlashmlaDType dtype, F f) {
  switch (dtype) {
    case FLASHMLA_F32:
      return f(float{});
    case FLASHMLA_BF16:
      return f(bf16{});
    default:
      return f(f16{});
  }
}

}  // namespace flashmla::FLASHMLA_ISA
