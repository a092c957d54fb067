// Compiled once for each instruction set, with -DFLASHMLA_ISA=<name> and that set's compiler flags. Everything here is
// in a namespace of that name, and nothing here may instantiate a function that another translation unit could share
// (standard containers, for one): the linker would keep one copy, possibly one with instructions the processor lacks.
#define FLASHMLA_CONCAT_(a, b) a##b
#define FLASHMLA_CONCAT(a, b) FLASHMLA_CONCAT_(a, b)
#define FLASHMLA_STRING_(a) #a
#define FLASHMLA_STRING(a) FLASHMLA_STRING_(a)

#include "flashmla/attend.h"
#include "flashmla/bmm.h"
#include "flashmla/finish.h"
#include "flashmla/gemm_panels.h"
#if defined(__AVX512F__)
#include "flashmla/isa/avx512.h"
#elif defined(__AVX2__)
#include "flashmla/isa/avx2.h"
#else
#include "flashmla/isa/emulated.h"
#endif

namespace flashmla {
namespace FLASHMLA_ISA {
namespace {

#if defined(__AVX512BF16__)
using Isa = Avx512<true>;
#elif defined(__AVX512F__)
using Isa = Avx512<false>;
#elif defined(__AVX2__)
using Isa = Avx2;
#elif defined(FLASHMLA_EMULATE)
using Isa = Emulated;
#else
using Isa = Portable<4, false>;
#endif

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

// One vector more than the columns need: rows of 2048 bytes would all fall into the same few sets of L1.
int64_t accumulator_stride(int64_t d_v) { return round_up(d_v, Isa::W) + 16; }

ScratchBytes scratch_bytes(const FlashmlaDecode& call, const Item& item) {
  return with_element(call.dtype, [&](auto t) { return attention_scratch<Isa, decltype(t)>(call, item); });
}
bool attend(const FlashmlaDecode& call, const Item& item, int64_t begin, int64_t end, const Accumulator& into,
            char* scratch) {
  return with_element(call.dtype,
                      [&](auto t) { return attend_tokens<Isa, decltype(t)>(call, item, begin, end, into, scratch); });
}
void finish(const FlashmlaDecode& call, const Item& item, const Accumulator* parts, int64_t n, int64_t begin,
            int64_t end) {
  with_element(call.dtype, [&](auto t) { finish_rows<Isa, decltype(t)>(call, item, parts, n, begin, end); });
}
void merge(const FlashmlaMerge& call, int64_t begin, int64_t end) {
  with_element(call.dtype, [&](auto t) { merge_rows<Isa, decltype(t)>(call, begin, end); });
}

}  // namespace
}  // namespace FLASHMLA_ISA

const Kernels FLASHMLA_CONCAT(kernels_, FLASHMLA_ISA) = {
    .name = FLASHMLA_STRING(FLASHMLA_ISA),
    .accumulator_stride = FLASHMLA_ISA::accumulator_stride,
    .scratch_bytes = FLASHMLA_ISA::scratch_bytes,
    .attend = FLASHMLA_ISA::attend,
    .finish = FLASHMLA_ISA::finish,
    .merge = FLASHMLA_ISA::merge,
    .gemm_rows = FLASHMLA_ISA::gemm_rows,
    .gemm_packed_bytes = FLASHMLA_ISA::gemm_packed_bytes,
    .gemm_pack = FLASHMLA_ISA::gemm_pack,
    .gemm_run = FLASHMLA_ISA::gemm_run,
    .gemm_epilogue = FLASHMLA_ISA::gemm_epilogue,
    .bmm_scratch_bytes = FLASHMLA_ISA::bmm_scratch_bytes,
    .bmm_run = FLASHMLA_ISA::bmm_run,
};

}  // namespace flashmla
