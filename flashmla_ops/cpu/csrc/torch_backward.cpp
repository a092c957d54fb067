// The gradients of attention on the CPU, through torch's stable ABI.
#include <tuple>

#include "flashmla/torch_prefill.h"

namespace {

using namespace flashmla;

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

std::tuple<Tensor, Tensor, Tensor> prefill_backward(const PrefillBackwardArguments& a) {
  const auto results = check(a);
  const Boundaries bounds_q(Check{a.kOp}, "cu_seqlens_q", a.cu_seqlens_q);
  const Boundaries bounds_k(Check{a.kOp}, "cu_seqlens_k", a.cu_seqlens_k);
  FlashmlaPrefillBackward call{prefill_call(a, bounds_q, bounds_k), gradients_of(a), nullptr, nullptr};
  const bool wants_q = a.wanted & 1, wants_k = a.wanted & 2, wants_v = a.wanted & 4;
  const Tensor dq = new_tensor(results[0]), dk = new_tensor(results[1]), dv = new_tensor(results[2]);
  if (wants_q) {
    call.gradients.dq = dq.mutable_data_ptr();
    for (int i = 0; i < 2; i++) call.gradients.dq_stride[i + 1] = dq.stride(i);
  }
  if (wants_k) call.dk = dk.mutable_data_ptr();
  if (wants_v) call.dv = dv.mutable_data_ptr();
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_prefill_backward(&call, &threads, message), message);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) {
  m.impl("prefill_backward", TORCH_BOX(&PrefillBackwardArguments::call<&prefill_backward>));
}
