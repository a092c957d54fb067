// The rotary part that formats of bytes keep in bfloat16.
#pragma once

#include <cstring>

#include "flashmla/dtypes.h"

namespace flashmla::FLASHMLA_ISA {

// N elements, `stride` apart, to 2 N bytes.
template <int64_t N, class T>
void quantize_rotary(const T* from, int64_t stride, uint8_t* out) {
  for (int64_t i = 0; i < N; i++) {
    const float x = to_float(from[i * stride]);
    bf16 element;
    from_float(x, element);
    if (x != x) element.bits = 0x7fc0;  // one NaN for all
    std::memcpy(out + 2 * i, &element, 2);
  }
}

template <int64_t N, class E>
void decode_rotary(const uint8_t* from, E* out) {
  bf16 rotary[N];
  std::memcpy(rotary, from, sizeof rotary);
  for (int64_t i = 0; i < N; i++) from_float(to_float(rotary[i]), out[i]);
}

}  // namespace flashmla::FLASHMLA_ISA
