// From the arguments of an operator over sequences that lie one after another to the call of the C interface.
#pragma once

#include <cmath>

#include "flashmla/contracts.h"
#include "flashmla/torch_bounds.h"

namespace flashmla {

// The call, but for its results and its levels.
template <class Arguments>
FlashmlaPrefill prefill_call(const Arguments& a, const Boundaries& bounds_q, const Boundaries& bounds_k) {
  FlashmlaPrefill call{};
  call.dtype = dtype_of(a.q), call.causal = a.causal;
  call.b = a.cu_seqlens_q.size(0) - 1, call.h_q = a.q.size(1), call.h_kv = a.k.size(1);
  call.d_qk = a.q.size(2), call.d_v = a.v.size(2), call.t_q = a.q.size(0), call.t_k = a.k.size(0);
  call.softmax_scale = float(a.softmax_scale ? *a.softmax_scale : 1 / std::sqrt(double(call.d_qk)));
  call.q = a.q.const_data_ptr(), call.k = a.k.const_data_ptr(), call.v = a.v.const_data_ptr();
  for (int i = 0; i < 3; i++) call.q_stride[i] = a.q.stride(i);
  for (int i = 0; i < 2; i++) call.k_stride[i] = a.k.stride(i), call.v_stride[i] = a.v.stride(i);
  call.cu_seqlens_q = bounds_q.data, call.cu_seqlens_q_stride = bounds_q.stride;
  call.cu_seqlens_k = bounds_k.data, call.cu_seqlens_k_stride = bounds_k.stride;
  call.softcap = float(a.softcap), call.window = a.window;
  if (a.attn_sink) {
    call.attn_sink = a.attn_sink->template const_data_ptr<float>(), call.attn_sink_stride = a.attn_sink->stride(0);
  }
  return call;
}

}  // namespace flashmla
