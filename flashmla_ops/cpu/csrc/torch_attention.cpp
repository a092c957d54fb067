// The attention operators on the CPU, through torch's stable ABI. Schemas, tags and fakes are defined in Python
// (flashmla_ops/ops); the checks here are the same as there, with the same words, because eager calls do not pass
// there.
#include <cmath>
#include <tuple>

#include "flashmla/append_quantized.h"
#include "flashmla/torch_decode.h"

namespace {

using namespace flashmla;

void run_decode(const DecodeArguments& a, const Tensor& out, const Tensor& lse) {
  FlashmlaDecode call = decode_call(a);
  call.out = out.mutable_data_ptr();
  for (int i = 0; i < 3; i++) call.out_stride[i] = out.stride(i);
  set_lse(call, lse);
  const ScheduleArgument schedule(a.schedule);
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_decode(&call, schedule.data(), schedule.numel(), &threads, message), message);
}

std::tuple<Tensor, Tensor> decode(const Tensor& q, const Tensor& kv_cache, std::optional<Tensor> k_cache,
                                  const Tensor& block_table, const Tensor& cache_seqlens, int64_t d_v, int64_t qk_start,
                                  std::optional<double> softmax_scale, bool causal, std::optional<Tensor> schedule,
                                  std::string row_format, std::optional<Tensor> attn_sink, int64_t levels) {
  const DecodeArguments a{q,      kv_cache, k_cache,    block_table, cache_seqlens, d_v, qk_start, softmax_scale,
                          causal, schedule, row_format, attn_sink,   levels};
  check_decode("decode", a);
  const Tensor out = new_tensor({q.size(0), q.size(1), q.size(2), d_v}, q.scalar_type());
  const Tensor lse = new_tensor({q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  run_decode(a, out, lse);
  return {out, lse};
}

void decode_out(const Tensor& q, const Tensor& kv_cache, std::optional<Tensor> k_cache, const Tensor& block_table,
                const Tensor& cache_seqlens, int64_t d_v, int64_t qk_start, std::optional<double> softmax_scale,
                bool causal, std::optional<Tensor> schedule, std::string row_format, std::optional<Tensor> attn_sink,
                int64_t levels, Tensor out, Tensor lse) {
  const DecodeArguments a{q,      kv_cache, k_cache,    block_table, cache_seqlens, d_v, qk_start, softmax_scale,
                          causal, schedule, row_format, attn_sink,   levels};
  check_decode("decode", a);
  const Check check{"decode"};
  check.dtype("out", out, q.scalar_type());
  check.on_cpu("out", out);
  check.shape("out", out, {q.size(0), q.size(1), q.size(2), d_v});
  check.dtype("lse", lse, ScalarType::Float);
  check.on_cpu("lse", lse);
  check.shape("lse", lse, {q.size(0), q.size(2), q.size(1)});
  check.contiguous_rows("out", out);
  const auto apart = [&](const char* name, const Tensor& tensor, const Tensor* other) {
    check.apart(name, tensor,
                {{"q", &q},
                 {"kv_cache", &kv_cache},
                 {"k_cache", given(k_cache)},
                 {"block_table", &block_table},
                 {"cache_seqlens", &cache_seqlens},
                 {"schedule", given(schedule)},
                 {"attn_sink", given(attn_sink)},
                 {"out", other}});
  };
  apart("out", out, nullptr);
  apart("lse", lse, &out);
  run_decode(a, out, lse);
}

Tensor decode_schedule(const Tensor& cache_seqlens, int64_t s_q, int64_t h_q, int64_t h_kv, int64_t num_parts) {
  const Check check{"decode_schedule"};
  check.dims("cache_seqlens", cache_seqlens, 1, "[b]");
  check.dtype("cache_seqlens", cache_seqlens, ScalarType::Int);
  if (s_q < 1) check.fail("s_q", "at least 1", text(s_q));
  if (h_kv < 1) check.fail("h_kv", "at least 1", text(h_kv));
  if (h_q < 0 || h_q % h_kv != 0) check.fail("h_q", text("a multiple of h_kv ", h_kv), text(h_q));
  if (num_parts < 1 || num_parts > FLASHMLA_MAX_PARTS) {
    check.fail("num_parts", text("a value in [1, ", int(FLASHMLA_MAX_PARTS), "]"), text(num_parts));
  }
  const int64_t b = cache_seqlens.size(0);
  const Tensor schedule = new_tensor({flashmla_schedule_numel(b, num_parts)}, ScalarType::Int);
  char message[FLASHMLA_MESSAGE];
  raise_if(flashmla_decode_schedule(cache_seqlens.const_data_ptr<int32_t>(), cache_seqlens.stride(0), b, s_q, h_q, h_kv,
                                    num_parts, schedule.mutable_data_ptr<int32_t>(), message),
           message);
  return schedule;
}

// cu_seqlens as the C interface takes them: int64 ones are converted.
struct Boundaries {
  std::vector<int32_t> converted;
  const int32_t* data;
  int64_t stride;

  Boundaries(const Check& check, const char* name, const Tensor& tensor) {
    if (tensor.scalar_type() == ScalarType::Int) {
      data = tensor.const_data_ptr<int32_t>(), stride = tensor.stride(0);
      return;
    }
    const int64_t* given = tensor.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < tensor.size(0); i++) {
      const int64_t value = given[i * tensor.stride(0)];
      if (value != int32_t(value)) check.fail(name, "values that int32 holds", text(value, " at [", i, "]"));
      converted.push_back(int32_t(value));
    }
    data = converted.data(), stride = 1;
  }
};

std::tuple<Tensor, Tensor> prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                   const Tensor& cu_seqlens_k, bool causal, std::optional<double> softmax_scale,
                                   int64_t levels) {
  const Check check{"prefill"};
  check_levels(check, levels);
  check.dims("q", q, 3, "[t_q, h_q, d_qk]");
  check.floating("q", q);
  if (q.size(2) < 1) check.fail("q", "d_qk of at least 1", text(q.size(2)));
  check.dims("k", k, 3, "[t_k, h_kv, d_qk]");
  check.dims("v", v, 3, "[t_k, h_kv, d_v]");
  for (const auto& [name, tensor] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    check.dtype(name, *tensor, q.scalar_type());
    check.on_cpu(name, *tensor);
    check.contiguous_rows(name, *tensor);
  }
  if (k.size(2) != q.size(2)) check.fail("k", text("d_qk ", q.size(2), ", as q"), text(k.size(2)));
  if (k.size(1) < 1) check.fail("k", "at least 1 KV head (h_kv)", text(k.size(1)));
  if (q.size(1) % k.size(1) != 0) {
    check.fail("q", text("query heads in multiples of the ", k.size(1), " KV heads"), text(q.size(1)));
  }
  if (v.size(0) != k.size(0)) check.fail("v", text(k.size(0), " tokens, as k"), text(v.size(0)));
  if (v.size(1) != k.size(1)) check.fail("v", text(k.size(1), " KV heads, as k"), text(v.size(1)));
  if (v.size(2) < 1) check.fail("v", "d_v of at least 1", text(v.size(2)));
  for (const auto& [name, tensor] :
       {std::pair{"cu_seqlens_q", &cu_seqlens_q}, std::pair{"cu_seqlens_k", &cu_seqlens_k}}) {
    check.dims(name, *tensor, 1, "[b + 1]");
    if (tensor->scalar_type() != ScalarType::Int && tensor->scalar_type() != ScalarType::Long) {
      check.fail(name, "int32 or int64", name_of(tensor->scalar_type()));
    }
    check.on_cpu(name, *tensor);
    if (tensor->size(0) < 1) check.fail(name, "at least 1 element", text(tensor->size(0)));
  }
  if (cu_seqlens_k.size(0) != cu_seqlens_q.size(0)) {
    check.fail("cu_seqlens_k", text(cu_seqlens_q.size(0), " elements, as cu_seqlens_q"), text(cu_seqlens_k.size(0)));
  }
  const Boundaries bounds_q(check, "cu_seqlens_q", cu_seqlens_q), bounds_k(check, "cu_seqlens_k", cu_seqlens_k);

  const Tensor out = new_tensor({q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  const Tensor lse = new_tensor({q.size(1), q.size(0)}, ScalarType::Float);
  FlashmlaPrefill call{};
  call.dtype = dtype_of(q), call.causal = causal, call.levels = int32_t(levels);
  call.b = cu_seqlens_q.size(0) - 1, call.h_q = q.size(1), call.h_kv = k.size(1);
  call.d_qk = q.size(2), call.d_v = v.size(2), call.t_q = q.size(0), call.t_k = k.size(0);
  call.softmax_scale = float(softmax_scale ? *softmax_scale : 1 / std::sqrt(double(call.d_qk)));
  call.q = q.const_data_ptr(), call.k = k.const_data_ptr(), call.v = v.const_data_ptr();
  for (int i = 0; i < 3; i++) call.q_stride[i] = q.stride(i);
  for (int i = 0; i < 2; i++) call.k_stride[i] = k.stride(i), call.v_stride[i] = v.stride(i);
  call.cu_seqlens_q = bounds_q.data, call.cu_seqlens_q_stride = bounds_q.stride;
  call.cu_seqlens_k = bounds_k.data, call.cu_seqlens_k_stride = bounds_k.stride;
  call.out = out.mutable_data_ptr(), call.lse = lse.mutable_data_ptr<float>();
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_prefill(&call, &threads, message), message);
  return {out, lse};
}

// What rows for a cache have in common, whatever it holds: KV heads, `elements` each, and a slot.
void check_rows(const Check& check, const char* name, const Tensor& rows, const Tensor& cache, const char* cache_name,
                int64_t elements, const std::string& what, const Tensor& slot_mapping) {
  if (rows.size(1) != cache.size(2)) {
    check.fail(name, text(cache.size(2), " KV heads, as ", cache_name), text(rows.size(1)));
  }
  if (rows.size(2) != elements) check.fail(name, text("rows of ", elements, what), text(rows.size(2)));
  check.dims("slot_mapping", slot_mapping, 1, "[n]");
  check.dtype("slot_mapping", slot_mapping, ScalarType::Long);
  check.on_cpu("slot_mapping", slot_mapping);
  if (rows.size(0) != slot_mapping.size(0)) check.fail(name, "one row for each slot", text(rows.size(0)));
}

void check_append(const Tensor& cache, const Tensor& rows, const Tensor& slot_mapping, const char* cache_name,
                  const char* rows_name) {
  const Check check{"append_"};
  check.dims(cache_name, cache, 4, "[n_pages, page_size, h_kv, d]");
  check.floating(cache_name, cache);
  check.contiguous_rows(cache_name, cache);
  if (cache.size(1) < 1) check.fail(cache_name, "page_size of at least 1", text(cache.size(1)));
  check.dims(rows_name, rows, 3, "[n, h_kv, d]");
  check.dtype(rows_name, rows, cache.scalar_type());
  check.on_cpu(rows_name, rows);
  check_rows(check, rows_name, rows, cache, cache_name, cache.size(3), text(" elements, as ", cache_name),
             slot_mapping);
  check.apart(cache_name, cache, {{rows_name, &rows}, {"slot_mapping", &slot_mapping}});
}

FlashmlaAppend append_of(const Tensor& cache, const Tensor& rows) {
  const int64_t size = cache.scalar_type() == ScalarType::Float ? 4 : 2;
  FlashmlaAppend to{};
  to.cache = static_cast<char*>(cache.mutable_data_ptr());
  to.rows = static_cast<const char*>(rows.const_data_ptr());
  to.page_bytes = cache.stride(0) * size, to.token_bytes = cache.stride(1) * size,
  to.head_bytes = cache.stride(2) * size;
  to.row_bytes = rows.stride(0) * size, to.row_head_bytes = rows.stride(1) * size,
  to.element_bytes = rows.stride(2) * size;
  to.n_pages = cache.size(0), to.page_size = cache.size(1), to.h_kv = cache.size(2), to.d = cache.size(3);
  to.element_size = size;
  return to;
}

template <size_t N>
void run_append(const FlashmlaAppend (&tensors)[N], const Tensor& slots) {
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_append(tensors, int64_t{N}, slots.const_data_ptr<int64_t>(), slots.stride(0), slots.size(0),
                           &threads, message),
           message);
}

// check_append for a cache of bytes and rows of floating-point numbers.
void check_append_quantized(const Tensor& cache, const Tensor& rows, const Tensor& slot_mapping,
                            const RowFormat& format) {
  const Check check{"append_"};
  check.dims("kv_cache", cache, 4, "[n_pages, page_size, h_kv, d]");
  check_bytes(check, "kv_cache", cache, format);
  if (cache.size(1) < 1) check.fail("kv_cache", "page_size of at least 1", text(cache.size(1)));
  check.dims("rows", rows, 3, "[n, h_kv, d]");
  check.floating("rows", rows);
  check.on_cpu("rows", rows);
  check_rows(check, "rows", rows, cache, "kv_cache", format.elements, " elements", slot_mapping);
  check.apart("kv_cache", cache, {{"rows", &rows}, {"slot_mapping", &slot_mapping}});
}

void append_quantized(const Tensor& cache, const Tensor& rows, const Tensor& slots, int32_t number) {
  check_append_quantized(cache, rows, slots, kRowFormats[number]);
  const int64_t size = rows.scalar_type() == ScalarType::Float ? 4 : 2;
  FlashmlaAppend to{};
  to.cache = static_cast<char*>(cache.mutable_data_ptr());
  to.rows = static_cast<const char*>(rows.const_data_ptr());
  to.page_bytes = cache.stride(0), to.token_bytes = cache.stride(1), to.head_bytes = cache.stride(2);
  to.row_bytes = rows.stride(0) * size, to.row_head_bytes = rows.stride(1) * size,
  to.element_bytes = rows.stride(2) * size;
  to.n_pages = cache.size(0), to.page_size = cache.size(1), to.h_kv = cache.size(2);
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_append_quantized(&to, number, dtype_of(rows), slots.const_data_ptr<int64_t>(), slots.stride(0),
                                     slots.size(0), &threads, message),
           message);
}

void append(Tensor kv_cache, const Tensor& rows, const Tensor& slot_mapping, std::string row_format) {
  const int32_t number = number_of_format(row_format);
  if (row_format != kRowFormats[number].name) {
    Check{"append_"}.fail("row_format", text("one of ", kRowFormatNames), row_format);
  }
  if (number) return append_quantized(kv_cache, rows, slot_mapping, number);
  check_append(kv_cache, rows, slot_mapping, "kv_cache", "rows");
  run_append({append_of(kv_cache, rows)}, slot_mapping);
}

void append_two(Tensor kv_cache, Tensor k_cache, const Tensor& rows, const Tensor& k_rows, const Tensor& slot_mapping) {
  check_append(kv_cache, rows, slot_mapping, "kv_cache", "rows");
  check_append(k_cache, k_rows, slot_mapping, "k_cache", "k_rows");
  const Check check{"append_"};
  check.same_pages(kv_cache, k_cache, 2);
  check.apart("kv_cache", kv_cache, {{"k_rows", &k_rows}});
  check.apart("k_cache", k_cache, {{"rows", &rows}, {"kv_cache", &kv_cache}});
  run_append({append_of(kv_cache, rows), append_of(k_cache, k_rows)}, slot_mapping);
}

std::tuple<Tensor, Tensor> merge_states(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  const Check check{"merge_states"};
  const size_t parts = outs.size();
  if (parts < 1) check.fail("outs", "at least one part", text(parts));
  if (lses.size() != parts) check.fail("lses", text(parts, " parts, as outs"), text(lses.size()));
  Check{"merge_states", 0}.floating("outs", outs[0]);
  const int64_t dims = outs[0].dim();
  if (dims != 3 && dims != 4) {
    Check{"merge_states", 0}.fail("outs", "shape [b, s_q, h_q, d_v] or [s_q, h_q, d_v]", text(dims, " dimensions"));
  }
  std::vector<int64_t> out_shape(static_cast<size_t>(dims)), lse_shape(static_cast<size_t>(dims) - 1);
  for (int64_t i = 0; i < dims; i++) out_shape[size_t(i)] = outs[0].size(i);
  lse_shape[0] = out_shape[0];  // b, where there is one
  lse_shape[size_t(dims) - 3] = out_shape[size_t(dims) - 2];
  lse_shape[size_t(dims) - 2] = out_shape[size_t(dims) - 3];

  std::vector<const void*> out_data;
  std::vector<const float*> lse_data;
  std::vector<int64_t> out_strides, lse_strides;
  out_data.reserve(parts), lse_data.reserve(parts), out_strides.reserve(4 * parts), lse_strides.reserve(3 * parts);
  for (size_t i = 0; i < parts; i++) {
    const Check part{"merge_states", int64_t(i)};
    part.dtype("outs", outs[i], outs[0].scalar_type());
    part.dtype("lses", lses[i], ScalarType::Float);
    part.on_cpu("outs", outs[i]);
    part.shape("outs", outs[i], out_shape);
    part.on_cpu("lses", lses[i]);
    part.shape("lses", lses[i], lse_shape);
    out_data.push_back(outs[i].const_data_ptr());
    lse_data.push_back(lses[i].const_data_ptr<float>());
    if (dims == 3) out_strides.push_back(0), lse_strides.push_back(0);
    for (int64_t d = 0; d < dims; d++) out_strides.push_back(outs[i].stride(d));
    for (int64_t d = 0; d < dims - 1; d++) lse_strides.push_back(lses[i].stride(d));
  }
  const Tensor out = new_tensor(out_shape, outs[0].scalar_type());
  const Tensor lse = new_tensor(lse_shape, ScalarType::Float);
  FlashmlaMerge call{};
  call.dtype = dtype_of(outs[0]);
  call.parts = int64_t(parts);
  call.b = dims == 4 ? out_shape[0] : 1;
  call.s_q = out_shape[size_t(dims) - 3], call.h_q = out_shape[size_t(dims) - 2],
  call.d_v = out_shape[size_t(dims) - 1];
  call.outs = out_data.data(), call.out_strides = out_strides.data();
  call.lses = lse_data.data(), call.lse_strides = lse_strides.data();
  call.out = out.mutable_data_ptr(), call.lse = lse.mutable_data_ptr<float>();
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_merge_states(&call, &threads, message), message);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("decode.out", TORCH_BOX(&decode_out));
  m.impl("prefill", TORCH_BOX(&prefill));
  m.impl("decode_schedule", TORCH_BOX(&decode_schedule));
  m.impl("append_", TORCH_BOX(&append));
  m.impl("append_.two", TORCH_BOX(&append_two));
  m.impl("merge_states", TORCH_BOX(&merge_states));
}
