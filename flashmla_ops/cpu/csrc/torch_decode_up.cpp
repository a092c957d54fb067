// flashmla::decode_up on the CPU, through torch's stable ABI.
#include <tuple>

#include "flashmla/torch_decode.h"

namespace {

using namespace flashmla;

std::tuple<Tensor, Tensor> decode_up(const DecodeUpArguments& a) {
  const auto results = check(a);
  const Tensor out = new_tensor(results[0]), lse = new_tensor(results[1]);
  const Tensor& weight = a.weight;
  FlashmlaDecode call = decode_call(a);
  const auto bounds = set_boundaries(call, a);
  set_lse(call, lse);
  FlashmlaUp up{};
  up.weight = weight.const_data_ptr(), up.d_up = weight.size(2), up.out = out.mutable_data_ptr();
  for (int i = 0; i < 3; i++) up.weight_stride[i] = weight.stride(i);
  up.weight_along_k = weight.stride(2) != 1 && weight.size(2) != 1;
  const ScheduleArgument plan(a.schedule);
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_decode_up(&call, &up, plan.data(), plan.numel(), &threads, message), message);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) { m.impl("decode_up", TORCH_BOX(&DecodeUpArguments::call<&decode_up>)); }
