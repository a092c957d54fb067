// The codec of rows of format fp4_v41, which flashmla_ops/formats/fp4_v41.py defines.
#pragma once

#include <cmath>

#include "flashmla/formats.h"
#include "flashmla/formats/e4m3.h"

namespace flashmla::FLASHMLA_ISA {

struct Fp4V41 : Fp4V41Layout {
  // row: `elements` elements, `stride` apart.
  template <class T>
  static void quantize(const T* row, int64_t stride, uint8_t* out) {
    for (int64_t g = 0; g < groups; g++) {
      float x[group], largest = 0;
      bool finite = true;
      for (int64_t i = 0; i < group; i++) {
        x[i] = to_float(row[(g * group + i) * stride]);
        finite &= std::fabs(x[i]) < INFINITY;
        largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
      }
      const uint8_t code = finite ? scale_code(largest / 6) : 0x7f;
      const float scale = from_e4m3(code, 1);
      out[scales_at + g] = code;
      uint8_t* codes = out + g * group / 2;
      for (int64_t i = 0; i < group; i += 2) {
        codes[i / 2] = finite ? uint8_t(to_e2m1(x[i] / scale) | to_e2m1(x[i + 1] / scale) << 4) : 0;
      }
    }
  }

  template <class E>
  static void decode(const uint8_t* row, E* out) {
    float scales[groups];
    decode_e4m3<groups>(row + scales_at, 1, scales);
    for (int64_t g = 0; g < groups; g++) {
      const uint8_t* codes = row + g * group / 2;
      const float scale = scales[g];
#ifdef FLASHMLA_WORDS
      if constexpr (std::is_same_v<E, bf16>) {
        nibbles_to_bf16<group>(codes, kNumbers, scale, out + g * group);
        continue;
      }
#endif
      for (int64_t i = 0; i < group / 2; i++) {
        from_float(kNumbers[codes[i] & 15] * scale, out[g * group + 2 * i]);
        from_float(kNumbers[codes[i] >> 4] * scale, out[g * group + 2 * i + 1]);
      }
    }
  }

private:
  // The smallest positive e4m3 number that is no less than x, or else the largest.
  static uint8_t scale_code(float x) {
    if (x >= 448) return 0x7e;
    const uint8_t nearest = to_e4m3(x);
    return uint8_t(nearest + (nearest == 0 || from_e4m3(nearest, 1) < x));
  }
  // 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives: the nearest, ties to the even code.
  static uint32_t to_e2m1(float x) {
    const float m = std::fabs(x);
    const uint32_t code =
        (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) + (m >= 3.5f) + uint32_t(m > 5);
    return code | (bits_of(x) >> 28 & 8u);
  }
  static constexpr float kNumbers[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
};

}  // namespace flashmla::FLASHMLA_ISA
