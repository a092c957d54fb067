// The codec of rows of format fp8_model1, which flashmla_ops/formats/fp8_model1.py defines: of a row in one piece.
#pragma once

#include <cstring>

#include "flashmla/formats.h"
#include "flashmla/formats/e4m3.h"
#include "flashmla/formats/rotary.h"

namespace flashmla::FLASHMLA_ISA {

struct Fp8Model1 : Fp8Model1Layout {
  // row: `elements` elements, `stride` apart.
  template <class T>
  static void quantize(const T* row, int64_t stride, uint8_t* out) {
    std::memset(out + scales_at, 0, size_t(tail));
    for (int64_t g = 0; g < groups; g++) {
      const T* from = row + g * group * stride;
      out[scales_at + g] = uint8_t(quantize_e4m3<group, least_exponent>(from, stride, out + g * group));
    }
    quantize_rotary<rope>(row + values * stride, stride, out + rope_at);
  }

  template <class E>
  static void decode(const uint8_t* row, E* out) {
    for (int64_t g = 0; g < groups; g++) {
      decode_e4m3<group>(row + g * group, from_e8m0(row[scales_at + g]), out + g * group);
    }
    decode_rotary<rope>(row + rope_at, out + values);
  }
};

}  // namespace flashmla::FLASHMLA_ISA
