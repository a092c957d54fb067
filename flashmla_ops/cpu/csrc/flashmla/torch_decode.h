// From the arguments of an operator that decodes to the call of the C interface.
#pragma once

#include <cmath>

#include "flashmla/contracts.h"
#include "flashmla/torch_bounds.h"

namespace flashmla {

inline FlashmlaCache cache_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.size(3)};
}

// A cache with rows of a format by its number.
inline FlashmlaCache cache_of(const Tensor& tensor, int32_t row_format) {
  FlashmlaCache cache = cache_of(tensor);
  const RowFormat& format = kRowFormats[row_format];
  if (row_format) cache.d = format.elements;
  if (format.tail) cache.token_stride = format.bytes - format.tail;
  return cache;
}

// The call, but for its results, boundaries and levels and the format of its rows.
template <class Arguments>
FlashmlaDecode native_decode_call(const Arguments& a) {
  FlashmlaDecode call{};
  call.op = Arguments::kOp;
  call.dtype = dtype_of(a.q);
  call.causal = a.causal;
  call.b = a.cache_seqlens.size(0), (a.cu_seqlens_q ? call.t_q : call.s_q) = a.q.size(-3), call.h_q = a.q.size(-2),
  call.d_qk = a.q.size(-1);
  call.h_kv = a.kv_cache.size(2), call.d_v = a.d_v, call.qk_start = a.qk_start;
  call.softmax_scale = float(a.softmax_scale ? *a.softmax_scale : 1 / std::sqrt(double(call.d_qk)));
  call.softcap = float(a.softcap), call.window = a.window;
  call.q = a.q.const_data_ptr();
  for (int i = 1; i <= a.q.dim(); i++) call.q_stride[4 - i] = a.q.stride(-i);
  call.kv = cache_of(a.kv_cache);
  if (a.k_cache) call.k = cache_of(*a.k_cache);
  call.n_pages = a.kv_cache.size(0), call.page_size = a.kv_cache.size(1);
  call.block_table = static_cast<const int32_t*>(a.block_table.const_data_ptr());
  call.block_table_stride[0] = a.block_table.stride(0), call.block_table_stride[1] = a.block_table.stride(1);
  call.max_pages = a.block_table.size(1);
  call.cache_seqlens = static_cast<const int32_t*>(a.cache_seqlens.const_data_ptr());
  call.cache_seqlens_stride = a.cache_seqlens.stride(0);
  if (a.attn_sink) {
    call.attn_sink = static_cast<const float*>(a.attn_sink->const_data_ptr());
    call.attn_sink_stride = a.attn_sink->stride(0);
  }
  return call;
}

// The call, but for its out and lse.
template <class Arguments>
FlashmlaDecode decode_call(const Arguments& a) {
  FlashmlaDecode call = native_decode_call(a);
  call.levels = int32_t(a.levels), call.batch_invariant = a.batch_invariant;
  call.row_format = number_of_format(a.row_format);
  call.kv = cache_of(a.kv_cache, call.row_format);
  return call;
}

// Strides of b, s_q and h_q of an out; the first is 0 where sequences are ragged.
inline void set_strides(int64_t (&strides)[3], const Tensor& out) {
  for (int i = 2; i <= out.dim(); i++) strides[4 - i] = out.stride(-i);
}
inline void set_lse(FlashmlaDecode& call, const Tensor& lse) {
  call.lse = lse.mutable_data_ptr<float>();
  for (int i = 1; i <= lse.dim(); i++) call.lse_stride[3 - i] = lse.stride(-i);
}

// Sets the call's cu_seqlens_q, which lie in what this returns or in the argument.
template <class Arguments>
std::optional<Boundaries> set_boundaries(FlashmlaDecode& call, const Arguments& a) {
  if (!a.cu_seqlens_q) return std::nullopt;
  Boundaries bounds(Check{Arguments::kOp}, "cu_seqlens_q", *a.cu_seqlens_q);
  call.cu_seqlens_q = bounds.data, call.cu_seqlens_q_stride = bounds.stride;
  return bounds;
}

// A schedule as the C interface takes it. A strided one is not worth a path of its own.
struct ScheduleArgument {
  std::optional<Tensor> tensor;

  explicit ScheduleArgument(const std::optional<Tensor>& given) : tensor(given) {
    if (tensor && tensor->stride(0) != 1) tensor = torch::stable::contiguous(*tensor);
  }
  const int32_t* data() const { return tensor ? tensor->const_data_ptr<int32_t>() : nullptr; }
  int64_t numel() const { return tensor ? tensor->size(0) : 0; }
};

}  // namespace flashmla
