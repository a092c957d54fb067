// The codec of rows of format int8_g128, which flashmla_ops/formats/int8_g128.py defines.
#pragma once

#include <cmath>
#include <cstring>

#include "flashmla/dtypes.h"
#include "flashmla/formats.h"
#include "flashmla/formats/rotary.h"

namespace flashmla::FLASHMLA_ISA {

struct Int8G128 : Int8G128Layout {
  // row: `elements` elements, `stride` apart.
  template <class T>
  static void quantize(const T* row, int64_t stride, uint8_t* out) {
    for (int64_t g = 0; g < groups; g++) {
      float x[group], largest = 0;
      bool finite = true;
      for (int64_t i = 0; i < group; i++) {
        x[i] = to_float(row[(g * group + i) * stride]);
        const float magnitude = std::fabs(x[i]);
        finite &= magnitude < INFINITY;
        largest = magnitude > largest ? magnitude : largest;
      }
      const float scale = !finite ? NAN : largest / 127 > 0x1p-126f ? largest / 127 : 0x1p-126f;
      std::memcpy(out + scales_at + 4 * g, &scale, 4);
      for (int64_t i = 0; i < group; i++)
        out[g * group + i] = finite ? uint8_t(int8_t(std::nearbyint(x[i] / scale))) : 0;
    }
    quantize_rotary<rope>(row + values * stride, stride, out + rope_at);
  }

  // E: float or bf16.
  template <class E>
  static void decode(const uint8_t* row, E* out) {
    for (int64_t g = 0; g < groups; g++) {
      float scale;
      std::memcpy(&scale, row + scales_at + 4 * g, 4);
      for (int64_t i = g * group; i < (g + 1) * group; i++) from_float(float(int8_t(row[i])) * scale, out[i]);
    }
    decode_rotary<rope>(row + rope_at, out + values);
  }
};

}  // namespace flashmla::FLASHMLA_ISA
