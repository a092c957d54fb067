// Which rows of a source a query token attends to.
#pragma once

#include <algorithm>

#include "flashmla/failure.h"

namespace flashmla {

// Those of a query token's indices that are slots, in their order: how many.
inline int64_t find_slots(const FlashmlaSource& source, int64_t sequence, int64_t token, int64_t head, int32_t* slots) {
  const int64_t limit = source.n_pages * source.page_size;
  const int32_t* indices = source.indices + sequence * source.indices_stride[0] + token * source.indices_stride[1] +
                           head * source.indices_stride[2];
  int64_t length = source.topk, n = 0;
  if (source.topk_length != nullptr) {
    // Checked before, but the tensor may be written to meanwhile.
    const int64_t at = sequence * source.topk_length_stride[0] + token * source.topk_length_stride[1];
    length = std::clamp<int64_t>(source.topk_length[at], 0, source.topk);
  }
  for (int64_t i = 0; i < length; i++) {
    const int32_t slot = indices[i * source.indices_stride[3]];
    slots[n] = slot;  // kept if it is one
    n += slot >= 0 && slot < limit;
  }
  return n;
}

inline int check_topk_length(const FlashmlaSparse& call, int32_t index, char* message) {
  const FlashmlaSource& source = call.sources[index];
  if (source.topk_length == nullptr) return 0;
  const int64_t tokens = source.topk_length_stride[1] ? call.attention.s_q : 1;
  const int64_t sequences = source.topk_length_stride[0] ? call.attention.b : 1;
  for (int64_t i = 0; i < sequences * tokens; i++) {
    const int32_t length =
        source.topk_length[i / tokens * source.topk_length_stride[0] + i % tokens * source.topk_length_stride[1]];
    if (length >= 0 && length <= source.topk) continue;
    char expected[128], actual[128];
    return fail(message, call.attention.op, index ? "extra_topk_length" : "topk_length",
                text(expected, "lengths in [0, %lld]", (long long)source.topk),
                text(actual, "%d at [%lld]", length, (long long)i));
  }
  return 0;
}

}  // namespace flashmla
