// The schedule, decode and the merge of states, with the kernels of this processor.
#include "flashmla/decode.h"

#include "flashmla/bounds.h"
#include "flashmla/dispatch.h"
#include "flashmla/sequences.h"

namespace flashmla {
namespace {

// Whether there is more to a call than whole sequences with equally many queries, which is what schedules are for.
bool has_own_sequences(const FlashmlaDecode& call) { return call.cu_seqlens_q || call.window || call.batch_invariant; }

const std::vector<Sequences::Sequence>& sequences_of(const FlashmlaDecode& call) {
  std::vector<Sequences::Sequence>& sequences = Sequences::kept();
  for (int64_t i = 0; i < call.b; i++) {
    sequences.push_back({sequence_of(call, i), i, call.cache_seqlens[i * call.cache_seqlens_stride]});
  }
  return sequences;
}

int decode_sequences(const FlashmlaDecode& call, const FlashmlaRuntime& runtime, char* message) try {
  if (check_lengths(call, message)) return 1;
  if (call.cu_seqlens_q) {
    const Bounds bounds{call.cu_seqlens_q, call.cu_seqlens_q_stride};
    if (bounds.check(call.op, "cu_seqlens_q", call.b, call.t_q, message)) return 1;
  }
  if (call.h_q == 0) return 0;
  Sequences sequences(sequences_of(call), runtime.num_threads);
  if (sequences.run(runtime)) return 0;
  if (sequences.bad_page) return name_bad_page(call, message);
  return out_of_memory(message, call.op);
} catch (const std::bad_alloc&) {
  return out_of_memory(message, call.op);
}

}  // namespace
}  // namespace flashmla

using namespace flashmla;

extern "C" {

int64_t flashmla_schedule_numel(int64_t b, int64_t num_parts) { return Schedule(b, 1, 1, 1, num_parts).numel(); }

int flashmla_decode_schedule(const int32_t* cache_seqlens, int64_t stride, int64_t b, int64_t s_q, int64_t h_q,
                             int64_t h_kv, int64_t num_parts, int32_t* schedule, char* message) try {
  for (int64_t i = 0; i < b; i++) {
    if (cache_seqlens[i * stride] < 0) {
      char actual[128];
      return fail(message, "decode_schedule", "cache_seqlens", "lengths of at least 0",
                  text(actual, "%d at [%lld]", cache_seqlens[i * stride], (long long)i));
    }
  }
  const Schedule shape(b, s_q, h_q, h_kv, num_parts);
  const int32_t* written = write_schedule(shape, cache_seqlens, stride);
  std::copy(written, written + shape.numel(), schedule);
  return 0;
} catch (const std::bad_alloc&) {
  return flashmla::out_of_memory(message, "decode_schedule");
}

int flashmla_decode(const FlashmlaDecode* call, const int32_t* schedule, int64_t schedule_numel,
                    const FlashmlaRuntime* runtime, char* message) {
  if (has_own_sequences(*call)) return decode_sequences(*call, *runtime, message);
  return decode(kernels(), *call, schedule, schedule_numel, *runtime, message);
}

void flashmla_decode_footprint(const FlashmlaDecode* call, int64_t num_threads, FlashmlaFootprint* footprint) {
  const Schedule shape(call->b, call->s_q, call->h_q, call->h_kv, num_threads);
  *footprint = Decode(kernels(), *call, shape, nullptr).footprint(num_threads);
}

int flashmla_merge_states(const FlashmlaMerge* call, const FlashmlaRuntime* runtime, char* message) {
  if (call->parts > FLASHMLA_MAX_PARTS) {
    char expected[128], actual[128];
    return fail(message, "merge_states", "outs", text(expected, "at most %lld parts", (long long)FLASHMLA_MAX_PARTS),
                text(actual, "%lld", (long long)call->parts));
  }
  struct Context {
    const Kernels& kernels;
    const FlashmlaMerge& call;
  } context{kernels(), *call};
  const int64_t rows = call->b * call->s_q * call->h_q;
  const FlashmlaBody body = [](int64_t begin, int64_t end, void* c) {
    static_cast<Context*>(c)->kernels.merge(static_cast<Context*>(c)->call, begin, end);
  };
  if (rows * call->d_v * call->parts < 1 << 15 || runtime->num_threads <= 1) {
    body(0, rows, &context);  // less than what waking a thread costs
  } else {
    runtime->parallel(rows, body, &context);
  }
  return 0;
}
}
