// Writing a quantised row where it belongs in its page.
#pragma once

#include <cstring>

#include "flashmla/format_codecs.h"

namespace flashmla::FLASHMLA_ISA {

constexpr int64_t kSerialRows = 64;  // they are quantised in less time than waking a thread takes

// A row of elements, `stride` apart, as token `token` of a page whose rows are `token_bytes` apart. What a format keeps
// apart from its rows follows all of them.
template <class Format, class T>
void write_row(const T* row, int64_t stride, uint8_t* page, int64_t token, int64_t page_size, int64_t token_bytes) {
  if constexpr (Format::tail == 0) {
    Format::quantize(row, stride, page + token * token_bytes);
  } else {
    constexpr int64_t head = Format::bytes - Format::tail;
    uint8_t made[Format::bytes];
    Format::quantize(row, stride, made);
    std::memcpy(page + token * head, made, head);
    std::memcpy(page + page_size * head + token * Format::tail, made + head, Format::tail);
  }
}

}  // namespace flashmla::FLASHMLA_ISA
