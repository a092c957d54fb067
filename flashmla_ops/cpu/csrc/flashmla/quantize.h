// Rows of format fp8_v32, as flashmla_ops/layouts.py lays them out and flashmla_ops/reference/quantize.py defines them.
#pragma once

#include <cmath>
#include <cstring>

#include "flashmla/dtypes.h"

namespace flashmla::FLASHMLA_ISA {

struct Fp8V32 {
  static constexpr int64_t kValues = 512, kGroup = 128, kGroups = 4, kRope = 64;
  static constexpr int64_t kScalesAt = 512, kRopeAt = 528, kBytes = 656;
};
constexpr int64_t kSerialRows = 64;  // they are quantised in less time than waking a thread takes

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

// The exponent field of the smallest power of two s, of 2^-13 and more, with largest <= 448 s.
inline uint32_t scale_exponent(float largest) {
  const uint32_t exponent = (bits_of(largest) + 0x1fffffu) >> 23;  // one more where the mantissa is above 1.75
  return exponent < 122u ? 114u : exponent - 8u;
}

// row: 576 elements, `stride` apart. What is no finite number becomes NaN, and no scale depends on it.
template <class T>
void quantize_fp8_v32(const T* row, int64_t stride, uint8_t* out) {
  for (int64_t group = 0; group < Fp8V32::kGroups; group++) {
    float values[Fp8V32::kGroup], largest = 0;
    for (int64_t i = 0; i < Fp8V32::kGroup; i++) {
      values[i] = to_float(row[(group * Fp8V32::kGroup + i) * stride]);
      const float magnitude = std::fabs(values[i]);
      largest = magnitude > largest && magnitude < INFINITY ? magnitude : largest;
    }
    const uint32_t exponent = scale_exponent(largest);
    const float scale = float_of(exponent << 23), inverse = float_of((254u - exponent) << 23);
    std::memcpy(out + Fp8V32::kScalesAt + 4 * group, &scale, 4);
    for (int64_t i = 0; i < Fp8V32::kGroup; i++) out[group * Fp8V32::kGroup + i] = to_e4m3(values[i] * inverse);
  }
  for (int64_t i = 0; i < Fp8V32::kRope; i++) {
    const float x = to_float(row[(Fp8V32::kValues + i) * stride]);
    bf16 element;
    from_float(x, element);
    if (x != x) element.bits = 0x7fc0;  // one NaN for all
    std::memcpy(out + Fp8V32::kRopeAt + 2 * i, &element, 2);
  }
}

}  // namespace flashmla::FLASHMLA_ISA
