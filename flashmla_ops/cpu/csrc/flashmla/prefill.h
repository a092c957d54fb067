// Sequences that lie one after another: where each begins, and what it is for the kernels of attention, which know a
// decode call. Its cache is a single page: V holds the values, K the keys.
#pragma once

#include <algorithm>
#include <cstdio>

#include "flashmla/kernels.h"

namespace flashmla {

inline int64_t bound(const int32_t* bounds, int64_t stride, int64_t i) { return bounds[i * stride]; }

inline int64_t length_of(const FlashmlaPrefill& call, int64_t i) {
  const int64_t stride = call.cu_seqlens_k_stride;
  return bound(call.cu_seqlens_k, stride, i + 1) - bound(call.cu_seqlens_k, stride, i);
}

// The call that is sequence i, with the results that `call` has.
inline FlashmlaDecode sequence_of(const FlashmlaPrefill& call, int64_t i) {
  static constexpr int32_t kFirstPage = 0;
  const int64_t q_begin = bound(call.cu_seqlens_q, call.cu_seqlens_q_stride, i);
  const int64_t k_begin = bound(call.cu_seqlens_k, call.cu_seqlens_k_stride, i);
  const int64_t size = call.dtype == FLASHMLA_F32 ? 4 : 2;
  FlashmlaDecode one{};
  one.dtype = call.dtype, one.causal = call.causal, one.softmax_scale = call.softmax_scale;
  one.levels = call.levels;
  one.b = 1, one.s_q = bound(call.cu_seqlens_q, call.cu_seqlens_q_stride, i + 1) - q_begin;
  one.h_q = call.h_q, one.h_kv = call.h_kv, one.d_qk = call.d_qk, one.d_v = one.qk_start = call.d_v;
  one.q = static_cast<const char*>(call.q) + q_begin * call.q_stride[0] * size;
  std::copy(call.q_stride, call.q_stride + 3, one.q_stride + 1);
  one.kv = {static_cast<const char*>(call.v) + k_begin * call.v_stride[0] * size, 0, call.v_stride[0], call.v_stride[1],
            call.d_v};
  one.k = {static_cast<const char*>(call.k) + k_begin * call.k_stride[0] * size, 0, call.k_stride[0], call.k_stride[1],
           call.d_qk};
  one.n_pages = one.max_pages = 1, one.page_size = std::max<int64_t>(length_of(call, i), 1);
  one.block_table = &kFirstPage;
  if (call.out != nullptr) {
    one.out = static_cast<char*>(call.out) + q_begin * call.h_q * call.d_v * size;
    one.out_stride[1] = call.h_q * call.d_v, one.out_stride[2] = call.d_v;
    one.lse = call.lse + q_begin;
    one.lse_stride[1] = call.t_q, one.lse_stride[2] = 1;
  }
  return one;
}

// Tokens that the item's last row sees, of those of its sequence.
inline int64_t tokens_of(const FlashmlaDecode& one, const Item& item) {
  if (!one.causal) return item.length;
  const int64_t last = (item.row + item.rows - 1) / (one.h_q / one.h_kv);
  return std::clamp<int64_t>(item.length - one.s_q + last + 1, 0, item.length);
}

inline int check_bounds(const char* op, const char* name, const int32_t* bounds, int64_t stride, int64_t b,
                        int64_t tokens, char* message) {
  const char* form = "flashmla::%s: argument '%s': expected %s%lld at [%lld]%s, got %d";
  if (bounds[0] != 0) {
    std::snprintf(message, FLASHMLA_MESSAGE, form, op, name, "", 0LL, 0LL, "", bounds[0]);
    return 1;
  }
  for (int64_t i = 1; i <= b; i++) {
    if (bounds[i * stride] < bounds[(i - 1) * stride]) {
      std::snprintf(message, FLASHMLA_MESSAGE, form, op, name, "at least ", (long long)bounds[(i - 1) * stride],
                    (long long)i, "", bounds[i * stride]);
      return 1;
    }
  }
  if (bounds[b * stride] != tokens) {
    std::snprintf(message, FLASHMLA_MESSAGE, form, op, name, "", (long long)tokens, (long long)b,
                  ", the number of tokens", bounds[b * stride]);
    return 1;
  }
  return 0;
}
inline int check_bounds(const char* op, const FlashmlaPrefill& call, char* message) {
  return check_bounds(op, "cu_seqlens_q", call.cu_seqlens_q, call.cu_seqlens_q_stride, call.b, call.t_q, message) ||
         check_bounds(op, "cu_seqlens_k", call.cu_seqlens_k, call.cu_seqlens_k_stride, call.b, call.t_k, message);
}

}  // namespace flashmla
