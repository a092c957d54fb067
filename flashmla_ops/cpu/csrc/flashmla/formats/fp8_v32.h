// The codec of rows of format fp8_v32, which flashmla_ops/formats/fp8_v32.py defines.
#pragma once

#include <cmath>
#include <cstring>

#include "flashmla/dtypes.h"
#include "flashmla/formats.h"
#include "flashmla/formats/rotary.h"

namespace flashmla::FLASHMLA_ISA {

struct Fp8V32 : Fp8V32Layout {
  // row: `elements` elements, `stride` apart. An element that is not finite becomes NaN, and no scale depends on it.
  template <class T>
  static void quantize(const T* row, int64_t stride, uint8_t* out) {
    for (int64_t g = 0; g < groups; g++) {
      float x[group], largest = 0;
      for (int64_t i = 0; i < group; i++) {
        x[i] = to_float(row[(g * group + i) * stride]);
        const float magnitude = std::fabs(x[i]);
        largest = magnitude > largest && magnitude < INFINITY ? magnitude : largest;
      }
      const uint32_t exponent = scale_exponent(largest);
      const float scale = float_of(exponent << 23), inverse = float_of((254u - exponent) << 23);
      std::memcpy(out + scales_at + 4 * g, &scale, 4);
      for (int64_t i = 0; i < group; i++) out[g * group + i] = to_e4m3(x[i] * inverse);
    }
    quantize_rotary<rope>(row + values * stride, stride, out + rope_at);
  }

  // E: float, or bf16, which holds every e4m3 number times a power of two exactly; other scales make it round.
  template <class E>
  static void decode(const uint8_t* row, E* out) {
    for (int64_t g = 0; g < groups; g++) {
      float scale;
      std::memcpy(&scale, row + scales_at + 4 * g, 4);
      decode_group(row + g * group, scale, out + g * group);
    }
    decode_rotary<rope>(row + rope_at, out + values);
  }

private:
  // The bits of the e4m3 number that is nearest to x, ties to even. |x| is at most 448, or no number.
  static uint8_t to_e4m3(float x) {
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
  static uint32_t scale_exponent(float largest) {
    const uint32_t exponent = (bits_of(largest) + 0x1fffffu) >> 23;  // one more where the mantissa is above 1.75
    constexpr uint32_t least = uint32_t(127 + least_exponent);
    return exponent < least + 8u ? least : exponent - 8u;
  }

  // An integer below 2^7 beside 2^23 in a float's mantissa is exact, subnormal e4m3 numbers included: no float that is
  // subnormal takes part, which some processors are told to flush. The loop is one that compilers vectorise.
  template <class E>
  static void decode_group(const uint8_t* codes, float scale, E* out) {
    for (int64_t i = 0; i < group; i++) {
      const uint32_t code = codes[i], magnitude = code & 0x7fu, mantissa = magnitude & 7u, exponent = magnitude >> 3;
      // Normal: (8 + mantissa) 2^(exponent - 10); subnormal: mantissa 2^-9.
      const float integer = float_of(0x4b000000u | mantissa | (exponent ? 8u : 0u)) - 0x1p23f;
      const float power = float_of((117u + (exponent ? exponent : 1u)) << 23);
      const float x = magnitude == 0x7fu ? NAN : integer * (power * scale);
      from_float(float_of(bits_of(x) | (code & 0x80u) << 24), out[i]);
    }
  }
};

}  // namespace flashmla::FLASHMLA_ISA
