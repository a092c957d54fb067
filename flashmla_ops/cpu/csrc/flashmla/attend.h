// Attention for any number of query rows a KV head: which kernel serves how many.
#pragma once

#include "flashmla/attend_dot.h"
#include "flashmla/attend_few.h"
#include "flashmla/attend_lanes.h"

namespace flashmla::FLASHMLA_ISA {

template <class Kernel>
struct Tag {
  using type = Kernel;
};

// Calls f with the kernel for so many query rows a KV head, queries of Q and rows of a format.
template <class Isa, class Q, class Row, class F>
auto with_kernel(int64_t rows, F f) {
  if (rows > kFewRows) return f(Tag<LaneAttention<Isa, Q, Row>>{});
  if constexpr (Mac<Isa, typename Row::Element>::pairs) {
    if (rows > 4) return f(Tag<FewAttention<Isa, Row, 8>>{});
    if (rows > 2) return f(Tag<FewAttention<Isa, Row, 4>>{});
    return rows > 1 ? f(Tag<FewAttention<Isa, Row, 2>>{}) : f(Tag<FewAttention<Isa, Row, 1>>{});
  } else {
    return f(Tag<DotAttention<Isa, Q, Row>>{});
  }
}

// Kernels::scratch_bytes and Kernels::attend for queries of Q and rows of a format.
template <class Isa, class Q, class Row>
ScratchBytes attention_scratch(const FlashmlaDecode& call, const Item& item) {
  const auto bytes = [&](int64_t rows) {
    Item sized = item;
    sized.rows = rows;
    return with_kernel<Isa, Q, Row>(rows, [&](auto tag) { return decltype(tag)::type::scratch_bytes(call, sized); });
  };
  // The last item of a head may have fewer rows than the others.
  const ScratchBytes few = bytes(item.rows < kFewRows ? item.rows : kFewRows), all = bytes(item.rows);
  return few.all() > all.all() ? few : all;
}
template <class Isa, class Q, class Row>
bool attend_tokens(const FlashmlaDecode& call, const Item& item, int64_t begin, int64_t end, const Accumulator& into,
                   char* scratch) {
  return with_kernel<Isa, Q, Row>(
      item.rows, [&](auto tag) { return typename decltype(tag)::type(call, item, into, scratch).run(begin, end); });
}

}  // namespace flashmla::FLASHMLA_ISA
