// The codec of rows of format int4_g32, which flashmla_ops/formats/int4_g32.py defines.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "flashmla/dtypes.h"
#include "flashmla/formats.h"
#include "flashmla/formats/avx512.h"
#include "flashmla/formats/rotary.h"

namespace flashmla::FLASHMLA_ISA {

struct Int4G32 : Int4G32Layout {
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
      const float scale = !finite ? NAN : largest / 7 > 0x1p-126f ? largest / 7 : 0x1p-126f;
      std::memcpy(out + scales_at + 4 * g, &scale, 4);
      uint8_t* codes = out + g * group / 2;
      for (int64_t i = 0; i < group; i += 2) {
        codes[i / 2] = finite ? uint8_t(nibble(x[i] / scale) | nibble(x[i + 1] / scale) << 4) : 0;
      }
    }
    quantize_rotary<rope>(row + values * stride, stride, out + rope_at);
  }

  // E: float or bf16.
  template <class E>
  static void decode(const uint8_t* row, E* out) {
    for (int64_t g = 0; g < groups; g++) {
      float scale;
      std::memcpy(&scale, row + scales_at + 4 * g, 4);
      const uint8_t* codes = row + g * group / 2;
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
    decode_rotary<rope>(row + rope_at, out + values);
  }

private:
  static constexpr float kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
  static uint32_t nibble(float x) { return uint32_t(int32_t(std::nearbyint(x))) & 15u; }
};

}  // namespace flashmla::FLASHMLA_ISA
