// Rows of bytes to elements, for every format: what rows.h only declares.
#pragma once

#include <cstring>

#include "flashmla/format_codecs.h"
#include "flashmla/formats.h"
#include "flashmla/rows.h"

namespace flashmla::FLASHMLA_ISA {

template <class Format, class E>
void decode_rows(const uint8_t* const* rows, const uint8_t* const* tails, int n, E* to) {
  for (int i = 0; i < n; i++, to += Format::elements) {
    if constexpr (Format::tail == 0) {
      Format::decode(rows[i], to);
    } else {
      uint8_t row[Format::bytes];
      std::memcpy(row, rows[i], Format::bytes - Format::tail);
      std::memcpy(row + Format::bytes - Format::tail, tails[i], Format::tail);
      Format::decode(row, to);
    }
  }
}

template <class E>
Decoder<E> decoder(int32_t row_format) {
  switch (row_format) {
#define FLASHMLA_CASE(number, Format) \
  case number:                        \
    return {Format::bytes, Format::tail, decode_rows<Format, E>};
    FLASHMLA_QUANTIZED_FORMATS(FLASHMLA_CASE)
#undef FLASHMLA_CASE
    default:
      return {};
  }
}

}  // namespace flashmla::FLASHMLA_ISA
