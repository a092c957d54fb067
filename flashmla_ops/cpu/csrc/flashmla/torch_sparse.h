// From the arguments of an operator over rows that indices name to the call of the C interface.
#pragma once

#include <cmath>

#include "flashmla/torch_decode.h"

namespace flashmla {

// The part of a call that queries [.., s_q, h_q, d_qk] decide.
template <class Arguments>
FlashmlaSparse sparse_call(const Arguments& a, int64_t h_kv, int64_t qk_start) {
  FlashmlaSparse call{};
  FlashmlaDecode& attention = call.attention;
  const Tensor& q = a.q;
  const int64_t dims = q.dim();
  attention.op = Arguments::kOp;
  attention.dtype = dtype_of(q);
  attention.b = dims == 4 ? q.size(0) : 1;
  attention.s_q = q.size(dims - 3), attention.h_q = q.size(dims - 2), attention.d_qk = q.size(dims - 1);
  attention.h_kv = h_kv, attention.d_v = a.d_v, attention.qk_start = qk_start;
  attention.softmax_scale = float(a.softmax_scale ? *a.softmax_scale : 1 / std::sqrt(double(attention.d_qk)));
  attention.q = q.const_data_ptr();
  for (int64_t i = 0; i < dims; i++) attention.q_stride[4 - dims + i] = q.stride(i);
  if (const Tensor* sink = given(a.attn_sink)) {
    attention.attn_sink = sink->const_data_ptr<float>(), attention.attn_sink_stride = sink->stride(0);
  }
  return call;
}

// The rows are one page of a cache.
inline FlashmlaSource beside(const Tensor& kv, const Tensor& indices, const Tensor* topk_length, int32_t number) {
  const RowFormat& format = kRowFormats[number];
  FlashmlaSource source{};
  source.kv = {kv.const_data_ptr(), 0, kv.stride(0), kv.stride(1), number ? format.elements : kv.size(2)};
  if (format.tail) source.kv.token_stride = format.bytes - format.tail;
  source.row_format = number, source.n_pages = 1, source.page_size = kv.size(0);
  source.indices = indices.const_data_ptr<int32_t>(), source.topk = indices.size(2);
  for (int i = 0; i < 3; i++) source.indices_stride[1 + i] = indices.stride(i);
  if (topk_length) {
    source.topk_length = topk_length->const_data_ptr<int32_t>();
    source.topk_length_stride[1] = topk_length->stride(0);
  }
  return source;
}

// A source of sparse_decode, whose indices are the same for all KV heads.
inline FlashmlaSource paged(const Tensor& kv_cache, const Tensor* k_cache, const Tensor& indices,
                            const Tensor* topk_length, int32_t number) {
  FlashmlaSource source{};
  source.kv = cache_of(kv_cache, number), source.row_format = number;
  if (k_cache) source.k = cache_of(*k_cache);
  source.n_pages = kv_cache.size(0), source.page_size = kv_cache.size(1);
  source.indices = indices.const_data_ptr<int32_t>(), source.topk = indices.size(2);
  source.indices_stride[0] = indices.stride(0), source.indices_stride[1] = indices.stride(1);
  source.indices_stride[3] = indices.stride(2);
  if (topk_length) {
    source.topk_length = topk_length->const_data_ptr<int32_t>();
    source.topk_length_stride[0] = topk_length->stride(0);
  }
  return source;
}

// The sources of sparse_decode and of its backward.
template <class Arguments>
void set_sources(FlashmlaSparse& call, const Arguments& a) {
  call.sources[call.n_sources++] =
      paged(a.kv_cache, given(a.k_cache), a.indices, given(a.topk_length), number_of_format(a.row_format));
  if (a.extra_kv_cache) {
    call.sources[call.n_sources++] = paged(*a.extra_kv_cache, nullptr, *a.extra_indices, given(a.extra_topk_length),
                                           number_of_format(a.extra_row_format));
  }
}

}  // namespace flashmla
