// Gradients through attention, once for each instruction set (see kernels.cpp).
#include "flashmla/attend_backward.h"
#include "flashmla/decode_rows.h"
#include "flashmla/isa/compiled_for.h"

namespace flashmla {
namespace FLASHMLA_ISA {
namespace {

int64_t scratch_bytes(const FlashmlaDecode& call, const Item& item) {
  return with_element(call.dtype,
                      [&](auto t) { return AttentionBackward<Isa, decltype(t)>::scratch_bytes(call, item); });
}
bool backward(const FlashmlaDecode& call, const FlashmlaGradients& gradients, const Item& item, int64_t begin,
              int64_t end, float* rows, int64_t stride, char* scratch, bool more) {
  return with_element(call.dtype, [&](auto t) {
    return AttentionBackward<Isa, decltype(t)>(call, gradients, item, {rows, stride}, scratch).run(begin, end, more);
  });
}
void sum_rows(FlashmlaDType dtype, const float* const* parts, int64_t n_parts, int64_t n, int64_t stride, int64_t d,
              void* to, int64_t to_stride) {
  with_element(dtype, [&](auto t) {
    for (int64_t i = 0; i < n; i++) {
      auto* row = static_cast<decltype(t)*>(to) + i * to_stride;
      write_sum<Isa>(row, d, n_parts, [&](int64_t p) { return parts[p] + i * stride; });
    }
  });
}

}  // namespace

extern const BackwardKernels backward_kernels;
const BackwardKernels backward_kernels = {
    .backward_scratch_bytes = scratch_bytes,
    .backward = backward,
    .sum_rows = sum_rows,
};

}  // namespace FLASHMLA_ISA
}  // namespace flashmla
