// Attention, once for each instruction set (see kernels.cpp).
#include "flashmla/attend.h"
#include "flashmla/decode_rows.h"
#include "flashmla/finish.h"
#include "flashmla/isa/compiled_for.h"

namespace flashmla {
namespace FLASHMLA_ISA {
namespace {

// One vector more than the columns need: rows of 2048 bytes would all fall into the same few sets of L1.
int64_t accumulator_stride(int64_t d_v) { return round_up(d_v, Isa::W) + 16; }

// Calls f(query element, tag of the row) for the types and the row format of a call. Rows of bytes become what tiles
// multiply: bf16 where they multiply pairs of it by queries of bf16, and else float.
template <class F>
auto with_rows(const FlashmlaDecode& call, F f) {
  return with_element(call.dtype, [&](auto q) {
    using Q = decltype(q);
    using Element = std::conditional_t<Mac<Isa, Q>::pairs, Q, float>;
    if (call.row_format) return f(q, Tag<QuantizedRow<Element>>{});
    return f(q, Tag<NativeRow<Q>>{});
  });
}

ScratchBytes scratch_bytes(const FlashmlaDecode& call, const Item& item) {
  return with_rows(call, [&](auto q, auto row) {
    return attention_scratch<Isa, decltype(q), typename decltype(row)::type>(call, item);
  });
}
bool attend(const FlashmlaDecode& call, const Item& item, int64_t begin, int64_t end, const Accumulator& into,
            char* scratch) {
  return with_rows(call, [&](auto q, auto row) {
    return attend_tokens<Isa, decltype(q), typename decltype(row)::type>(call, item, begin, end, into, scratch);
  });
}
void finish(const FlashmlaDecode& call, const Item& item, const Accumulator* parts, int64_t n, int64_t begin,
            int64_t end) {
  with_element(call.dtype, [&](auto t) { finish_rows<Isa, decltype(t)>(call, item, parts, n, begin, end); });
}
void merge(const FlashmlaMerge& call, int64_t begin, int64_t end) {
  with_element(call.dtype, [&](auto t) { merge_rows<Isa, decltype(t)>(call, begin, end); });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    .accumulator_stride = accumulator_stride,
    .scratch_bytes = scratch_bytes,
    .attend = attend,
    .finish = finish,
    .merge = merge,
};

}  // namespace FLASHMLA_ISA
}  // namespace flashmla
