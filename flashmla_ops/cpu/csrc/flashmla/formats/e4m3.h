// Numbers of type e4m3 (one sign, four exponent and three mantissa bits; no infinities) and scales that are powers of
// two, which the formats fp8_* share.
#pragma once

#include <cmath>
#include <type_traits>

#include "flashmla/dtypes.h"
#include "flashmla/formats/avx512.h"

namespace flashmla::FLASHMLA_ISA {

// The bits of the e4m3 number that is nearest to x, ties to even. |x| is at most 448, or no number.
inline uint8_t to_e4m3(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return uint8_t(sign | 0x7fu);
  if (magnitude < (121u << 23)) {
    // Below the smallest normal, 2^-6: adding 2^14 leaves multiples of 2^-9, rounded to even, at the mantissa's end.
    return uint8_t(sign | (bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f)));
  }
  const uint32_t rebased = magnitude - (120u << 23);
  return uint8_t(sign | ((rebased + 0x7ffffu + ((rebased >> 20) & 1u)) >> 20));
}

// The exponent field of the smallest power of two s, of 2^least_exponent and more, with largest <= 448 s.
template <int64_t least_exponent>
uint32_t scale_exponent(float largest) {
  const uint32_t exponent = (bits_of(largest) + 0x1fffffu) >> 23;  // one more where the mantissa is above 1.75
  constexpr uint32_t least = uint32_t(127 + least_exponent);
  return exponent < least + 8u ? least : exponent - 8u;
}

// N elements, `stride` apart, as codes; returns the exponent field of their scale. An element that is not finite
// becomes NaN, and the scale does not depend on it.
template <int64_t N, int64_t least_exponent, class T>
uint32_t quantize_e4m3(const T* from, int64_t stride, uint8_t* codes) {
  float x[N], largest = 0;
  for (int64_t i = 0; i < N; i++) {
    x[i] = to_float(from[i * stride]);
    const float magnitude = std::fabs(x[i]);
    largest = magnitude > largest && magnitude < INFINITY ? magnitude : largest;
  }
  const uint32_t exponent = scale_exponent<least_exponent>(largest);
  const float inverse = float_of((254u - exponent) << 23);
  for (int64_t i = 0; i < N; i++) codes[i] = to_e4m3(x[i] * inverse);
  return exponent;
}

// An integer below 2^7 beside 2^23 in a float's mantissa is exact, subnormal e4m3 numbers included: no float that is
// subnormal takes part, which some processors are told to flush.
inline float from_e4m3(uint32_t code, float scale) {
  const uint32_t magnitude = code & 0x7fu, mantissa = magnitude & 7u, exponent = magnitude >> 3;
  // Normal: (8 + mantissa) 2^(exponent - 10); subnormal: mantissa 2^-9.
  const float integer = float_of(0x4b000000u | mantissa | (exponent ? 8u : 0u)) - 0x1p23f;
  const float power = float_of((117u + (exponent ? exponent : 1u)) << 23);
  const float x = magnitude == 0x7fu ? NAN : integer * (power * scale);
  return float_of(bits_of(x) | (code & 0x80u) << 24);
}

// E: float, or bf16, which holds every e4m3 number times a power of two exactly; other scales make it round. The loop
// is one that compilers vectorise.
template <int64_t N, class E>
void decode_e4m3(const uint8_t* codes, float scale, E* out) {
#ifdef FLASHMLA_WORDS
  if constexpr (std::is_same_v<E, bf16>) {
    // Powers of two, as quantisation makes them, of which none makes a number subnormal or infinite.
    const uint32_t bits = bits_of(scale), exponent = bits >> 23;
    if ((bits & 0x7fffffu) == 0 && exponent >= 27 && exponent <= 227) {
      return e4m3_to_bf16<N>(codes, int(exponent) - 127, out);
    }
  }
#endif
  for (int64_t i = 0; i < N; i++) from_float(from_e4m3(codes[i], scale), out[i]);
}

// A scale of type e8m0: a float's exponent field, alone. 0 is 2^-127, and 255 no number.
inline float from_e8m0(uint8_t scale) {
  return scale == 0xff ? NAN : scale == 0 ? float_of(1u << 22) : float_of(uint32_t{scale} << 23);
}

}  // namespace flashmla::FLASHMLA_ISA
