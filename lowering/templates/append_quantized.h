// The function that a generated kernel calls to write rows into a cache of bytes: the library's own quantisation.
#pragma once

#define FLASHMLA_ISA generated

#include "flashmla/write_row.h"

namespace flashmla::FLASHMLA_ISA {

// rows: [n, h_kv, elements] of T, with strides in elements; cache: [n_pages, page_size, h_kv, bytes]. `live` has a slot
// for each row, none of them twice; rows with a negative one are skipped.
template <class Format, class T>
void append_quantized(const T* rows, int64_t n, int64_t h_kv, int64_t row_stride, int64_t row_head_stride,
                      int64_t element_stride, uint8_t* cache, int64_t page_size, int64_t page_stride,
                      int64_t token_stride, int64_t head_stride, const int64_t* live) {
#pragma omp parallel for if (n * h_kv >= kSerialRows)
  for (int64_t i = 0; i < n; i++) {
    if (live[i] < 0) continue;
    uint8_t* page = cache + live[i] / page_size * page_stride;
    for (int64_t head = 0; head < h_kv; head++) {
      write_row<Format>(rows + i * row_stride + head * row_head_stride, element_stride, page + head * head_stride,
                        live[i] % page_size, page_size, token_stride);
    }
  }
}

}  // namespace flashmla::FLASHMLA_ISA
