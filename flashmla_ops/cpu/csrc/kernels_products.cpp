// Products, once for each instruction set (see kernels.cpp).
#include "flashmla/bmm.h"
#include "flashmla/gemm_int4.h"
#include "flashmla/isa/compiled_for.h"

namespace flashmla {
namespace FLASHMLA_ISA {
namespace {

template <template <class, class, bool> class Product, class F>
auto with_types(const FlashmlaGemm& call, F f) {
  if constexpr (Isa::pairs) {
    if (call.a_dtype == FLASHMLA_BF16 && call.weight_dtype == FLASHMLA_BF16) return f(Product<Isa, bf16, true>(call));
    if (call.a_dtype == FLASHMLA_BF16 && call.weight_dtype == FLASHMLA_I8) return f(Product<Isa, i8, true>(call));
  }
  if (call.weight_dtype == FLASHMLA_I8) return f(Product<Isa, i8, false>(call));
  return with_element(call.weight_dtype, [&](auto w) { return f(Product<Isa, decltype(w), false>(call)); });
}
template <class F>
auto with_gemm(const FlashmlaGemm& call, F f) {
  if (call.weight_dtype == FLASHMLA_I4) {
    if constexpr (Isa::pairs) {
      if (call.a_dtype == FLASHMLA_BF16) return f(Int4Gemm<Isa, true>(call));
    }
    return f(Int4Gemm<Isa, false>(call));
  }
  return call.weight_panels ? with_types<PanelGemm>(call, f) : with_types<Gemm>(call, f);
}

int64_t gemm_rows(const FlashmlaGemm& call) {
  return with_gemm(call, [](auto gemm) { return gemm.kRows; });
}
int64_t gemm_packed_bytes(const FlashmlaGemm& call) {
  return with_gemm(
      call, [&](auto gemm) { return decltype(gemm)::Rows::bytes(call.m < gemm.kRows ? call.m : gemm.kRows, call.k); });
}
void gemm_pack(const FlashmlaGemm& call, int64_t row, int64_t rows, char* packed) {
  with_gemm(call, [&](auto gemm) {
    with_element(call.a_dtype,
                 [&](auto a) { decltype(gemm)::Rows::template pack<decltype(a)>(call, row, rows, packed); });
  });
}
void gemm_run(const FlashmlaGemm& call, int64_t row, int64_t rows, const char* packed, int64_t begin, int64_t end) {
  with_gemm(call, [&](auto gemm) { gemm.run(row, rows, packed, begin, end); });
}
void gemm_epilogue(const FlashmlaGemm& call, const void* product, FlashmlaDType dtype, int64_t begin, int64_t end) {
  with_element(dtype, [&](auto p) { Epilogue<Isa>(call).run(static_cast<const decltype(p)*>(product), begin, end); });
}
int64_t bmm_scratch_bytes(const FlashmlaBmm& call) {
  return with_element(call.dtype, [&](auto t) { return Bmm<Isa, decltype(t)>::scratch_bytes(call); });
}
void bmm_run(const FlashmlaBmm& call, int64_t begin, int64_t end, char* scratch) {
  with_element(call.dtype, [&](auto t) { Bmm<Isa, decltype(t)>(call).run(begin, end, scratch); });
}

}  // namespace

extern const ProductKernels product_kernels;
const ProductKernels product_kernels = {
    .gemm_rows = gemm_rows,
    .gemm_packed_bytes = gemm_packed_bytes,
    .gemm_pack = gemm_pack,
    .gemm_run = gemm_run,
    .gemm_epilogue = gemm_epilogue,
    .bmm_scratch_bytes = bmm_scratch_bytes,
    .bmm_run = bmm_run,
};

}  // namespace FLASHMLA_ISA
}  // namespace flashmla
