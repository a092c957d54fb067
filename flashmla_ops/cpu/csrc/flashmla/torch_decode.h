// What every operator that decodes takes from torch: its arguments, their checks with the words of
// flashmla_ops/ops/decode.py, and the call of the C interface that they make.
#pragma once

#include <cmath>

#include "flashmla/formats.h"
#include "flashmla/torch_checks.h"

namespace flashmla {

inline FlashmlaCache cache_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.size(3)};
}

// Of rows of a format by its number.
inline FlashmlaCache cache_of(const Tensor& tensor, int32_t row_format) {
  FlashmlaCache cache = cache_of(tensor);
  const RowFormat& format = kRowFormats[row_format];
  if (row_format) cache.d = format.elements;
  if (format.tail) cache.token_stride = format.bytes - format.tail;
  return cache;
}

struct DecodeArguments {
  const Tensor &q, &kv_cache;
  const std::optional<Tensor>& k_cache;
  const Tensor &block_table, &cache_seqlens;
  int64_t d_v, qk_start;
  const std::optional<double>& softmax_scale;
  bool causal;
  const std::optional<Tensor>& schedule;
  const std::string& row_format;
  const std::optional<Tensor>& attn_sink;
  int64_t levels;
};

// The number of a row format by its name; 0, native, if `names` lacks it.
inline int32_t number_of_format(const std::string& name) {
  for (int32_t i = 1; i < int32_t(std::size(kRowFormats)); i++) {
    if (name == kRowFormats[i].name) return i;
  }
  return 0;
}

// A cache [.., page_size, h_kv, bytes] of rows of bytes, whatever one-byte type its tensor has.
inline void check_bytes(const Check& check, const char* name, const Tensor& cache, const RowFormat& format) {
  const ScalarType type = cache.scalar_type();
  if (type != ScalarType::Byte && type != ScalarType::Float8_e4m3fn) {
    check.fail(name, "uint8 or float8_e4m3fn", name_of(type));
  }
  check.on_cpu(name, cache);
  check.contiguous_rows(name, cache);
  if (cache.size(-1) != format.bytes) check.fail(name, text("rows of ", format.bytes, " bytes"), text(cache.size(-1)));
  if (format.tail == 0) return;
  if (cache.size(-2) != 1) check.fail(name, text("1 KV head with rows of ", format.name), text(cache.size(-2)));
  if (cache.size(-3) > 1 && cache.stride(-3) != format.bytes) {
    check.fail(name, text("stride ", format.bytes, " between tokens: a page of ", format.name, " is one piece"),
               text("stride ", cache.stride(-3)));
  }
}

inline void check_levels(const Check& check, int64_t levels) {
  if (levels < 1 || levels > 3) check.fail("levels", "1, 2 or 3", text(levels));
}

// Raise on a bad argument of `op`, a decode.
inline void check_decode(const char* op, const DecodeArguments& a) {
  const Check check{op};
  check_levels(check, a.levels);
  if (a.levels < 3 && a.schedule) check.fail("schedule", "None below level 3, where no sequence is cut", "a tensor");
  const int32_t number = number_of_format(a.row_format);
  const RowFormat& format = kRowFormats[number];
  if (a.row_format != format.name) check.fail("row_format", text("one of ", kRowFormatNames), a.row_format);
  check.dims("q", a.q, 4, "[b, s_q, h_q, d_qk]");
  check.floating("q", a.q);
  const int64_t b = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2), d_qk = a.q.size(3);
  if (s_q < 1) check.fail("q", "at least 1 query token (s_q)", text(s_q));
  check.dims("kv_cache", a.kv_cache, 4, "[n_pages, page_size, h_kv, d]");
  if (number) {
    check_bytes(check, "kv_cache", a.kv_cache, format);
    if (a.k_cache) check.fail("k_cache", text("None with rows of ", format.name), "a tensor");
  } else {
    check.dtype("kv_cache", a.kv_cache, a.q.scalar_type());
    check.on_cpu("kv_cache", a.kv_cache);
    check.contiguous_rows("kv_cache", a.kv_cache);
  }
  const int64_t page_size = a.kv_cache.size(1), h_kv = a.kv_cache.size(2);
  const int64_t d = number ? format.elements : a.kv_cache.size(3);
  if (page_size < 1) check.fail("kv_cache", "page_size of at least 1", text(page_size));
  if (h_kv < 1) check.fail("kv_cache", "at least 1 KV head (h_kv)", text(h_kv));
  if (h_q % h_kv != 0) check.fail("q", text("query heads in multiples of the ", h_kv, " KV heads"), text(h_q));
  if (a.d_v < 1 || a.d_v > d) check.fail("d_v", text("a value in [1, ", d, "]"), text(a.d_v));
  if (a.qk_start < 0 || a.qk_start > d) check.fail("qk_start", text("a value in [0, ", d, "]"), text(a.qk_start));
  int64_t d_k = 0;
  if (a.k_cache) {
    check.dims("k_cache", *a.k_cache, 4, "[n_pages, page_size, h_kv, d_k]");
    check.dtype("k_cache", *a.k_cache, a.q.scalar_type());
    check.on_cpu("k_cache", *a.k_cache);
    check.contiguous_rows("k_cache", *a.k_cache);
    check.same_pages(a.kv_cache, *a.k_cache, 3);
    d_k = a.k_cache->size(3);
  }
  const int64_t d_key = d - a.qk_start + d_k;
  if (d_qk != d_key || d_qk < 1) check.fail("q", text("d_qk ", d_key, ", the length of a key"), text(d_qk));
  check.dims("block_table", a.block_table, 2, "[b, max_pages]");
  check.dtype("block_table", a.block_table, ScalarType::Int);
  check.on_cpu("block_table", a.block_table);
  check.size("block_table", a.block_table, 0, b, " sequences, as q");
  check.dims("cache_seqlens", a.cache_seqlens, 1, "[b]");
  check.dtype("cache_seqlens", a.cache_seqlens, ScalarType::Int);
  check.on_cpu("cache_seqlens", a.cache_seqlens);
  check.size("cache_seqlens", a.cache_seqlens, 0, b, " sequences, as q");
  if (a.attn_sink) {
    check.dims("attn_sink", *a.attn_sink, 1, "[h_q]");
    check.dtype("attn_sink", *a.attn_sink, ScalarType::Float);
    check.on_cpu("attn_sink", *a.attn_sink);
    check.size("attn_sink", *a.attn_sink, 0, h_q, " heads, as q");
  }
  if (a.schedule) {
    check.dims("schedule", *a.schedule, 1, "[n]");
    check.dtype("schedule", *a.schedule, ScalarType::Int);
    check.on_cpu("schedule", *a.schedule);
    const int64_t smallest = flashmla_schedule_numel(b, 1);
    if (a.schedule->size(0) < smallest) {
      check.fail("schedule", text("at least ", smallest, " elements"), text(a.schedule->size(0)));
    }
  }
}

// The call, but for its out and lse.
inline FlashmlaDecode decode_call(const DecodeArguments& a) {
  FlashmlaDecode call{};
  call.dtype = dtype_of(a.q);
  call.causal = a.causal, call.levels = int32_t(a.levels);
  call.b = a.q.size(0), call.s_q = a.q.size(1), call.h_q = a.q.size(2), call.d_qk = a.q.size(3);
  call.h_kv = a.kv_cache.size(2), call.d_v = a.d_v, call.qk_start = a.qk_start;
  call.softmax_scale = float(a.softmax_scale ? *a.softmax_scale : 1 / std::sqrt(double(call.d_qk)));
  call.q = a.q.const_data_ptr();
  for (int i = 0; i < 4; i++) call.q_stride[i] = a.q.stride(i);
  call.row_format = number_of_format(a.row_format);
  call.kv = cache_of(a.kv_cache, call.row_format);
  if (a.k_cache) call.k = cache_of(*a.k_cache);
  call.n_pages = a.kv_cache.size(0), call.page_size = a.kv_cache.size(1);
  call.block_table = a.block_table.const_data_ptr<int32_t>();
  call.block_table_stride[0] = a.block_table.stride(0), call.block_table_stride[1] = a.block_table.stride(1);
  call.max_pages = a.block_table.size(1);
  call.cache_seqlens = a.cache_seqlens.const_data_ptr<int32_t>();
  call.cache_seqlens_stride = a.cache_seqlens.stride(0);
  if (a.attn_sink) {
    call.attn_sink = a.attn_sink->const_data_ptr<float>();
    call.attn_sink_stride = a.attn_sink->stride(0);
  }
  return call;
}

inline void set_lse(FlashmlaDecode& call, const Tensor& lse) {
  call.lse = lse.mutable_data_ptr<float>();
  for (int i = 0; i < 3; i++) call.lse_stride[i] = lse.stride(i);
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
