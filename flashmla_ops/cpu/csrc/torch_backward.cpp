// The gradients of attention on the CPU, through torch's stable ABI.
#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "flashmla/torch_decode.h"
#include "flashmla/torch_prefill.h"
#include "flashmla/torch_sparse.h"

namespace {

using namespace flashmla;

// Where a result goes, or null if it is not wanted.
void* wanted(const Tensor& result, bool is_wanted) { return is_wanted ? result.mutable_data_ptr() : nullptr; }

// Results of attention and the gradients with respect to them, whose dimensions are the last ones of those in the call.
template <class Arguments>
FlashmlaGradients gradients_of(const Arguments& a) {
  FlashmlaGradients gradients{};
  const auto strides = [](const Tensor& tensor, int64_t dims, int64_t* to) {
    for (int64_t i = 0; i < tensor.dim(); i++) to[dims - tensor.dim() + i] = tensor.stride(i);
  };
  gradients.out = a.out.const_data_ptr(), strides(a.out, 4, gradients.out_stride);
  gradients.dout = a.dout.const_data_ptr(), strides(a.dout, 4, gradients.dout_stride);
  gradients.lse = a.lse.template const_data_ptr<float>(), strides(a.lse, 3, gradients.lse_stride);
  if (const Tensor* dlse = given(a.dlse)) {
    gradients.dlse = dlse->const_data_ptr<float>(), strides(*dlse, 3, gradients.dlse_stride);
  }
  return gradients;
}

void set_dq(FlashmlaGradients& gradients, const Tensor& dq) {
  gradients.dq = dq.mutable_data_ptr();
  for (int64_t i = 0, dims = dq.dim(); i < dims - 1; i++) gradients.dq_stride[4 - dims + i] = dq.stride(i);
}

// Each row's part of the gradient of a sink, while it is computed, and their sums.
class SinkGradient {
public:
  SinkGradient(FlashmlaGradients& gradients, int64_t b, int64_t h_q, int64_t s_q, const Tensor& dsink, bool is_wanted)
      : h_q_(h_q), s_q_(s_q), sums_(static_cast<float*>(wanted(dsink, is_wanted))) {
    if (!is_wanted) return;
    parts_.resize(size_t(b * h_q * s_q));
    gradients.dsink = parts_.data();
    gradients.dsink_stride[0] = b > 1 ? h_q * s_q : 0, gradients.dsink_stride[1] = s_q, gradients.dsink_stride[2] = 1;
  }
  void sum() const {
    if (sums_ == nullptr) return;
    std::vector<double> sums(size_t(h_q_), 0.0);
    for (size_t i = 0; i < parts_.size(); i++) sums[i / size_t(s_q_) % size_t(h_q_)] += parts_[i];
    std::copy(sums.begin(), sums.end(), sums_);
  }

private:
  const int64_t h_q_, s_q_;
  float* sums_;
  std::vector<float> parts_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> prefill_backward(const PrefillBackwardArguments& a) {
  const auto results = check(a);
  const Boundaries bounds_q(Check{a.kOp}, "cu_seqlens_q", a.cu_seqlens_q);
  const Boundaries bounds_k(Check{a.kOp}, "cu_seqlens_k", a.cu_seqlens_k);
  FlashmlaPrefillBackward call{prefill_call(a, bounds_q, bounds_k), gradients_of(a), nullptr, nullptr};
  const Tensor dq = new_tensor(results[0]), dk = new_tensor(results[1]), dv = new_tensor(results[2]);
  const Tensor dsink = new_tensor(results[3]);
  if (a.wanted & 1) set_dq(call.gradients, dq);
  call.dk = wanted(dk, a.wanted & 2), call.dv = wanted(dv, a.wanted & 4);
  const SinkGradient sink(call.gradients, 1, a.q.size(1), a.q.size(0), dsink, a.attn_sink && (a.wanted & 8));
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_prefill_backward(&call, &threads, message), message);
  sink.sum();
  return {dq, dk, dv, dsink};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_backward(const DecodeBackwardArguments& a) {
  const auto results = check(a);
  const Tensor dq = new_tensor(results[0]), dkv_cache = new_tensor(results[1]), dk_cache = new_tensor(results[2]);
  const Tensor dsink = new_tensor(results[3]);
  FlashmlaDecodeBackward call{native_decode_call(a), gradients_of(a), nullptr, nullptr};
  const auto bounds = set_boundaries(call.attention, a);
  if (a.wanted & 1) set_dq(call.gradients, dq);
  call.dkv_cache = wanted(dkv_cache, a.wanted & 2), call.dk_cache = wanted(dk_cache, a.k_cache && (a.wanted & 4));
  const int64_t sequences = bounds ? 1 : a.q.size(0);  // ragged ones have their tokens side by side
  const SinkGradient sink(call.gradients, sequences, a.q.size(-2), a.q.size(-3), dsink, a.attn_sink && (a.wanted & 8));
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_decode_backward(&call, &threads, message), message);
  sink.sum();
  return {dq, dkv_cache, dk_cache, dsink};
}

std::tuple<Tensor, Tensor, Tensor> sparse_prefill_backward(const SparsePrefillBackwardArguments& a) {
  const auto results = check(a);
  const Tensor dq = new_tensor(results[0]), dkv = new_tensor(results[1]), dsink = new_tensor(results[2]);
  FlashmlaSparseBackward call{sparse_call(a, a.kv.size(1), 0), gradients_of(a), {}};
  call.attention.sources[call.attention.n_sources++] = beside(a.kv, a.indices, given(a.topk_length), 0);
  // lse is [s_q, h_q] here.
  for (int64_t* stride : {call.gradients.lse_stride, call.gradients.dlse_stride}) std::swap(stride[1], stride[2]);
  if (a.wanted & 1) set_dq(call.gradients, dq);
  call.rows[0].dkv = wanted(dkv, a.wanted & 2);
  const SinkGradient sink(call.gradients, 1, a.q.size(1), a.q.size(0), dsink, a.attn_sink && (a.wanted & 4));
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_sparse_backward(&call, &threads, message), message);
  sink.sum();
  return {dq, dkv, dsink};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sparse_decode_backward(const SparseDecodeBackwardArguments& a) {
  const auto results = check(a);
  const Tensor dq = new_tensor(results[0]), dkv_cache = new_tensor(results[1]), dk_cache = new_tensor(results[2]);
  const Tensor dsink = new_tensor(results[3]), dextra = new_tensor(results[4]);
  FlashmlaSparseBackward call{sparse_call(a, a.kv_cache.size(2), a.qk_start), gradients_of(a), {}};
  set_sources(call.attention, a);
  if (a.wanted & 1) set_dq(call.gradients, dq);
  const auto is_native = [&](int32_t i) { return call.attention.sources[i].row_format == 0; };
  call.rows[0].dkv = wanted(dkv_cache, is_native(0) && (a.wanted & 2));
  call.rows[0].dk = wanted(dk_cache, a.k_cache && (a.wanted & 4));
  call.rows[1].dkv = wanted(dextra, a.extra_kv_cache && is_native(1) && (a.wanted & 16));
  const SinkGradient sink(call.gradients, a.q.size(0), a.q.size(2), a.q.size(1), dsink, a.attn_sink && (a.wanted & 8));
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_sparse_backward(&call, &threads, message), message);
  sink.sum();
  return {dq, dkv_cache, dk_cache, dsink, dextra};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) {
  m.impl("decode_backward", TORCH_BOX(&DecodeBackwardArguments::call<&decode_backward>));
  m.impl("sparse_prefill_backward", TORCH_BOX(&SparsePrefillBackwardArguments::call<&sparse_prefill_backward>));
  m.impl("sparse_decode_backward", TORCH_BOX(&SparseDecodeBackwardArguments::call<&sparse_decode_backward>));
  m.impl("prefill_backward", TORCH_BOX(&PrefillBackwardArguments::call<&prefill_backward>));
}
