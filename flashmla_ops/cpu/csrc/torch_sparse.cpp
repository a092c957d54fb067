// flashmla::sparse_decode and flashmla::sparse_prefill on the CPU, through torch's stable ABI; checks as in
// flashmla_ops/ops/sparse.py.
#include <cmath>
#include <tuple>

#include "flashmla/torch_decode.h"

namespace {

using namespace flashmla;

int32_t check_format(const Check& check, const char* name, const std::string& row_format) {
  const int32_t number = number_of_format(row_format);
  if (row_format != kRowFormats[number].name) check.fail(name, text("one of ", kRowFormatNames), row_format);
  return number;
}

// What rows of a cache have.
struct Rows {
  int64_t h_kv, d, d_k;
};

// A cache of rows, [n_pages, page_size, h_kv, d].
Rows check_cache(const Check& check, const char* name, const Tensor& cache, const Tensor& q, int32_t number) {
  check.dims(name, cache, 4, "[n_pages, page_size, h_kv, d]");
  if (number) {
    check_bytes(check, name, cache, kRowFormats[number]);
  } else {
    check.dtype(name, cache, q.scalar_type());
    check.on_cpu(name, cache);
    check.contiguous_rows(name, cache);
  }
  if (cache.size(1) < 1) check.fail(name, "page_size of at least 1", text(cache.size(1)));
  return {cache.size(2), number ? kRowFormats[number].elements : cache.size(3), 0};
}

// Heads and widths of queries and rows. `name`: of the cache, for what both are asked for.
void check_rows(const Check& check, const char* name, const Tensor& q, const Rows& rows, int64_t d_v,
                int64_t qk_start) {
  const int64_t h_q = q.size(q.dim() - 2), d_qk = q.size(q.dim() - 1);
  if (rows.h_kv < 1) check.fail(name, "at least 1 KV head (h_kv)", text(rows.h_kv));
  if (h_q % rows.h_kv != 0)
    check.fail("q", text("query heads in multiples of the ", rows.h_kv, " KV heads"), text(h_q));
  if (d_v < 1 || d_v > rows.d) check.fail("d_v", text("a value in [1, ", rows.d, "]"), text(d_v));
  if (qk_start < 0 || qk_start > rows.d) check.fail("qk_start", text("a value in [0, ", rows.d, "]"), text(qk_start));
  const int64_t d_key = rows.d - qk_start + rows.d_k;
  if (d_qk != d_key || d_qk < 1) check.fail("q", text("d_qk ", d_key, ", the length of a key"), text(d_qk));
}

void check_lengths(const Check& check, const char* name, const Tensor& q, const Tensor* lengths, const char* shape,
                   const char* what) {
  if (lengths == nullptr) return;
  check.dims(name, *lengths, 1, shape);
  check.dtype(name, *lengths, ScalarType::Int);
  check.on_cpu(name, *lengths);
  check.size(name, *lengths, 0, q.size(0), what);
}

void check_sink(const Check& check, const Tensor& q, const Tensor* sink) {
  if (sink == nullptr) return;
  check.dims("attn_sink", *sink, 1, "[h_q]");
  check.dtype("attn_sink", *sink, ScalarType::Float);
  check.on_cpu("attn_sink", *sink);
  check.size("attn_sink", *sink, 0, q.size(q.dim() - 2), " heads, as q");
}

// Of sparse_decode.
void check_indices(const Check& check, const char* name, const char* lengths_name, const Tensor& q,
                   const Tensor& indices, const Tensor* topk_length) {
  check.dims(name, indices, 3, "[b, s_q, topk]");
  check.dtype(name, indices, ScalarType::Int);
  check.on_cpu(name, indices);
  check.size(name, indices, 0, q.size(0), " sequences, as q");
  check.size(name, indices, 1, q.size(1), " query tokens, as q");
  check_lengths(check, lengths_name, q, topk_length, "[b]", " sequences, as q");
}

// The part of a call that queries [.., s_q, h_q, d_qk] decide.
FlashmlaSparse call_of(const Tensor& q, int64_t h_kv, int64_t d_v, int64_t qk_start,
                       const std::optional<double>& softmax_scale, const Tensor* sink) {
  FlashmlaSparse call{};
  FlashmlaDecode& attention = call.attention;
  const int64_t dims = q.dim();
  attention.dtype = dtype_of(q);
  attention.b = dims == 4 ? q.size(0) : 1;
  attention.s_q = q.size(dims - 3), attention.h_q = q.size(dims - 2), attention.d_qk = q.size(dims - 1);
  attention.h_kv = h_kv, attention.d_v = d_v, attention.qk_start = qk_start;
  attention.softmax_scale = float(softmax_scale ? *softmax_scale : 1 / std::sqrt(double(attention.d_qk)));
  attention.q = q.const_data_ptr();
  for (int64_t i = 0; i < dims; i++) attention.q_stride[4 - dims + i] = q.stride(i);
  if (sink) attention.attn_sink = sink->const_data_ptr<float>(), attention.attn_sink_stride = sink->stride(0);
  return call;
}

void set_out(FlashmlaDecode& attention, const Tensor& out) {
  attention.out = out.mutable_data_ptr();
  for (int64_t i = 0, dims = out.dim(); i < dims - 1; i++) attention.out_stride[4 - dims + i] = out.stride(i);
}

// A source of sparse_decode, whose indices are the same for all KV heads.
FlashmlaSource paged(const Tensor& kv_cache, const Tensor* k_cache, const Tensor& indices, const Tensor* topk_length,
                     int32_t number) {
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

void run(const char* op, const FlashmlaSparse& call) {
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_sparse(op, &call, &threads, message), message);
}

std::tuple<Tensor, Tensor> sparse_decode(const Tensor& q, const Tensor& kv_cache, std::optional<Tensor> k_cache,
                                         const Tensor& indices, int64_t d_v, int64_t qk_start,
                                         std::optional<double> softmax_scale, std::string row_format,
                                         std::optional<Tensor> attn_sink, std::optional<Tensor> topk_length,
                                         std::optional<Tensor> extra_kv_cache, std::optional<Tensor> extra_indices,
                                         std::optional<Tensor> extra_topk_length, std::string extra_row_format,
                                         bool batch_invariant) {
  const Check check{"sparse_decode"};
  const int32_t number = check_format(check, "row_format", row_format);
  const int32_t extra_number = check_format(check, "extra_row_format", extra_row_format);
  check.dims("q", q, 4, "[b, s_q, h_q, d_qk]");
  check.floating("q", q);
  Rows rows = check_cache(check, "kv_cache", kv_cache, q, number);
  if (k_cache) {
    if (number) check.fail("k_cache", text("None with rows of ", row_format), "a tensor");
    rows.d_k = check_cache(check, "k_cache", *k_cache, q, 0).d;
    check.same_pages(kv_cache, *k_cache, 3);
  }
  check_rows(check, "kv_cache", q, rows, d_v, qk_start);
  check_indices(check, "indices", "topk_length", q, indices, given(topk_length));
  check_sink(check, q, given(attn_sink));
  if (!extra_kv_cache) {
    if (extra_indices) check.fail("extra_indices", "None without extra_kv_cache", "a tensor");
    if (extra_topk_length) check.fail("extra_topk_length", "None without extra_kv_cache", "a tensor");
  } else {
    const Rows extra = check_cache(check, "extra_kv_cache", *extra_kv_cache, q, extra_number);
    if (extra.h_kv != rows.h_kv) {
      check.fail("extra_kv_cache", text(rows.h_kv, " KV heads, as kv_cache"), text(extra.h_kv));
    }
    check_rows(check, "extra_kv_cache", q, extra, d_v, qk_start);
    if (!extra_indices) check.fail("extra_indices", "a tensor with extra_kv_cache", "None");
    check_indices(check, "extra_indices", "extra_topk_length", q, *extra_indices, given(extra_topk_length));
  }

  const Tensor out = new_tensor({q.size(0), q.size(1), q.size(2), d_v}, q.scalar_type());
  const Tensor lse = new_tensor({q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  FlashmlaSparse call = call_of(q, rows.h_kv, d_v, qk_start, softmax_scale, given(attn_sink));
  call.batch_invariant = batch_invariant;
  call.sources[call.n_sources++] = paged(kv_cache, given(k_cache), indices, given(topk_length), number);
  if (extra_kv_cache) {
    call.sources[call.n_sources++] =
        paged(*extra_kv_cache, nullptr, *extra_indices, given(extra_topk_length), extra_number);
  }
  set_out(call.attention, out);
  set_lse(call.attention, lse);
  run(check.op, call);
  return {out, lse};
}

// The rows are one page of a cache.
FlashmlaSource beside(const Tensor& kv, const Tensor& indices, const Tensor* topk_length, int32_t number) {
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

std::tuple<Tensor, Tensor, Tensor> sparse_prefill(const Tensor& q, const Tensor& kv, const Tensor& indices, int64_t d_v,
                                                  std::optional<double> softmax_scale, std::string row_format,
                                                  std::optional<Tensor> attn_sink, std::optional<Tensor> topk_length) {
  const Check check{"sparse_prefill"};
  const int32_t number = check_format(check, "row_format", row_format);
  check.dims("q", q, 3, "[s_q, h_q, d_qk]");
  check.floating("q", q);
  check.dims("kv", kv, 3, "[s_kv, h_kv, d]");
  if (number) {
    check_bytes(check, "kv", kv, kRowFormats[number]);
  } else {
    check.dtype("kv", kv, q.scalar_type());
    check.on_cpu("kv", kv);
    check.contiguous_rows("kv", kv);
  }
  check_rows(check, "kv", q, {kv.size(1), number ? kRowFormats[number].elements : kv.size(2), 0}, d_v, 0);
  check.dims("indices", indices, 3, "[s_q, h_kv, topk]");
  check.dtype("indices", indices, ScalarType::Int);
  check.on_cpu("indices", indices);
  check.size("indices", indices, 0, q.size(0), " query tokens, as q");
  check.size("indices", indices, 1, kv.size(1), " KV heads, as kv");
  check_lengths(check, "topk_length", q, given(topk_length), "[s_q]", " query tokens, as q");
  check_sink(check, q, given(attn_sink));

  const int64_t s_q = q.size(0), h_q = q.size(1);
  const Tensor out = new_tensor({s_q, h_q, d_v}, q.scalar_type());
  const Tensor max_logits = new_tensor({s_q, h_q}, ScalarType::Float);
  const Tensor lse = new_tensor({s_q, h_q}, ScalarType::Float);
  FlashmlaSparse call = call_of(q, kv.size(1), d_v, 0, softmax_scale, given(attn_sink));
  call.sources[call.n_sources++] = beside(kv, indices, given(topk_length), number);
  set_out(call.attention, out);
  call.attention.lse = lse.mutable_data_ptr<float>();
  call.attention.max_logits = max_logits.mutable_data_ptr<float>();
  call.attention.lse_stride[1] = 1, call.attention.lse_stride[2] = h_q;
  run(check.op, call);
  return {out, max_logits, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("sparse_prefill", TORCH_BOX(&sparse_prefill));
}
