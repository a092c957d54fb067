// flashmla::sparse_decode and flashmla::sparse_prefill on the CPU, through torch's stable ABI.
#include <tuple>

#include "flashmla/torch_sparse.h"

namespace {

using namespace flashmla;

void set_out(FlashmlaDecode& attention, const Tensor& out) {
  attention.out = out.mutable_data_ptr();
  for (int64_t i = 0, dims = out.dim(); i < dims - 1; i++) attention.out_stride[4 - dims + i] = out.stride(i);
}

void run(const FlashmlaSparse& call) {
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_sparse(&call, &threads, message), message);
}

std::tuple<Tensor, Tensor> sparse_decode(const SparseDecodeArguments& a) {
  const auto results = check(a);
  const Tensor out = new_tensor(results[0]), lse = new_tensor(results[1]);
  FlashmlaSparse call = sparse_call(a, a.kv_cache.size(2), a.qk_start);
  call.batch_invariant = a.batch_invariant;
  set_sources(call, a);
  set_out(call.attention, out);
  set_lse(call.attention, lse);
  run(call);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> sparse_prefill(const SparsePrefillArguments& a) {
  const auto results = check(a);
  const Tensor out = new_tensor(results[0]), max_logits = new_tensor(results[1]), lse = new_tensor(results[2]);
  FlashmlaSparse call = sparse_call(a, a.kv.size(1), 0);
  call.sources[call.n_sources++] = beside(a.kv, a.indices, given(a.topk_length), number_of_format(a.row_format));
  set_out(call.attention, out);
  call.attention.lse = lse.mutable_data_ptr<float>();
  call.attention.max_logits = max_logits.mutable_data_ptr<float>();
  call.attention.lse_stride[1] = 1, call.attention.lse_stride[2] = lse.size(1);
  run(call);
  return {out, max_logits, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) {
  m.impl("sparse_decode", TORCH_BOX(&SparseDecodeArguments::call<&sparse_decode>));
  m.impl("sparse_prefill", TORCH_BOX(&SparsePrefillArguments::call<&sparse_prefill>));
}
