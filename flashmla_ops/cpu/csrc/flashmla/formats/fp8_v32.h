// The codec of rows of format fp8_v32, which flashmla_ops/formats/fp8_v32.py defines.
#pragma once

#include <cstring>

#include "flashmla/formats.h"
#include "flashmla/formats/e4m3.h"
#include "flashmla/formats/rotary.h"

namespace flashmla::FLASHMLA_ISA {

struct Fp8V32 : Fp8V32Layout {
  // row: `elements` elements, `stride` apart.
  template <class T>
  static void quantize(const T* row, int64_t stride, uint8_t* out) {
    for (int64_t g = 0; g < groups; g++) {
      const uint32_t exponent = quantize_e4m3<group, least_exponent>(row + g * group * stride, stride, out + g * group);
      const float scale = float_of(exponent << 23);
      std::memcpy(out + scales_at + 4 * g, &scale, 4);
    }
    quantize_rotary<rope>(row + values * stride, stride, out + rope_at);
  }

  template <class E>
  static void decode(const uint8_t* row, E* out) {
    for (int64_t g = 0; g < groups; g++) {
      float scale;
      std::memcpy(&scale, row + scales_at + 4 * g, 4);
      decode_e4m3<group>(row + g * group, scale, out + g * group);
    }
    decode_rotary<rope>(row + rope_at, out + values);
  }
};

}  // namespace flashmla::FLASHMLA_ISA
