// flashmla::decode_up on the CPU, through torch's stable ABI; checks as in flashmla_ops/ops/decode_up.py.
#include <tuple>

#include "flashmla/torch_decode.h"

namespace {

using namespace flashmla;

constexpr const char* kOp = "decode_up";

void check_weight(const DecodeArguments& a, const Tensor& weight) {
  const Check check{kOp};
  check.dims("weight", weight, 3, "[h_q, d_v, d_up]");
  check.dtype("weight", weight, a.q.scalar_type());
  check.on_cpu("weight", weight);
  check.size("weight", weight, 0, a.q.size(2), " heads, as q");
  if (weight.size(1) != a.d_v) check.fail("weight", text("d_v ", a.d_v), text(weight.size(1)));
  if (weight.size(2) < 1) check.fail("weight", "d_up of at least 1", text(weight.size(2)));
  const bool rows = weight.stride(2) == 1 || weight.size(2) == 1, columns = weight.stride(1) == 1 || a.d_v == 1;
  if (!rows && !columns) {
    check.fail("weight", "one of the last two dimensions contiguous",
               text("strides ", weight.stride(1), " and ", weight.stride(2)));
  }
}

std::tuple<Tensor, Tensor> decode_up(const Tensor& q, const Tensor& kv_cache, std::optional<Tensor> k_cache,
                                     const Tensor& block_table, const Tensor& cache_seqlens, const Tensor& weight,
                                     int64_t d_v, int64_t qk_start, std::optional<double> softmax_scale, bool causal,
                                     std::optional<Tensor> schedule, std::string row_format,
                                     std::optional<Tensor> attn_sink, int64_t levels) {
  const DecodeArguments a{q,      kv_cache, k_cache,    block_table, cache_seqlens, d_v, qk_start, softmax_scale,
                          causal, schedule, row_format, attn_sink,   levels};
  check_decode(kOp, a);
  check_weight(a, weight);
  const Tensor out = new_tensor({q.size(0), q.size(1), q.size(2), weight.size(2)}, q.scalar_type());
  const Tensor lse = new_tensor({q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  FlashmlaDecode call = decode_call(a);
  set_lse(call, lse);
  FlashmlaUp up{};
  up.weight = weight.const_data_ptr(), up.d_up = weight.size(2), up.out = out.mutable_data_ptr();
  for (int i = 0; i < 3; i++) up.weight_stride[i] = weight.stride(i);
  up.weight_along_k = weight.stride(2) != 1 && weight.size(2) != 1;
  const ScheduleArgument plan(schedule);
  char message[FLASHMLA_MESSAGE];
  const FlashmlaRuntime threads = runtime();
  raise_if(flashmla_decode_up(&call, &up, plan.data(), plan.numel(), &threads, message), message);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashmla, CPU, m) { m.impl("decode_up", TORCH_BOX(&decode_up)); }
