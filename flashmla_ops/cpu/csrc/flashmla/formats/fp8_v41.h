// The codec of rows of format fp8_v41, which flashmla_ops/formats/fp8_v41.py defines.
#pragma once

#include "flashmla/formats.h"
#include "flashmla/formats/e4m3.h"

namespace flashmla::FLASHMLA_ISA {

struct Fp8V41 : Fp8V41Layout {
  // row: `elements` elements, `stride` apart.
  template <class T>
  static void quantize(const T* row, int64_t stride, uint8_t* out) {
    for (int64_t g = 0; g < groups; g++) {
      const T* from = row + g * group * stride;
      out[scales_at + g] = uint8_t(quantize_e4m3<group, least_exponent>(from, stride, out + g * group));
    }
  }

  template <class E>
  static void decode(const uint8_t* row, E* out) {
    for (int64_t g = 0; g < groups; g++) {
      decode_e4m3<group>(row + g * group, from_e8m0(row[scales_at + g]), out + g * group);
    }
  }
};

}  // namespace flashmla::FLASHMLA_ISA
