// The attention operators on the CPU, through torch's stable ABI. Schemas, contracts and fakes are stated in Python
// (flashmla_ops/ops).
#include <tuple>

#include "flashmla/append_quantized.h"
#include "flashmla/torch_decode.h"
#include "flashmla/torch_prefill.h"

namespace {

using namespace flashmla;

void run_decode(const DecodeArguments& a, const Tensor& out, const Tensor& lse) {
  FlashmlaDecode call = decode_call(a);
  const auto bounds = set_boundaries(call, a);
  call.out = out.mutable_data_ptr();
  set_strides(call.out_stride, out);
  set_lse(call, lse);
  const ScheduleArgument schedule(a.schedule);
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_decode(&call, schedule.data(), schedule.numel(), &threads, message), message);
}

std::tuple<Tensor, Tensor> decode(const DecodeArguments& a) {
  const auto results = check(a);
  const Tensor out = new_tensor(results[0]), lse = new_tensor(results[1]);
  run_decode(a, out, lse);
  return {out, lse};
}

void decode_out(const DecodeArguments& a, const Tensor& out, const Tensor& lse) {
  check_outs(a, check(a), {Input{"out", &out}, Input{"lse", &lse}}, "out");
  run_decode(a, out, lse);
}

Tensor decode_schedule(const DecodeScheduleArguments& a) {
  const Tensor schedule = new_tensor(check(a)[0]);
  char message[FLASHMLA_MESSAGE];
  raise_if(flashmla_decode_schedule(a.cache_seqlens.const_data_ptr<int32_t>(), a.cache_seqlens.stride(0),
                                    a.cache_seqlens.size(0), a.s_q, a.h_q, a.h_kv, a.num_parts,
                                    schedule.mutable_data_ptr<int32_t>(), message),
           message);
  return schedule;
}

std::tuple<Tensor, Tensor> prefill(const PrefillArguments& a) {
  const auto results = check(a);
  const Boundaries bounds_q(Check{a.kOp}, "cu_seqlens_q", a.cu_seqlens_q);
  const Boundaries bounds_k(Check{a.kOp}, "cu_seqlens_k", a.cu_seqlens_k);
  const Tensor out = new_tensor(results[0]), lse = new_tensor(results[1]);
  FlashmlaPrefill call = prefill_call(a, bounds_q, bounds_k);
  call.levels = int32_t(a.levels);
  call.out = out.mutable_data_ptr(), call.lse = lse.mutable_data_ptr<float>();
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_prefill(&call, &threads, message), message);
  return {out, lse};
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

void append_quantized(const Tensor& cache, const Tensor& rows, const Tensor& slots, int32_t number) {
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

void append(const AppendArguments& a) {
  check(a);
  if (const int32_t number = number_of_format(a.row_format)) {
    return append_quantized(a.kv_cache, a.rows, a.slot_mapping, number);
  }
  run_append({append_of(a.kv_cache, a.rows)}, a.slot_mapping);
}

void append_two(const AppendTwoArguments& a) {
  check(a);
  run_append({append_of(a.kv_cache, a.rows), append_of(a.k_cache, a.k_rows)}, a.slot_mapping);
}

std::tuple<Tensor, Tensor> merge_states(const MergeStatesArguments& a) {
  const auto results = check(a);
  const auto& [outs, lses] = a;
  const size_t parts = outs.size();
  const int64_t dims = outs[0].dim();
  std::vector<const void*> out_data;
  std::vector<const float*> lse_data;
  std::vector<int64_t> out_strides, lse_strides;
  out_data.reserve(parts), lse_data.reserve(parts), out_strides.reserve(4 * parts), lse_strides.reserve(3 * parts);
  for (size_t i = 0; i < parts; i++) {
    out_data.push_back(outs[i].const_data_ptr());
    lse_data.push_back(lses[i].const_data_ptr<float>());
    if (dims == 3) out_strides.push_back(0), lse_strides.push_back(0);
    for (int64_t d = 0; d < dims; d++) out_strides.push_back(outs[i].stride(d));
    for (int64_t d = 0; d < dims - 1; d++) lse_strides.push_back(lses[i].stride(d));
  }
  const Tensor out = new_tensor(results[0]), lse = new_tensor(results[1]);
  FlashmlaMerge call{};
  call.dtype = dtype_of(outs[0]);
  call.parts = int64_t(parts);
  call.b = dims == 4 ? out.size(0) : 1;
  call.s_q = out.size(dims - 3), call.h_q = out.size(dims - 2), call.d_v = out.size(dims - 1);
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
  m.impl("decode", TORCH_BOX(&DecodeArguments::call<&decode>));
  m.impl("decode.out", TORCH_BOX(&DecodeArguments::call_out<&decode_out>));
  m.impl("prefill", TORCH_BOX(&PrefillArguments::call<&prefill>));
  m.impl("decode_schedule", TORCH_BOX(&DecodeScheduleArguments::call<&decode_schedule>));
  m.impl("append_", TORCH_BOX(&AppendArguments::call<&append>));
  m.impl("append_.two", TORCH_BOX(&AppendTwoArguments::call<&append_two>));
  m.impl("merge_states", TORCH_BOX(&MergeStatesArguments::call<&merge_states>));
}
