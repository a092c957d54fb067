// Sequences that lie one after another: where each begins, and what it is for the kernels of attention, which know a
// decode call. Its cache is a single page: V holds the values, K the keys.
#pragma once

#include <algorithm>

#include "flashmla/bounds.h"
#include "flashmla/kernels.h"

namespace flashmla {

inline Bounds bounds_q(const FlashmlaPrefill& call) { return {call.cu_seqlens_q, call.cu_seqlens_q_stride}; }
inline Bounds bounds_k(const FlashmlaPrefill& call) { return {call.cu_seqlens_k, call.cu_seqlens_k_stride}; }

inline int64_t length_of(const FlashmlaPrefill& call, int64_t i) { return bounds_k(call)[i + 1] - bounds_k(call)[i]; }

// The call that is sequence i, with the results that `call` has.
inline FlashmlaDecode sequence_of(const FlashmlaPrefill& call, int64_t i) {
  static constexpr int32_t kFirstPage = 0;
  const int64_t q_begin = bounds_q(call)[i], k_begin = bounds_k(call)[i];
  const int64_t size = call.dtype == FLASHMLA_F32 ? 4 : 2;
  FlashmlaDecode one{};
  one.op = "prefill", one.dtype = call.dtype, one.causal = call.causal, one.levels = call.levels;
  one.softmax_scale = call.softmax_scale, one.softcap = call.softcap, one.window = call.window;
  one.attn_sink = call.attn_sink, one.attn_sink_stride = call.attn_sink_stride;
  one.b = 1, one.s_q = bounds_q(call)[i + 1] - q_begin;
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

// Tokens that any of the item's rows sees, of those of its sequence.
inline Tokens tokens_of(const FlashmlaDecode& one, const Item& item) {
  const int64_t end = std::clamp<int64_t>(visible(one, item, item.row + item.rows - 1).end, 0, item.length);
  return {std::min(visible(one, item, item.row).begin, end), end};
}

inline int check_bounds(const char* op, const FlashmlaPrefill& call, char* message) {
  return bounds_q(call).check(op, "cu_seqlens_q", call.b, call.t_q, message) ||
         bounds_k(call).check(op, "cu_seqlens_k", call.b, call.t_k, message);
}

}  // namespace flashmla
