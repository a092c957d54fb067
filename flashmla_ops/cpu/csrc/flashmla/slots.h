// Slots of a paged cache that rows are written to.
#pragma once

#include <cstdio>

#include "flashmla/interface.h"

namespace flashmla {

// 0, or 1 with the first slot past the end of the cache in message[FLASHMLA_MESSAGE]. Negative ones are skipped later.
inline int check_slots(const FlashmlaAppend& tensor, const int64_t* slots, int64_t stride, int64_t n, char* message) {
  const int64_t limit = tensor.n_pages * tensor.page_size;
  for (int64_t i = 0; i < n; i++) {
    if (slots[i * stride] < limit) continue;
    std::snprintf(message, FLASHMLA_MESSAGE,
                  "flashmla::append_: argument 'slot_mapping': expected slots below %lld, got %lld at [%lld]",
                  (long long)limit, (long long)slots[i * stride], (long long)i);
    return 1;
  }
  return 0;
}

// The row of the first KV head.
inline char* row_at(const FlashmlaAppend& t, int64_t slot) {
  return t.cache + slot / t.page_size * t.page_bytes + slot % t.page_size * t.token_bytes;
}

}  // namespace flashmla
